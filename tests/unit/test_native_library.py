"""Which kernels run: the library, the environment, instruction sets, the AMX kernels emulated."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kivi_vllm.config import KiviConfigError
from kivi_vllm.ops.cpu import abi, library, operators
from tests.unit.native import INSTRUCTION_SETS, ROOT, simulator
from tests.unit.simulator import Case
from tests.unit.test_attend import CASES
from tests.unit.test_native import MORE

CSRC = ROOT / "kivi_vllm" / "ops" / "cpu" / "csrc"


def test_this_machine_runs_what_it_says() -> None:
    native = library.load()
    assert native.isa == native.available[native.available[0] == "amx"]
    assert native.available[-1] == "portable"
    assert native.parallel


def test_unknown_instruction_set() -> None:
    with pytest.raises(
        KiviConfigError, match=r"'sse9', which .* use one of: .*portable, reference"
    ):
        library.load().select("sse9")
    assert library.load().isa == library.load().select(None)


def library_of(folder: Path, *changes: tuple[str, str]) -> Path:
    """The library, but for its kernels, of sources with these changes of `abi.h`."""
    sources = shutil.copytree(CSRC, folder / "csrc")
    text = (sources / "abi.h").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (sources / "abi.h").write_text(text)
    (sources / "none.cpp").write_text(
        '#include "units.h"\nnamespace kivi { namespace portable {\nextern const Kernels kernels;\n'
        'const Kernels kernels{"portable", 0, {}, {}, {}, {}, {}};\n}}'
    )
    target = folder / "other.so"
    names = [sources / "library.cpp", sources / "none.cpp", "-o", target]
    subprocess.run(["g++", "-std=c++17", "-shared", "-fPIC", "-fopenmp", *names], check=True)
    return target


def test_library_of_the_same_structs(tmp_path: Path) -> None:
    """What the next tests change is what is refused there."""
    assert library.Library(library_of(tmp_path)).available == ["portable"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            [("k_bits, v_bits, group_size", "v_bits, k_bits, group_size")],
            "it has KiviCall.k_bits at byte 40 where KiviCall.k_bits at 32 is expected",
        ),
        (
            [("soft_cap", "logits_cap")],
            "it has KiviCall.logits_cap at byte 464 where KiviCall.soft_cap at 464 is expected",
        ),
        (
            [
                (
                    "block_stride, head_stride, token_stride",
                    "head_stride, block_stride, token_stride",
                )
            ],
            "it has KiviRaw.block_stride at byte 16 where KiviRaw.block_stride at 8 is expected",
        ),
        (
            [("double scale, soft_cap;", "float scale, soft_cap;")],
            "it has KiviCall.soft_cap at byte 460 where KiviCall.soft_cap at 464 is expected",
        ),
        (
            [("int64_t *counted;", "int64_t *counted, *more;")],
            "it has KiviCall at byte 568 where KiviCall at 560 is expected",
        ),
        (
            [("FIELD(KiviCall, counted)", "")],
            "it has KiviRow at byte 48 where KiviCall.counted at 552 is expected",
        ),
    ],
    ids=["order", "name", "raw", "type", "size", "missing"],
)
def test_library_of_other_structs(
    tmp_path: Path, changes: list[tuple[str, str]], message: str
) -> None:
    other = library_of(tmp_path, *changes)
    with pytest.raises(OSError, match="was built from other sources: ") as error:
        library.Library(other)
    assert message in str(error.value)


def test_library_of_other_functions(tmp_path: Path) -> None:
    other = tmp_path / "other.so"
    command = ["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(other)]
    source = 'extern "C" int kivi_parallel() { return 1; }'
    subprocess.run(command, input=source, text=True, check=True)
    with pytest.raises(OSError, match=r"was built from other sources: .*kivi_"):
        library.Library(other)


def test_calls_carry_what_the_names_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packed bytes, taken apart by the names of `abi`, are those of the cache and step."""
    calls: list[tuple[bytes, Any]] = []
    run = operators._run
    monkeypatch.setattr(
        operators,
        "_run",
        lambda function, call, cache: (calls.append((call, cache)), run(function, call, cache)),
    )
    more = dict(sinks=8, soft_cap=30.0, window=500, chunk=256, per_block=3, raw=(40, 16, 9))
    case = Case("kivi_k4v3", "best", 32, (6, 2), 128, **more)
    sim = simulator(case)
    sim.step({sim.add(150): 150})
    call, cache = calls[1]  # of store_blocks, attend and store_ring
    values, at = {}, 0
    for name, kind in abi.COMMON_FIELDS + abi.QUERY_FIELDS:
        numbers = kind.unpack_from(call, at)
        values[name] = numbers if len(numbers) > 1 else numbers[0]
        at += kind.size
    assert at == len(call)
    ring = dict(zip([name for name, _ in abi.RAW_FIELDS], values["ring"], strict=True))
    pages, raw, table = cache.pages, cache.ring.cache, cache.ring.table
    block, head, token = (n * raw.itemsize for n in raw.stride()[:3])
    assert ring == {
        "data": raw.data_ptr(),
        "block_stride": block,
        "head_stride": head,
        "token_stride": token,
        "num_blocks": raw.shape[0],
        "page_tokens": 40,
        "table": table.data_ptr(),
        "table_stride": table.stride(0),
        "table_width": table.shape[1],
    }
    assert values["sinks"][0] == cache.sinks.cache.data_ptr()
    expected = {
        "num_rows": 1,
        "decode_len": 1,
        "k_bits": 4,
        "v_bits": 3,
        "group_size": 32,
        "two_level": 1,
        "head_size": 128,
        "dtype": 2,
        "num_kv_heads": 2,
        "pages": pages.data_ptr(),
        "page_block_stride": pages.stride(0),
        "page_stride": pages.stride(1),
        "page_head_stride": pages.stride(2),
        "num_blocks": pages.shape[0],
        "pages_per_block": 3,
        "num_tails": len(cache.tails),
        "residual_length": 32,
        "sink_tokens": 8,
        "threads": torch.get_num_threads(),
        "out_dtype": 2,
        "num_heads": 6,
        "scale": 128**-0.5,
        "soft_cap": 30.0,
        "alibi_slopes": 0,
        "sliding_window": 500,
        "sink_logits": 0,
        "chunk_size": 256,
    }
    assert {name: values[name] for name in expected} == expected


# torch is imported once: each environment is a fork of that process, the library not yet loaded.
DISPATCH = """
import json, os, sys, torch
from kivi_vllm.ops import dispatch
for environment in json.loads(sys.argv[1]):
    if not os.fork():
        os.environ.update(environment)
        for _ in range(2): module = dispatch.operators('cpu')
        print(module.__name__, *dispatch.describe(), sep=' | ')
        sys.exit()
    os.wait()
    print("END", flush=True)
"""


def dispatched(*environments: dict[str, str]) -> list[str]:
    """What a process says of its operators in each: module, state, and the log's lines."""
    done = subprocess.run(
        [sys.executable, "-c", DISPATCH, json.dumps(environments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    *outputs, rest = done.stdout.split("END\n")
    assert len(outputs) == len(environments) and not rest, done.stdout
    return outputs


def test_environment_chooses() -> None:
    out, portable, reference, unknown = dispatched(
        {"KIVI_VLLM_CPU_LIBRARY": "/nowhere/libkivi_cpu.so"},
        {"KIVI_VLLM_CPU_ISA": "portable"},
        {"KIVI_VLLM_CPU_ISA": "reference"},
        {"KIVI_VLLM_CPU_ISA": "sse9"},
    )
    # The reference takes the place of a missing library.
    assert "kivi_vllm.ops.reference | reference (PyTorch, slow): no native kernels" in out
    assert out.count("KIVI operators on cpu") == 1  # said once
    assert "KIVI_VLLM_CPU_LIBRARY names it: unset it" in out
    assert "kivi_vllm.ops.cpu.operators | native, portable (also: " in portable
    as_said = "kivi_vllm.ops.reference | reference (PyTorch), as KIVI_VLLM_CPU_ISA says | \n"
    assert as_said in reference
    assert "KiviConfigError: KIVI_VLLM_CPU_ISA is 'sse9'" in unknown


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library with the AMX kernels on tiles that are emulated in C++."""
    if not has_avx512_vnni():
        pytest.skip("the AMX kernels need AVX-512 VNNI besides their tiles")
    folder = tmp_path_factory.mktemp("amx")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder)]
    flags = {"CXXFLAGS": f"-DKIVI_EMULATE_AMX -I{Path(__file__).parent} -O1"}
    subprocess.run(command, cwd=ROOT, env={**os.environ, **flags}, check=True, timeout=500)
    return folder / "kivi_vllm" / "ops" / "cpu" / "libkivi_cpu.so"


def has_avx512_vnni() -> bool:
    return "avx512_vnni" in INSTRUCTION_SETS


@pytest.mark.slow
def test_amx_kernels_on_emulated_tiles(emulated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native = library.Library(emulated, "amx")
    monkeypatch.setattr(operators, "load", lambda: native)
    assert native.available[:2] == ["amx", "avx512_vnni"]
    one_of_each = {(case.dtype, case.recipe): case for case in CASES + MORE}.values()
    for case in [*(CASES + MORE)[7:36:2], *MORE[:6], *one_of_each]:
        sim = simulator(case)
        requests = [sim.add(case.tokens), sim.add(2)]
        sim.run(*requests)
