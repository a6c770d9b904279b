"""`benchmarks/quality/tasks`, with the real loaders and a tokenizer, and a played engine."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.quality.child_engine import Generation
from benchmarks.quality.metrics import TokenFigures
from benchmarks.quality.tasks import compare, longbench
from benchmarks.quality.tasks.tokens import Tokens
from kivi_vllm.cli.errors import UserError

DATA = Path(__file__).with_name("data")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model's folder without weights: bytes as tokens, 2,048 positions, a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    known = {name: i for i, name in enumerate(["<s>", "</s>", *alphabet])}
    raw = Tokenizer(models.BPE(vocab=known, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "<s>{% for m in messages %}[{{ m.content }}]{% endfor %}"
    fast.save_pretrained(folder)
    LlamaConfig(vocab_size=len(known), max_position_embeddings=2048).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def evaluate() -> ModuleType:
    """The script as a module."""
    return importlib.import_module("benchmarks.quality.tasks.__main__")


class PlayedEngine:
    """Says the right key with `auto` and nothing with `kivi2`; `fp8` does not start."""

    started: ClassVar[list[tuple]] = []
    facts: ClassVar[dict] = {"kv_cache_tokens": 1}

    def __init__(self, settings, row, update):
        self.settings, self.row = settings, row
        PlayedEngine.started.append((row.name, settings))

    def __enter__(self):
        if self.row.dtype == "fp8":
            raise UserError("no fp8 here", "another machine")
        return self

    def __exit__(self, *error):
        return None

    def generate(self, prompts, max_tokens, stop=None, on_done=None):
        assert all(len(p) + max_tokens <= self.settings.max_model_len for p in prompts)
        text = " #### 1250" if self.row.dtype == "auto" else " I do not know"
        return [Generation(text, [1]) for _ in prompts]

    def hidden_states(self, windows, on_done=None):
        factor = 1 if self.row.dtype == "auto" else 2
        return [np.full((len(window), 1), factor, np.float32) for window in windows]

    def compare(self, reference, states, targets):
        assert len(reference) == len(states) == len(targets)
        return TokenFigures(reference[:, 0], states[:, 0], states[:, 0], states[:, 0] == 1)


@pytest.fixture
def call(evaluate, monkeypatch):
    """Call the script; its mistakes are raised."""
    monkeypatch.setattr(compare, "Engine", PlayedEngine)
    PlayedEngine.started = []

    def run(*words: object):
        found = CliRunner().invoke(evaluate.app, [str(w) for w in words], catch_exceptions=False)
        assert found.exit_code == 0, found.output
        return found

    return run


def test_gsm8k(call, model, tmp_path):
    out = tmp_path / "out.json"
    found = call(
        *("gsm8k", model, "--cache", "auto", "--cache", "kivi2:residual_length=32", "--shots", 3),
        *("--data", DATA / "gsm8k", "--json", out, "--max-tokens", 64, "--prefill", "cached"),
    )
    assert "50.00 ± 50.00" in found.stdout  # one of two
    assert "-50.00 ± 50.00" in found.stdout  # the difference
    written = json.loads(out.read_text())
    assert [row["cache"] for row in written["rows"]] == ["auto", "kivi2:residual_length=32"]
    assert written["header"]["shots"] == 3
    assert model not in out.read_text()  # folders of this machine are nobody's business
    first, second = written["rows"]
    assert first["scores"]["gsm8k"]["strict"] == {"mean": 50.0, "error": 50.0, "count": 2}
    assert second["engine"]["additional_config"] == {
        "kivi": {"prefill": "cached", "residual_length": 32}
    }
    assert first["answers"][0]["text"] == " #### 1250"
    longest = max(one["prompt_tokens"] for one in first["answers"])
    assert written["header"]["max_model_len"] == longest + 64


def test_too_many_shots(call, model):
    with pytest.raises(UserError, match=r"train\.jsonl has 3"):
        call("gsm8k", model, "--data", DATA / "gsm8k", "--shots", 4)


def test_a_context_beyond_the_model_is_an_error(call, model):
    with pytest.raises(UserError, match="the model is made for 2,048") as caught:
        call("passkey", model, "--length", 12288)
    assert "--max-model-len" in caught.value.remedy
    with pytest.raises(UserError, match="more than --max-model-len 512"):
        call("passkey", model, "--length", 1024, "--max-model-len", 512)
    assert PlayedEngine.started == []  # nothing was started for it


def test_passkey(call, model, tmp_path):
    found = call("passkey", model, "--length", 600, "--length", 1200, "--limit", 2)
    assert "passkey 600" in found.stdout and "passkey 1200" in found.stdout
    assert [name for name, _ in PlayedEngine.started] == ["auto", "kivi2", "kivi4"]
    found = call("passkey", model, "--data", DATA / "passkey_examples.jsonl", "--cache", "auto")
    assert "passkey passkey_examples.jsonl" in found.stdout


def test_longbench(call, model, tmp_path):
    out = tmp_path / "out.json"
    names = ["hotpotqa", "trec", "passage_count"]
    found = call(
        *("longbench", model, "--data", DATA / "longbench", "--cache", "auto", "--json", out),
        *(word for name in names for word in ("--task", name)),
    )
    assert "average" in found.stdout
    written = json.loads(out.read_text())
    # 2,048 positions: prompts of at most 1,500 tokens, and one text is longer.
    assert written["header"]["max_length"] == 1500
    assert written["header"]["cut"] == {"hotpotqa": 1, "trec": 0, "passage_count": 0}
    cut = [one["facts"]["cut"] for one in written["rows"][0]["answers"]]
    assert cut[0] == 0 < cut[1] and cut[2:] == [0, 0]
    assert "1 shortened" in found.stdout


def test_longbench_without_a_file(call, model):
    with pytest.raises(UserError, match=r"longbench/qasper\.jsonl"):
        call("longbench", model, "--data", DATA / "longbench", "--task", "qasper")


def test_pg19(call, model, tmp_path):
    out = tmp_path / "out.json"
    call(
        *("pg19", model, "--data", DATA / "pg19", "--limit", 2, "--length", 100, "--length", 200),
        *("--cache", "auto", "--cache", "kivi2", "--json", out),
    )
    auto, kivi = json.loads(out.read_text())["rows"]
    assert [one["length"] for one in auto["figures"]] == [100, 200]
    assert auto["figures"][1]["whole"]["tokens"] == 2 * 199
    assert auto["figures"][0]["whole"]["ratio"]["value"] == pytest.approx(1)
    assert kivi["figures"][0]["whole"]["ratio"]["value"] == pytest.approx(np.e)
    assert kivi["engine"]["additional_config"] == {"kivi": {"prefill": "cached"}}
    assert "additional_config" not in auto["engine"]


def test_pg19_longer_than_a_book(call, model):
    with pytest.raises(UserError, match="The Lane has"):
        call("pg19", model, "--data", DATA / "pg19", "--limit", 2, "--length", 1024)


def test_a_row_that_fails_does_not_stop_the_others(call, model, tmp_path):
    out = tmp_path / "out.json"
    words = ["passkey", model, "--length", 600, "--limit", 1, "--json", out]
    with pytest.raises(UserError, match="no fp8 here") as caught:
        call(*words, "--cache", "auto", "--cache", "fp8", "--cache", "kivi2")
    assert caught.value.status == 1
    written = json.loads(out.read_text())
    assert [row["cache"] for row in written["rows"]] == ["auto", "kivi2"]
    assert "fp8" in written["header"]["failed"]


def test_data_is_looked_for_in_the_cache_folder(call, model, monkeypatch, tmp_path):
    monkeypatch.setenv("KIVI_VLLM_CACHE", str(tmp_path))
    with pytest.raises(UserError) as caught:
        call("gsm8k", model)
    assert str(tmp_path / "data" / "gsm8k" / "train.jsonl") in str(caught.value)


def test_bad_words_are_refused_first(call, model, tmp_path):
    with pytest.raises(UserError, match="kivi3"):
        call("gsm8k", model, "--cache", "kivi3")
    with pytest.raises(UserError, match="--prefill fast"):
        call("passkey", model, "--prefill", "fast")
    with pytest.raises(UserError, match="there is no folder"):
        call("gsm8k", model, "--json", tmp_path / "no" / "out.json")
    with pytest.raises(UserError, match="no such task"):
        call("longbench", model, "--task", "lsht")


def test_tokens(model):
    tokens = Tokens(model)
    assert tokens.positions == 2048
    ids = tokens.encode("ab")
    assert len(ids) == 3 and ids[0] == 0
    assert tokens.decode(ids) == "ab"
    assert tokens.decode(tokens.chat("hi")) == "[hi]"
    assert tokens.chat("hi").count(0) == 1  # the template brings the first token itself


def test_no_such_model(tmp_path):
    with pytest.raises(UserError, match="cannot be loaded"):
        Tokens(str(tmp_path))


def test_passkey_in_real_text(call, model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The lamp stood on the sill, and nobody came up the lane. " * 100)
    out = tmp_path / "out.json"
    words = ["--text", text, "--length", 900, "--limit", 5, "--cache", "auto", "--json", out]
    call("passkey", model, *words)
    (row,) = json.loads(out.read_text())["rows"]
    assert [one["facts"]["depth"] for one in row["answers"]] == [10, 30, 50, 70, 90]
    assert all(800 < one["prompt_tokens"] < 900 for one in row["answers"])
    with pytest.raises(UserError, match="--data has prompts of its own"):
        call("passkey", model, "--data", DATA / "passkey_examples.jsonl", "--text", text)


def test_missing_rouge_shows_before_any_work(call, model, monkeypatch):
    monkeypatch.setattr(longbench.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="samsum: scored with ROUGE-L") as caught:
        call("longbench", model, "--data", DATA / "longbench", "--task", "trec", "--task", "samsum")
    assert "kivi-vllm[eval]" in caught.value.remedy
    call("longbench", model, "--data", DATA / "longbench", "--task", "trec", "--cache", "auto")
