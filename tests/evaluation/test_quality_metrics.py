"""Figures of tokens, against their definitions in NumPy."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks.quality.models import compare_logits
from benchmarks.quality.perplexity import summary
from benchmarks.quality.sections import compare_answers


def _logits(tokens: int = 50, vocabulary: int = 300, spread: float = 4.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, vocabulary, generator=generator) * spread


def _log_softmax(x: torch.Tensor) -> np.ndarray:
    x64 = x.double().numpy()
    x64 = x64 - x64.max(-1, keepdims=True)
    return x64 - np.log(np.exp(x64).sum(-1, keepdims=True))


def test_figures_are_those_of_the_definitions() -> None:
    a = _logits()
    b = a + 0.5 * _logits(50, spread=1.0).flip(0)
    targets = np.arange(50) * 3
    found = compare_logits(a, b, targets)
    p, q = _log_softmax(a), _log_softmax(b)
    np.testing.assert_allclose(found.nll_reference, -p[np.arange(50), targets], atol=1e-5)
    np.testing.assert_allclose(found.nll, -q[np.arange(50), targets], atol=1e-5)
    np.testing.assert_allclose(found.kl, (np.exp(p) * (p - q)).sum(-1), atol=1e-6)
    np.testing.assert_array_equal(found.agree, p.argmax(-1) == q.argmax(-1))
    assert 0 < found.agree.mean() < 1


def test_a_row_has_no_divergence_from_itself() -> None:
    a = _logits()
    found = compare_logits(a, a, np.zeros(50, np.int64))
    assert (found.kl == 0).all() and found.agree.all()
    assert compare_logits(a, a.clone(), np.zeros(50, np.int64)).kl.max() == 0


def test_tokens_that_are_ruled_out_add_nothing() -> None:
    a, b = _logits(), _logits().flip(1)
    padding = torch.full((50, 7), -torch.inf)
    targets = np.zeros(50, np.int64)
    padded = compare_logits(torch.cat([a, padding], 1), torch.cat([b, padding], 1), targets)
    np.testing.assert_allclose(padded.kl, compare_logits(a, b, targets).kl, rtol=1e-6)


def _figures(n: int, difference: float, noise: float, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    nll = rng.exponential(2.0, n)
    return pd.DataFrame(
        dict(
            nll_reference=nll,
            nll=nll + difference + noise * rng.standard_normal(n),
            kl=rng.exponential(0.1, n),
            agree=rng.random(n) < 0.9,
        )
    )


def _width(estimate: dict[str, float]) -> float:
    return estimate["high"] - estimate["low"]


def test_summary_and_its_intervals() -> None:
    few, many = (summary([_figures(n, 0.1, 0.3)]) for n in (2_000, 200_000))
    for one in (few, many):
        for name, truth in dict(ratio=np.exp(0.1), kl=0.1, top1=0.9).items():
            assert one[name]["low"] < one[name]["value"] < one[name]["high"]
            assert one[name]["low"] - 0.01 < truth < one[name]["high"] + 0.01
        ratio = one["perplexity"] / one["perplexity_reference"]
        assert one["ratio"]["value"] == pytest.approx(ratio)
    assert _width(many["kl"]) < 0.2 * _width(few["kl"])


def test_summary_is_the_same_for_the_same_tokens() -> None:
    figures = _figures(1_000, 0.0, 0.2)
    assert summary([figures]) == summary([figures])
    assert summary([figures], seed=1)["kl"]["low"] != summary([figures])["kl"]["low"]
    assert summary([figures])["tokens"] == 1_000


def test_neighbours_are_drawn_together() -> None:
    """64 tokens that all differ alike are no more than one observation."""
    rng = np.random.default_rng(0)
    alike = np.repeat(rng.exponential(0.1, 30), 64)
    one = pd.DataFrame(dict(nll_reference=0.0, nll=0.0, kl=alike, agree=True))
    other = one.assign(kl=rng.permutation(alike))
    assert _width(summary([one])["kl"]) > 4 * _width(summary([other])["kl"])


def test_no_tokens_are_refused() -> None:
    for parts in ([], [_figures(0, 0.1, 0.1)]):
        with pytest.raises(ValueError, match="no positions"):
            summary(parts)


def test_blocks_do_not_reach_over_the_ends_of_parts() -> None:
    """Two stretches of 32 tokens, alike in themselves: two observations, and not one block."""
    parts = [
        pd.DataFrame(dict(nll_reference=0.0, nll=0.0, kl=kl, agree=True), index=range(32))
        for kl in (0.0, 1.0)
    ]
    two, one = summary(parts)["kl"], summary([pd.concat(parts)])["kl"]
    assert two == dict(value=0.5, low=0.0, high=1.0)
    assert one == dict(value=0.5, low=0.5, high=0.5)


def test_answers_are_compared_token_by_token() -> None:
    reference = [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert compare_answers(reference, [[1, 2, 9, 4], [5, 6, 7, 8]]) == dict(
        prompts=2,
        tokens=4,
        first_divergence=[2, 4],
        agreement=[0.75, 1.0],
        median_divergence=3,
        mean_agreement=0.875,
        identical=1,
    )
