"""What sink logits far from all scores must give, whichever kernels compute it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.unit.simulator import Case, Request, Simulator

INFINITE = float("inf")


def attended(
    make: Callable[[Case], Simulator], tokens: int, *logits: float, opposed: bool = False
) -> Request:
    """A prompt and two decodes of three heads with these sink logits, if any.

    `opposed`: queries away from their own keys.
    """
    sim = make(Case(heads=(3, 3), sink_logits=logits))
    sim.check = lambda request, a, b: None  # type: ignore[method-assign]
    request = sim.add(tokens + 2)
    if opposed:
        request.q[:] = -20 * request.k
    for n in (tokens, 1, 1):
        sim.step({request: n})
    return request


def check_far_away(make: Callable[[Case], Simulator], tokens: int = 300) -> None:
    """No difference where they are -inf, no output where they are far above all scores."""
    plain = attended(make, tokens).output
    output = attended(make, tokens, -INFINITE, 0, 1e4).output
    assert torch.equal(output[:, 0], plain[:, 0])
    assert (output - plain)[:, 1].abs().max() > 1e-3
    assert output[:, 2].abs().max() < 1e-20
    request = attended(make, tokens, 0, opposed=True)
    only = (request.q[0] * request.k[0]).sum(-1) / 8  # the one score that the first query sees
    assert only.max() < -100
    assert request.output[0].abs().max() < 1e-20
    assert request.output.isfinite().all()
