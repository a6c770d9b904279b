"""The reference's three calls against float64 attention on what each query should see."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.unit.simulator import TOLERANCE, Case, Request, Simulator
from tests.unit.sink_logits import check_far_away

BF16, FP16 = torch.bfloat16, torch.float16
MHA, MQA = (3, 3), (4, 1)

CASES = [
    # Lengths.
    *(Case(tokens=t) for t in (1, 127, 128, 129, 255, 256, 300)),
    Case(tokens=1000, model=BF16),
    Case(tokens=1000, residual=64, exact=True),
    # Head sizes and heads.
    Case(head_size=32, heads=MHA),
    Case(head_size=96, heads=MQA),
    Case(head_size=128, heads=(8, 2), model=BF16),
    Case(head_size=160, heads=MHA, residual=32),
    Case(head_size=192, heads=MQA, dtype="kivi4"),
    Case(head_size=256, heads=(4, 2), dtype="kivi_k4v3", exact=True),
    Case(head_size=512, heads=(4, 2), residual=64),
    Case("kivi4", "paper", head_size=512, heads=(2, 1), model=BF16),
    # Bits.
    Case(dtype="kivi4", residual=128),
    Case(dtype="kivi_k4v3", model=BF16, residual=64),
    Case(dtype="kivi_k3v2", model=BF16, head_size=128, heads=MHA),
    Case(dtype="kivi3", model=FP16, residual=32),
    Case(dtype="kivi_raw", model=BF16, residual=64),
    Case(dtype="kivi_raw", residual=32, heads=MHA),
    # Residuals, one page of them or several, full or not; and both prefill modes.
    *(
        Case(residual=r, exact=exact, model=model, tokens=517)
        for r in (0, 32, 64, 128)
        for exact, model in ((False, BF16), (True, torch.float32))
    ),
    # What models ask for.
    Case(scale=0.3, residual=32),
    Case(scale=1.0, soft_cap=5.0, exact=True),
    Case(alibi=True, heads=(8, 2), residual=64),
    Case(alibi=True, soft_cap=20.0, window=200, heads=MQA, exact=True),
    *(Case(window=w, residual=r) for w in (1, 16, 200) for r in (0, 64)),
    Case(window=200, exact=True, tokens=517),
    # Sink logits.
    Case(sink_logits=(4, 2), residual=32),
    Case(sink_logits=(3,), heads=MQA, alibi=True, soft_cap=20.0, window=150, exact=True),
    Case("kivi_raw", sink_logits=(4, 2, 0), head_size=128, heads=(8, 2), model=BF16, sinks=8),
    Case(recipe="paper", sink_logits=(2, 4), drafts=3, model=FP16),
    # Chunked local attention.
    Case(chunk=128, residual=32),
    Case(chunk=256, exact=True, residual=128, model=BF16, tokens=700),
    Case("kivi_raw", chunk=256, residual=64, tokens=600),
    Case(chunk=256, window=150, alibi=True, sinks=8, drafts=3, heads=MQA, tokens=600),
    Case(recipe="paper", chunk=128, sink_logits=(4, 2), sinks=8),
    # Drafts.
    Case(drafts=1, residual=64),
    Case(drafts=5, exact=True, dtype="kivi4"),
    # Sinks.
    Case(sinks=16, residual=32, model=BF16),
    Case(sinks=8, residual=128, model=BF16, head_size=128),
    Case("kivi4", sinks=8, exact=True, head_size=160, tokens=517),
    *(Case(sinks=8, window=w, tokens=400) for w in (130, 250, 300)),
    Case("kivi_k3v2", sinks=8, alibi=True, soft_cap=20.0, heads=MQA),
    Case(drafts=5, residual=32, heads=MHA),
    # Several pages in a block of the pool; full-precision pages of other sizes than pages.
    Case(per_block=2, residual=32, raw=(128, 9, 16), model=BF16, tokens=700),
    Case(per_block=3, residual=128, raw=(7, 128, 128), exact=True, tokens=700, sinks=8),
    Case("kivi4", per_block=5, raw=(1, 1, 8), heads=MQA, sinks=8, tokens=700, drafts=5),
    Case("kivi_raw", per_block=2, residual=64, raw=(50, 30, 1), heads=MHA),
    Case(per_block=3, recipe="paper", raw=(64, 1, 1), model=FP16, tokens=517),
    # Windows that pages leave, in several ways at once.
    *(Case(window=w, exact=exact, tokens=900) for w in (16, 300) for exact in (False, True)),
    Case(window=200, residual=64, per_block=2, raw=(20, 40, 9), sinks=8, tokens=900),
    Case(window=400, exact=True, residual=32, per_block=3, raw=(128, 5, 4), sinks=4, tokens=1200),
    Case("kivi4", window=300, drafts=5, per_block=5, heads=MHA, soft_cap=20.0, tokens=1500),
    Case("kivi_raw", window=150, model=BF16, per_block=2, tokens=900, alibi=True),
    Case(recipe="paper", window=150, model=BF16, per_block=2, tokens=900),
    Case("kivi4", "paper", window=300, exact=True, sinks=8, tokens=900),
    # KIVI as published.
    Case(recipe="paper"),
    Case(recipe="paper", group=64, model=FP16, residual=128, exact=True),
    Case(recipe="paper", group=128, head_size=128, residual=32, model=BF16),
    Case("kivi4", "paper", group=128, head_size=256, heads=(4, 2), exact=True),
    Case("kivi4", "paper", sinks=16, residual=32, model=BF16, tokens=517),
    Case(recipe="paper", sinks=8, window=130, drafts=5, heads=MHA),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ragged_batches_of_random_chunks(case: Case) -> None:
    sim = Simulator(case)
    requests = [sim.add(case.tokens), sim.add(max(1, case.tokens - 70)), sim.add(2)]
    sim.run(*requests)
    assert all(r.output.isfinite().all() for r in requests)
    sim.check_untouched()


@pytest.mark.parametrize(
    "case",
    [
        Case(tokens=1000, heads=(2, 1), head_size=32),
        Case(tokens=400, residual=128, model=BF16, dtype="kivi4"),
        Case(tokens=400, residual=32, window=200, alibi=True),
        Case(tokens=300, exact=True, residual=64),
    ],
    ids=str,
)
def test_one_token_at_a_time(case: Case) -> None:
    sim = Simulator(case)
    request = sim.add(case.tokens)
    for _ in range(case.tokens):
        sim.step({request: 1})


@pytest.mark.parametrize("residual", [0, 32, 64, 128])
def test_chunking_does_not_matter_per_position(residual: int) -> None:
    case = Case(residual=residual, model=BF16)
    outputs = []
    for chunks in ([300], [1] * 300, [128, 128, 44], [127, 2, 127, 44], [5, 250, 1, 1, 43]):
        sim = Simulator(case, seed=7)
        request = sim.add(300)
        for n in chunks:
            sim.step({request: n})
        outputs.append(request.output)
    for other in outputs[1:]:
        assert (other - outputs[0]).abs().max() <= TOLERANCE * outputs[0].abs().max()


def test_chunking_matters_in_exact_prefill() -> None:
    """The negative control of the test before: there the whole prompt sees itself."""
    outputs = []
    for chunks in ([300], [128, 172]):
        sim = Simulator(Case(exact=True), seed=7)
        request = sim.add(300)
        for n in chunks:
            sim.step({request: n})
        outputs.append(request.output)
    assert torch.equal(outputs[0][:128], outputs[1][:128])
    assert (outputs[0] - outputs[1])[128:].abs().amax((1, 2)).min() > 1e-3


@pytest.mark.parametrize("exact", [False, True], ids=["cached", "exact"])
@pytest.mark.parametrize("model", [BF16, FP16], ids=str)
def test_output_in_the_models_dtype(model: torch.dtype, exact: bool) -> None:
    sim = Simulator(Case(model=model, exact=exact), output_dtype=model)
    sim.run(sim.add(300))


def test_sink_logits_far_away() -> None:
    check_far_away(Simulator)


# ------------------------------------------------------------------ requests


@pytest.mark.parametrize("residual", [0, 64, 128])
def test_shared_prefix(residual: int) -> None:
    """Hits read another's pages; the owner goes on, ends, and leaves them to them."""
    sim = Simulator(Case(residual=residual, model=BF16))
    first = sim.add(500)
    sim.step({first: 300})
    second, third = sim.add(400, first, 2), sim.add(300, first, 1)
    sim.step({first: 1, second: 60, third: 1})
    sim.finish(first)
    sim.run(second, third, sim.add(260))
    sim.check_untouched()


@pytest.mark.parametrize("residual", [0, 32, 128])
@pytest.mark.parametrize("tokens", [1, 50, 200])
def test_hit_of_a_block_that_the_same_step_completes(residual: int, tokens: int) -> None:
    sim = Simulator(Case(residual=residual, exact=False))
    first = sim.add(300)
    sim.step({first: 100})
    second = sim.add(400, first, 2)
    sim.step({first: 160, second: tokens})
    sim.run(first, second)


@pytest.mark.parametrize("exact", [False, True], ids=["cached", "exact"])
def test_pages_of_finished_requests_are_taken_again(exact: bool) -> None:
    sim = Simulator(Case(residual=64, model=BF16, exact=exact), num_blocks=40)
    for length in (300, 129, 260, 1, 128, 300):
        pair = sim.add(length), sim.add(length // 2 + 1)
        sim.run(*pair)
        for request in pair:
            sim.finish(request)
    assert len(sim.touched) > 35


@pytest.mark.parametrize("exact", [False, True], ids=["cached", "exact"])
def test_tails_that_nobody_will_read_are_not_kept(exact: bool) -> None:
    sim = Simulator(Case(residual=64, model=BF16, exact=exact, drafts=4), sparse=True)
    requests = sim.add(900), sim.add(700)
    for n in (300, 5, 129, 90, 5):
        sim.step(dict.fromkeys(requests, n))
        if n == 5:
            sim.rewind(requests[0], requests[0].computed - 4)
    sim.run(*requests, longest=400)
    assert all(0 not in request.tails for request in requests)
    sim.check_untouched()


def test_requests_without_tokens_keep_their_state() -> None:
    sim = Simulator(Case(residual=32))
    busy, idle = sim.add(400), sim.add(300)
    sim.step({idle: 140})
    held = [*idle.blocks, *idle.ring, *(page for tail in idle.tails.values() for page in tail)]
    before = sim.pool[held]
    for _ in range(3):
        sim.step({busy: 100})  # `idle` is in the tables, but has no row
    assert torch.equal(sim.pool[held], before)
    sim.run(idle, busy)


def test_step_without_rows() -> None:
    sim = Simulator(Case())
    request = sim.add(200)
    sim.step({request: 150})
    before = sim.pool.clone()
    sim.step({request: 0})
    assert torch.equal(sim.pool, before)


# -------------------------------------------------------------------- drafts


def accept(sim: Simulator, request: Request, drafts: int) -> None:
    """One step of 1 + drafts tokens, of which a random number stay, at least the first."""
    start = request.computed
    sim.step({request: 1 + drafts})
    kept = int(sim.rng.integers(1, 2 + drafts))
    if start + kept < request.computed:
        sim.rewind(request, start + kept)


@pytest.mark.parametrize(
    "case",
    [
        Case(drafts=1, tokens=200),
        Case(drafts=4, residual=64, tokens=400),
        Case(drafts=8, residual=128, exact=True, model=BF16),
        Case(drafts=16, dtype="kivi4", window=16),
        Case(drafts=4, dtype="kivi_raw", residual=32, tokens=270),
    ],
    ids=str,
)
def test_rejected_drafts(case: Case) -> None:
    sim = Simulator(case)
    requests = [sim.add(case.tokens), sim.add(case.tokens)]
    sim.step({requests[0]: 100, requests[1]: 31})
    for request in requests:
        while request.computed < len(request):
            accept(sim, request, case.drafts)
    sim.check_untouched()


@pytest.mark.parametrize("residual", [0, 64])
@pytest.mark.parametrize("kept", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("before", [1, 2, 3, 4, 5])
def test_rejection_across_a_block_boundary(residual: int, before: int, kept: int) -> None:
    """A block that drafts completed is completed again, by other tokens."""
    sim = Simulator(Case(residual=residual, drafts=4))
    request = sim.add(300)
    for start in (128 - before, 256 - before):
        sim.step({request: start - request.computed})
        sim.step({request: 5})
        sim.rewind(request, start + kept)
        sim.step({request: 5})
        sim.rewind(request, start + kept + 1)
    while request.computed < len(request):
        sim.step({request: 1})


def test_whole_row_of_drafts_counts_as_decode() -> None:
    """Rows up to decode_len follow F of each position in exact mode too, longer ones do not."""
    case = Case(exact=True, drafts=3)
    for n, same in ((4, True), (5, False)):
        outputs = []
        for chunks in ([126, n], [126] + [1] * n):
            sim = Simulator(replace(case, residual=0), seed=3)
            request = sim.add(126 + n)
            for chunk in chunks:
                sim.step({request: chunk})
            outputs.append(request.output)
        assert (outputs[0] - outputs[1]).abs().max().lt(1e-5) == same
