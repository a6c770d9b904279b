"""Drafts that are refused, and those that are not."""

from __future__ import annotations

from typing import Any

import pytest

from kivi_vllm.attention import speculation
from kivi_vllm.config import KiviConfigError
from tests.engine import engine, gemma3
from tests.refusals.configs import config_only, engine_config, refusal

_PREFIX = "--kv-cache-dtype kivi2: "


def drafts(method: str = "draft_model", **config: Any) -> dict[str, Any]:
    """`speculative_config` with a draft model that is a configuration."""
    model = {} if method in ("ngram", "suffix") else {"model": config_only()}
    if method == "ngram":
        model = {"prompt_lookup_max": 3}
    return dict(method=method, num_speculative_tokens=3, **{**model, **config})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            dict(model=config_only(head_dim=48)),
            "the draft's layers: head size 48 is not supported",
        ),
        (
            dict(kv_cache_dtype="auto"),
            "a draft's layers share groups with the model's, so their cache dtype is kivi2, not "
            'auto; leave "kv_cache_dtype" out of --speculative-config',
        ),
        (
            dict(parallel_drafting=True),
            "drafts that are made in parallel are not supported; "
            'leave "parallel_drafting" out of --speculative-config',
        ),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_draft_models(config: dict[str, Any], message: str) -> None:
    assert refusal(speculative_config=drafts(**config)).startswith(_PREFIX + message)


def test_modules_of_mtp() -> None:
    model = config_only("glm4_moe", "Glm4MoeForCausalLM", num_nextn_predict_layers=2)
    mtp = dict(method="mtp", num_speculative_tokens=2)
    message = refusal(model, speculative_config=mtp)
    assert "MTP of 2 modules for as many tokens is not tested; use another draft model" in message


def test_what_only_real_drafts_are(monkeypatch: pytest.MonkeyPatch) -> None:
    config = engine_config(speculative_config=drafts())
    draft = config.speculative_config.draft_model_config
    monkeypatch.setattr(type(draft), "use_mla", property(lambda model: model is draft))
    monkeypatch.setattr(type(config.speculative_config), "use_gemma4_mtp", lambda _: True)
    assert list(speculation.problems(config)) == [
        "Gemma-4's MTP is not supported: its layers read the caches of the model's; use another "
        "draft model, or method ngram",
        "the draft has multi-head latent attention (MLA); use another draft model, or method ngram",
    ]


@pytest.mark.slow
def test_several_windows() -> None:
    draft = dict(method="draft_model", model=gemma3("wf"), num_speculative_tokens=3)
    with (
        pytest.raises(KiviConfigError, match=r"layers of several windows \(200 and none\)"),
        engine(gemma3("ff"), speculative_config=draft),
    ):
        pass


def test_hybrid_models() -> None:
    """What vLLM's own cache does there is in `tests.models.test_hybrids`."""
    model = config_only("falcon_h1", "FalconH1ForCausalLM", head_dim=64)
    message = refusal(model, speculative_config=drafts("ngram"), enable_prefix_caching=False)
    assert (
        "speculation with a hybrid model: vLLM's CPU kernels do not take back what rejected "
        "drafts did to states, whatever the cache, and answers are wrong; leave out "
        "--speculative-config"
    ) in message


def test_pipelines() -> None:
    message = refusal(pipeline_parallel_size=2, speculative_config=drafts("ngram"))
    assert (
        "speculation in a pipeline: vLLM's workers fail at start, whatever the cache, as the first "
        "stages have no drafter; leave out --speculative-config or --pipeline-parallel-size"
    ) in message


def test_what_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    # The package of suffix decoding is not installed here.
    monkeypatch.setattr("vllm.config.speculative.has_arctic_inference", lambda: True)
    for method in ("ngram", "suffix", "draft_model", "eagle"):
        engine_config(speculative_config=drafts(method))
