"""The native CPU kernels, each instruction set here, against the reference and float64."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kivi_vllm.config import KiviConfigError
from kivi_vllm.ops import reference
from kivi_vllm.ops.cpu import library, operators
from kivi_vllm.ops.format import PageFormat
from kivi_vllm.ops.reference import AttentionParams, LayerCache, Raw, Row, Step
from tests.unit import kivi_numpy
from tests.unit.simulator import Case, Simulator
from tests.unit.test_attend import BF16, CASES, FP16, MHA, MQA
from tests.unit.test_codec import blocks, formats

# Of the largest output of a head: products with scales have 16 bits.
TOLERANCE = 5e-3
INSTRUCTION_SETS = library.load().available
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels of one instruction set."""
    library.load().select(request.param)
    yield request.param
    library.load().select(None)


@pytest.fixture
def threads() -> Iterator[None]:
    """Three threads: pages of one sequence are split, and the parts put together."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def simulator(case: Case, **options: Any) -> Simulator:
    return Simulator(case, ops=operators, tolerance=TOLERANCE, **options)


def test_this_machine_runs_what_it_says() -> None:
    native = library.load()
    assert native.isa == native.available[native.available[0] == "amx"]
    assert native.available[-1] == "portable"
    assert native.parallel


MORE = [
    *(Case(heads=(n, 1), head_size=32, tokens=200) for n in (5, 6, 7, 8, 71, 130)),
    Case(heads=(10, 2), head_size=96, dtype="kivi4", tokens=280),
    Case(heads=(12, 4), head_size=160, dtype="kivi_k4v2", model=BF16),
    Case(heads=(32, 8), head_size=128, model=BF16, tokens=200),
    Case(heads=(32, 4), head_size=256, group=64, model=FP16, tokens=200),
    Case(model=torch.float32, residual=128, dtype="kivi2", head_size=128, group=128),
    Case(dtype="kivi_raw", residual=128, model=FP16, window=130),
    Case(heads=MHA, scale=0.5, tokens=400),  # peaked
    Case(heads=MQA, scale=1.0, tokens=400, dtype="kivi4"),
]


@pytest.mark.parametrize("case", CASES + MORE, ids=str)
def test_ragged_batches_of_random_chunks(isa: str, case: Case) -> None:
    sim = simulator(case)
    requests = [sim.add(case.tokens), sim.add(max(1, case.tokens - 70)), sim.add(2)]
    sim.run(*requests)
    assert all(r.output.isfinite().all() for r in requests)
    sim.check_untouched()


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 4097])
def test_lengths_at_decode(isa: str, tokens: int) -> None:
    sim = simulator(Case(model=BF16, heads=(3, 1), tokens=tokens))
    request = sim.add(tokens + 3)
    if tokens > 1:
        sim.step({request: tokens - 1})
    for _ in range(4):
        sim.step({request: 1})


@pytest.mark.parametrize(
    "case",
    [
        Case(drafts=4, residual=64, tokens=400),
        Case(drafts=16, dtype="kivi4", window=16, tokens=300),
        Case(drafts=5, exact=True, model=BF16, tokens=300),
    ],
    ids=str,
)
def test_rejected_drafts(isa: str, case: Case) -> None:
    sim = simulator(case)
    request = sim.add(case.tokens)
    sim.step({request: 100})
    while request.computed < len(request):
        start, n = request.computed, 1 + case.drafts
        sim.step({request: n})
        kept = int(sim.rng.integers(1, n + 1))
        if start + kept < request.computed:
            sim.rewind(request, start + kept)
    sim.check_untouched()


@pytest.mark.parametrize(
    "case",
    [
        Case(tokens=2600, model=BF16, residual=32, heads=(4, 1)),
        Case(tokens=2600, dtype="kivi4", window=1500, alibi=True, heads=MHA),
    ],
    ids=str,
)
def test_split_sequences_are_put_together(isa: str, case: Case, threads: None) -> None:
    outputs = []
    for count in (3, 1):
        torch.set_num_threads(count)
        sim = simulator(case)
        requests = [sim.add(2600), sim.add(1200)]
        sim.step({requests[0]: 2590, requests[1]: 1190})
        for _ in range(10):
            sim.step(dict.fromkeys(requests, 1))
        outputs.append(requests[0].output)
    assert (outputs[0] - outputs[1]).abs().max() <= 1e-5 * outputs[1].abs().max()


@pytest.mark.parametrize(("residual", "window"), [(0, 0), (64, 0), (0, 150)])
def test_chunks_do_not_matter(isa: str, residual: int, window: int) -> None:
    outputs = []
    for chunks in ([300], [1] * 300, [127, 2, 127, 44], [5, 250, 1, 1, 43]):
        case = Case(residual=residual, window=window, model=BF16, heads=(6, 2))
        sim = simulator(case, seed=7)
        request = sim.add(300)
        for n in chunks:
            sim.step({request: n})
        outputs.append(request.output)
    for other in outputs[1:]:
        assert (other - outputs[0]).abs().max() <= 1e-5 * outputs[0].abs().max()


@pytest.mark.parametrize("model", [BF16, FP16], ids=str)
def test_output_in_the_models_dtype(isa: str, model: torch.dtype) -> None:
    sim = simulator(Case(model=model, exact=True), output_dtype=model)
    sim.run(sim.add(300))


@pytest.mark.parametrize("where", ["k", "v"])
def test_outliers(isa: str, where: str) -> None:
    """A few channels of K twenty times as large, or a few tokens of V ten times."""
    sim = simulator(Case(model=BF16, heads=(8, 2), head_size=128, tokens=400))
    request = sim.add(400)
    if where == "k":
        request.k[..., [5, 17]] *= 20
        request.q[..., 5] *= 0.2  # where keys are large, queries are small, or are not
    else:
        request.v[7::50] *= 10
    sim.run(request)


# --------------------------------------------------------------------- codes


def stored(ops: Any, fmt: PageFormat, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The page that `ops` makes of one block of which 100 tokens were in the ring."""
    capacity = -(-128 // fmt.raw_tokens) * fmt.raw_tokens
    pages = torch.full((3, 1, fmt.page_bytes), 255, dtype=torch.uint8)
    shape = (capacity // fmt.raw_tokens, 1, fmt.raw_tokens, 2 * fmt.head_size)
    ring = torch.full(shape, torch.nan).to(fmt.raw_dtype)
    table = torch.arange(len(ring), dtype=torch.int32)[None]
    cache = LayerCache(fmt, pages, Raw(ring, table), capacity)
    key, value = k[:, None], v[:, None]
    block_table = torch.tensor([[1]], dtype=torch.int32)
    for a, b in ((0, 100), (100, 128)):
        step = Step([Row(0, 0, b - a, a, b)], block_table)
        ops.store_blocks(step, cache, key[a:b], value[a:b])
        ops.store_ring(step, cache, key[a:b], value[a:b])
    assert (pages[0] == 255).all() and (pages[2] == 255).all()
    return pages[1, 0]


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@given(st.data(), formats)
@settings(max_examples=60, deadline=None)
def test_pages_equal_the_reference(name: str, data: st.DataObject, fmt: PageFormat) -> None:
    """Bit for bit, but for the bits of a NaN and the sign of a zero."""
    library.load().select(name)
    k, v = data.draw(blocks(fmt)), data.draw(blocks(fmt))
    ours, theirs = (
        kivi_numpy.canonical(
            stored(ops, fmt, k, v).numpy(), fmt.k_bits, fmt.v_bits, fmt.group_size, fmt.head_size
        )
        for ops in (operators, reference)
    )
    library.load().select(None)
    assert torch.equal(torch.from_numpy(ours), torch.from_numpy(theirs))


@pytest.mark.parametrize("dtype", ["kivi2", "kivi_k4v2", "kivi4", "kivi_raw"])
@pytest.mark.parametrize("residual", [0, 32, 128])
def test_pools_equal_the_reference(isa: str, dtype: str, residual: int) -> None:
    """Pages, ring and tails of many requests, chunks and block boundaries."""
    pools = []
    for ops in (operators, reference):
        case = Case(dtype=dtype, residual=residual, model=BF16, head_size=96)
        quiet = SimpleNamespace(
            store_blocks=ops.store_blocks, store_ring=ops.store_ring, attend=reference.attend
        )
        sim = Simulator(case, ops=quiet, seed=5)
        sim.run(sim.add(500), sim.add(270), sim.add(130))
        pools.append(sim.pool)
    assert torch.equal(*pools)


def test_nan_reaches_only_its_own_request(isa: str) -> None:
    sim = simulator(Case())
    bad, good = sim.add(300), sim.add(300)
    bad.k[40, 0, 3] = bad.v[200, 1, 5] = torch.nan
    sim.check = lambda request, a, b: None  # type: ignore[method-assign]
    sim.step({bad: 150, good: 150})
    sim.step({bad: 150, good: 150})
    assert good.output.isfinite().all()
    assert bad.output[299, :2].isnan().all()


def test_nan_alone_in_a_tile(isa: str) -> None:
    """A query whose newest tile shows it a NaN and nothing else."""
    sim = simulator(Case(model=BF16))
    request = sim.add(100)
    request.k[64] = torch.nan
    sim.check = lambda request, a, b: None  # type: ignore[method-assign]
    sim.step({request: 100})
    assert request.output[:64].isfinite().all() and request.output[64:].isnan().all()


# ----------------------------------------------------------------- bad input


def inputs() -> dict[str, Any]:
    """Good arguments of the three operators, by name."""
    fmt = PageFormat(2, 2, 32, 64, BF16)
    pages = torch.zeros(8, 2, fmt.page_bytes, dtype=torch.uint8)
    raw = torch.zeros(8, 2, fmt.raw_tokens, 128, dtype=BF16)
    table = torch.arange(1, 7, dtype=torch.int32)[None]
    tail = Raw(raw.clone(), table.clone())
    return dict(
        step=Step([Row(0, 0, 3, 254, 257)], table),
        cache=LayerCache(fmt, pages, Raw(raw, table), 144, (tail, tail), 32),
        query=torch.zeros(3, 4, 64, dtype=BF16),
        key=torch.zeros(3, 2, 64, dtype=BF16),
        value=torch.zeros(3, 2, 64, dtype=BF16),
        params=AttentionParams(0.1),
        output=torch.zeros(3, 4, 64, dtype=BF16),
    )


def call(given: dict[str, Any]) -> None:
    kv = (given["step"], given["cache"], given["key"], given["value"])
    operators.store_blocks(*kv)
    operators.attend(
        given["step"],
        given["cache"],
        *(given[name] for name in ("query", "key", "value", "params", "output")),
    )
    operators.store_ring(*kv)


def change(name: str, how: Any) -> dict[str, Any]:
    """`inputs` with one tensor replaced; `cache.ring.table` means that one."""
    given = inputs()
    head, *path = name.split(".")

    def replaced(owner: Any, path: list[str]) -> Any:
        if not path:
            return how(owner)
        return replace(owner, **{path[0]: replaced(getattr(owner, path[0]), path[1:])})

    given[head] = replaced(given[head], path)
    return given


WRONG = {
    "query": [
        lambda x: x.float(),
        lambda x: x[:, :3],
        lambda x: x[:2],
        lambda x: x[0],
        lambda x: x.to("meta"),
    ],
    "key": [lambda x: x.half(), lambda x: x[:, :1], lambda x: x.mT.contiguous().mT],
    "value": [lambda x: x[..., :32], lambda x: x[:1], lambda x: x[None]],
    "output": [lambda x: x.double(), lambda x: x[:, :2], lambda x: x.mT.contiguous().mT],
    "cache.pages": [lambda x: x.int(), lambda x: x[..., :-1], lambda x: x[..., None]],
    "cache.ring.cache": [lambda x: x.float(), lambda x: x[:, :1], lambda x: x[..., :127]],
    "cache.ring.table": [lambda x: x.long(), lambda x: x[0], lambda x: x[:0]],
    "step.block_table": [lambda x: x.long(), lambda x: x.repeat(2, 2)[:, ::2]],
}


def test_good_input_is_taken() -> None:
    call(inputs())


@pytest.mark.parametrize(
    ("name", "i"), [(n, i) for n, all_ in WRONG.items() for i in range(len(all_))]
)
def test_wrong_tensors_are_named(name: str, i: int) -> None:
    with pytest.raises(ValueError, match=name.split(".", 1)[-1].replace("ring.cache", "ring")):
        call(change(name, WRONG[name][i]))


def test_wrong_slopes_and_tails_are_named() -> None:
    with pytest.raises(ValueError, match="alibi_slopes is"):
        call(change("params", lambda p: replace(p, alibi_slopes=torch.zeros(3))))
    with pytest.raises(ValueError, match="1 tails of 24 tokens cannot hold residual_length 32"):
        call(change("cache", lambda c: replace(c, tails=c.tails[:1])))


@pytest.mark.parametrize(
    "row",
    [
        Row(0, 0, 3, -1, 2),
        Row(0, 0, 3, 0, 257),
        Row(0, 0, 3, 257, 254),
        Row(0, 597, 600, 0, 257),
        Row(-1, 0, 3, 254, 257),
        Row(0, -1, 2, 254, 257),
    ],
    ids=str,
)
def test_rows_that_do_not_fit(row: Row) -> None:
    with pytest.raises(
        ValueError, match=r"a row's positions and tokens do not fit|is .*, but must"
    ):
        call(change("step.rows", lambda rows: [row]))


def test_numbers_that_do_not_fit() -> None:
    for name, value in (("ring_capacity", 0), ("residual_length", 256)):
        with pytest.raises(ValueError, match=f"{name} is {value}, but must be"):
            call(change("cache", lambda c, name=name, value=value: replace(c, **{name: value})))
    for bits, group in (((2, 4), 32), ((2, 2), 16)):
        fmt = PageFormat(*bits, group, 64, BF16)
        with pytest.raises(ValueError, match=r"no format of . and . bits"):
            call(change("cache.fmt", lambda _, fmt=fmt: fmt))


def test_huge_window_is_none() -> None:
    outputs = []
    for window in (0, 2**32 + 5, 2**63 - 1):
        sim = simulator(Case(tokens=300), seed=3)
        sim.case = replace(sim.case, window=window)
        sim.check = lambda request, a, b: None  # type: ignore[method-assign]
        sim.step({sim.add(300): 300})
        outputs.append(sim.requests[0].output)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_good_after_bad_and_bad_after_good() -> None:
    """What was recognized once does not let the next one through."""
    for _ in range(2):
        call(inputs())
        with pytest.raises(ValueError, match="query is"):
            call(change("query", lambda x: x.float()))


@pytest.mark.parametrize("bad", [-1, 8, 2**31 - 1])
@pytest.mark.parametrize(
    "name", ["step.block_table", "cache.ring.table", "cache.tails"], ids=lambda n: n.split(".")[-1]
)
def test_page_ids_out_of_range(name: str, bad: int) -> None:
    def spoil(x: Any) -> Any:
        if isinstance(x, tuple):
            return (Raw(x[0].cache, spoil(x[0].table)), *x[1:])
        x = x.clone()
        x[0, 1] = bad
        return x

    given = change(name, spoil)
    before = given["cache"].pages.clone()
    with pytest.raises(ValueError, match=r"outside of its cache \(pages: 8, ring: 8\)"):
        call(given)
    assert torch.equal(given["cache"].pages, before)


def test_table_too_narrow() -> None:
    with pytest.raises(ValueError, match="too few columns"):
        call(change("step.block_table", lambda x: x[:, :1]))


# ------------------------------------------------------------------- library


def test_unknown_instruction_set() -> None:
    with pytest.raises(
        KiviConfigError, match=r"'sse9', which .* use one of: .*portable, reference"
    ):
        library.load().select("sse9")
    assert library.load().isa == library.load().select(None)


def test_library_of_other_sources(tmp_path: Path) -> None:
    other = tmp_path / "other.so"
    source = 'extern "C" long kivi_call_bytes() { return 8; }'
    command = ["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(other)]
    subprocess.run(command, input=source, text=True, check=True)
    with pytest.raises(OSError, match="was built from other sources"):
        library.Library(other)


def dispatched(**environment: str) -> str:
    """What a fresh process says of its operators: module, state, and the log's lines."""
    code = (
        "import torch; from kivi_vllm.ops import dispatch\n"
        "for _ in range(2): module = dispatch.operators(torch.device('cpu'))\n"
        "print(module.__name__, *dispatch.describe(), sep=' | ')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout + done.stderr


def test_reference_takes_the_place_of_a_missing_library() -> None:
    out = dispatched(KIVI_VLLM_CPU_LIBRARY="/nowhere/libkivi_cpu.so")
    assert "kivi_vllm.ops.reference | reference (PyTorch, slow): no native kernels" in out
    assert out.count("KIVI operators on cpu") == 1  # said once
    assert "install kivi_vllm again" in out


def test_environment_chooses() -> None:
    out = dispatched(KIVI_VLLM_CPU_ISA="portable")
    assert "kivi_vllm.ops.cpu.operators | native, portable (also: " in out
    out = dispatched(KIVI_VLLM_CPU_ISA="reference")
    assert "kivi_vllm.ops.reference | reference (PyTorch), as KIVI_VLLM_CPU_ISA says | \n" in out
    assert "KiviConfigError: KIVI_VLLM_CPU_ISA is 'sse9'" in dispatched(KIVI_VLLM_CPU_ISA="sse9")


# ----------------------------------------------------------------------- AMX


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library with the AMX kernels on tiles that are emulated in C++."""
    if not has_avx512_vnni():
        pytest.skip("the AMX kernels need AVX-512 VNNI besides their tiles")
    folder = tmp_path_factory.mktemp("amx")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder)]
    flags = {"CXXFLAGS": "-DKIVI_EMULATE_AMX -O1"}
    subprocess.run(command, cwd=ROOT, env={**os.environ, **flags}, check=True, timeout=500)
    return folder / "kivi_vllm" / "ops" / "cpu" / "libkivi_cpu.so"


def has_avx512_vnni() -> bool:
    return "avx512_vnni" in INSTRUCTION_SETS


def test_amx_kernels_on_emulated_tiles(emulated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native = library.Library(emulated, "amx")
    monkeypatch.setattr(operators, "load", lambda: native)
    assert native.available[:2] == ["amx", "avx512_vnni"]
    for case in (CASES + MORE)[7:36:2] + MORE[:6]:
        sim = simulator(case)
        requests = [sim.add(case.tokens), sim.add(2)]
        sim.run(*requests)
