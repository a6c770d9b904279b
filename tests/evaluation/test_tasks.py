"""Published evaluations as tasks of lm-evaluation-harness: prompts, data, scores; one real run."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality.tasks import passkey
from kivi_vllm.cli.default_model import default_model

TASKS = Path(passkey.__file__).parent
PUBLISHED = "8a4b0a5ab31cb3df77444f14343b2121ff23f0a89d11d20e648eab5068d171fa"
"""SHA-256 of the prompts and lengths in LongBench's two configuration files."""


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Makes a task of the harness from its file, with what `--metadata` gives."""
    pytest.importorskip("lm_eval", reason="pip install 'kivi-vllm[eval]'")
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    monkeypatch.chdir(Path(__file__).parent)  # the tasks' data is in ./data
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def made(name: str, **metadata: Any) -> Any:
        config = load_yaml(TASKS / f"{name}.yaml")
        config["metadata"] |= metadata
        config.pop("tag", None)
        if "num_fewshot" in config:
            config["num_fewshot"] = 2  # of the three that the file has
        return ConfigurableTask(config=config)

    return made


def _scores(task: Any, answers: list[str]) -> list[dict[str, dict[str, float]]]:
    """Scores of answers to a task's first items, by filter."""
    task.build_all_requests(limit=len(answers), rank=0, world_size=1)
    for item, answer in zip(task.instances, answers, strict=True):
        item.resps.append(answer)
    task.apply_filters()
    return [
        {name: task.process_results(item.doc, [text]) for name, text in item.filtered_resps.items()}
        for item in task.instances
    ]


def _prompts(task: Any, count: int) -> list[str]:
    task.build_all_requests(limit=count, rank=0, world_size=1)
    return [item.args[0] for item in task.instances]


# ---------------------------------------------------------------------- GSM8K


def test_gsm8k_asks_after_the_first_worked_examples(load: Callable[..., Any]) -> None:
    prompts = _prompts(load("gsm8k"), 2)
    lines = (Path("data/gsm8k/train.jsonl")).read_text().splitlines()
    shots = [json.loads(line) for line in lines[:2]]
    question = json.loads(Path("data/gsm8k/test.jsonl").read_text().splitlines()[0])["question"]
    worked = "".join(f"Question: {s['question']}\nAnswer: {s['answer']}\n\n" for s in shots)
    assert prompts[0] == f"{worked}Question: {question}\nAnswer:"


def test_gsm8k_scores(load: Callable[..., Any]) -> None:
    answers = [" 1000+250=1250.\n#### 1,250", " It is -5 degrees."]
    strict, flexible = "strict-match", "flexible-extract"
    one, other = _scores(load("gsm8k"), answers)
    assert one[strict]["exact_match"] == one[flexible]["exact_match"] == 1
    assert (other[strict]["exact_match"], other[flexible]["exact_match"]) == (0, 1)
    [wrong] = _scores(load("gsm8k"), ["#### 1251"])
    assert wrong[strict]["exact_match"] == wrong[flexible]["exact_match"] == 0


# ------------------------------------------------------------------ LongBench

LONGBENCH = sorted(path.stem for path in (TASKS / "longbench").glob("[!_]*.yaml"))


def test_longbenchs_prompts_and_lengths_are_the_published_ones() -> None:
    """To the last blank: a prompt that reads better is another benchmark."""
    pytest.importorskip("lm_eval", reason="pip install 'kivi-vllm[eval]'")
    from lm_eval.tasks._yaml_loader import load_yaml

    ours = {}
    for name in LONGBENCH:
        config = load_yaml(TASKS / "longbench" / f"{name}.yaml", resolve_func=False)
        text = config["doc_to_text"].replace("{{", "{").replace("}}", "}")
        ours[name] = [text, config["generation_kwargs"]["max_gen_toks"]]
        assert config["task"] == f"kivi_longbench_{name}" and config["tag"] == "kivi_longbench"
        assert config["dataset_kwargs"]["data_files"]["test"] == f"data/longbench/{name}.jsonl"
    assert len(ours) == 16
    assert hashlib.sha256(json.dumps(ours).encode()).hexdigest() == PUBLISHED


def test_a_whole_prompt(load: Callable[..., Any]) -> None:
    assert _prompts(load("longbench/trec"), 1) == [
        "Please determine the type of the question below. Here are some examples of questions.\n\n"
        "Question: Who wrote it?\nType: Individual\nQuestion: What do owls eat?\nType: Food\n"
        "Question: When did the war end?\nType:"
    ]
    [prompt] = _prompts(load("longbench/hotpotqa"), 1)
    assert "{near the hills}" in prompt, "braces in a context stay"


@pytest.mark.parametrize(
    ("task", "answer", "score"),
    [
        ("hotpotqa", " River Axe", 1.0),  # the best answer counts: against 'Axe' it is 2/3
        ("hotpotqa", " Thames", 0.0),
        ("trec", "\n\nDate\nQuestion: Who?\nType: City", 1.0),  # the first line alone
        ("trec", "Date or City", 0.5),
        ("trec", "", 0.0),
        ("samsum", "Kim and Lee will have tea at five at Lee's.\nDialogue: no", 1.0),
        ("lcc", "# a comment\n    return add(a, a)\nmore", 1.0),
        ("lcc", "return", 0.46),  # 2 * 6 of 6 + 20 characters
        ("repobench-p", "    add(1, 2))", 1.0),
        ("passage_count", "There are 2, or 3.", 0.5),
        ("passage_retrieval_en", "Paragraph 2", 1.0),
        ("passage_retrieval_en", "Paragraph 1", 0.0),
    ],
)
def test_longbench_scores(load: Callable[..., Any], task: str, answer: str, score: float) -> None:
    [found] = _scores(load(f"longbench/{task}"), [answer])
    [scores] = found.values()
    assert scores["score"] == pytest.approx(score, abs=0.01)


# ------------------------------------------------------------------- pass key


def _size(text: str) -> int:
    """A text's words and line breaks, and a token that begins it."""
    return 1 + len(text.replace("\n", " \n ").split(" "))


def test_passkey_prompt() -> None:
    assert passkey.prompt(12345, 1, 2).split("\n") == [
        passkey.TASK,
        passkey.FILLER,
        "The pass key is 12345. Remember it. 12345 is the pass key.",
        passkey.FILLER,
        passkey.FILLER,
        "What is the pass key? The pass key is",
    ]


@pytest.mark.parametrize("length", [150, 1000, 1019, 1020, 1021, 12288])
def test_passkey_prompts_have_the_length(length: int) -> None:
    rows = passkey.prompts([length], 4, _size)
    line = _size(passkey.FILLER + "\n") - 1
    for row in rows:
        assert length - line < _size(row["input"]) <= length
        assert row["input"].count(row["target"]) == 2
    assert [row["depth"] for row in rows] == [25, 50, 75, 100]
    assert len({row["target"] for row in rows}) == 4


def test_passkey_depths_are_where_they_say() -> None:
    for row in passkey.prompts([2000], 5, _size):
        at = row["input"].index(row["target"]) / len(row["input"])
        assert abs(100 * at - row["depth"]) < 6


def test_passkey_too_short() -> None:
    with pytest.raises(ValueError, match="lengths: 20: the shortest prompt has"):
        passkey.prompts([20], 1, _size)


@pytest.mark.parametrize(
    ("answer", "score"),
    [(" 74509. The grass", 1), ("74509", 1), (" 7450", 0), (" 99 or 74509", 0), ("", 0)],
)
def test_passkey_scores(load: Callable[..., Any], answer: str, score: int) -> None:
    task = load("passkey_file")
    assert _prompts(task, 1)[0].endswith(".\nWhat is the pass key? The pass key is ")
    [found] = _scores(task, [answer])
    assert found["first-number"]["exact_match"] == score


# ------------------------------------------------------------------ a real run


@pytest.mark.slow
def test_lm_eval_runs_a_task_on_a_kivi_cache(tmp_path: Path) -> None:
    """The command of benchmarks/README.md, on a CPU; what the harness saves says what it ran."""
    pytest.importorskip("lm_eval", reason="pip install 'kivi-vllm[eval]'")
    arguments = {
        "pretrained": str(default_model()),
        "kv_cache_dtype": "kivi4",
        "dtype": "float32",
        "max_model_len": 640,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 64 << 20,
        "additional_config": {"kivi": {"prefill": "cached", "residual_length": 32}},
    }
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "vllm"]
    command += ["--tasks", str(TASKS / "passkey.yaml"), "--limit", "2", "--batch_size", "auto"]
    command += ["--metadata", '{"lengths": [600], "keys": 2}', "--log_samples"]
    command += ["--output_path", str(tmp_path), "--model_args", json.dumps(arguments)]
    quick = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCH_COMPILE_DISABLE": "1"}
    done = subprocess.run(
        command,
        env={**os.environ, **quick, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [results] = tmp_path.rglob("results_*.json")
    saved = json.loads(results.read_text())
    assert saved["config"]["model_args"] == arguments
    [samples] = tmp_path.rglob("samples_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [row["doc"]["depth"] for row in rows] == [50, 100]
    # The model reads the key out of the quantized cache.
    right = [row["doc"]["target"] in row["resps"][0][0] for row in rows]
    assert right == [True, True]
    assert saved["results"]["kivi_passkey"]["exact_match,first-number"] == 1
