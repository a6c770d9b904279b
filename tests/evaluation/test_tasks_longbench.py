"""LongBench: loader, prompts, truncation, metrics against values worked out by hand."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from benchmarks.quality.tasks import longbench, longbench_metrics
from benchmarks.quality.tasks.items import run
from benchmarks.quality.tasks.longbench_tasks import KIVI_TASKS, TASKS
from kivi_vllm.cli.errors import UserError
from tests.evaluation.test_tasks import Parrot, Words

DATA = Path(__file__).with_name("data") / "longbench"

PUBLISHED = "8a4b0a5ab31cb3df77444f14343b2121ff23f0a89d11d20e648eab5068d171fa"
"""SHA-256 of the prompts and lengths in LongBench's two configuration files."""


def test_prompts_and_lengths_are_the_published_ones():
    """To the last blank: a prompt that reads better is another benchmark."""
    ours = {name: [task.prompt, task.max_tokens] for name, task in sorted(TASKS.items())}
    assert hashlib.sha256(json.dumps(ours).encode()).hexdigest() == PUBLISHED


def test_tasks_that_kivi_reports():
    assert len(KIVI_TASKS) == 15
    assert {"qasper", "qmsum", "multi_news", "trec", "triviaqa", "samsum", "lcc"} < set(KIVI_TASKS)


def test_a_whole_prompt():
    tokens = Words()
    (row,) = longbench.load(DATA, "trec")
    (one,) = longbench.items("trec", [row], tokens, 1000)
    assert one.prompt == tokens.encode(
        "Please determine the type of the question below. Here are some examples of questions.\n\n"
        "Question: Who wrote it?\nType: Individual\nQuestion: What do owls eat?\nType: Food\n"
        "Question: When did the war end?\nType:"
    )
    assert (one.max_tokens, one.id, one.expected) == (64, "trec-0", ["Date"])


@pytest.mark.parametrize("task", sorted(path.stem for path in DATA.glob("*.jsonl")))
def test_every_file_gives_items(task):
    rows = longbench.load(DATA, task)
    items = longbench.items(task, rows, Words(), 4000)
    assert len(items) == len(rows) >= 1
    assert all(one.task == task and one.facts["cut"] == 0 for one in items)


def test_braces_in_a_context_stay():
    row = longbench.load(DATA, "hotpotqa")[0]
    assert "{near the hills}" in TASKS["hotpotqa"].prompt.format(**row)


def test_the_middle_is_cut_and_counted():
    tokens = Words()
    text = " ".join(f"w{i}" for i in range(100))  # with the first token, 101
    short, cut = longbench.shortened(text, tokens, 11)  # an odd limit: halves of 5
    assert short == "w0 w1 w2 w3w95 w96 w97 w98 w99"  # as published: nothing is put between
    assert cut == 101 - 10
    assert longbench.shortened(text, tokens, 101) == (text, 0)
    rows = longbench.load(DATA, "hotpotqa")
    first, second = longbench.items("hotpotqa", rows, tokens, 200)
    assert first.facts["cut"] == 0 < second.facts["cut"]
    assert len(second.prompt) <= 201


@pytest.mark.parametrize(
    ("length", "limit"), [(4096, 3500), (8192, 7500), (16384, 15500), (32768, 31500), (1024, 500)]
)
def test_the_published_limits(length, limit):
    assert longbench.prompt_limit(length) == limit


def test_a_model_without_room():
    with pytest.raises(UserError, match="512"):
        longbench.prompt_limit(512)


def test_unknown_tasks_and_missing_files(tmp_path):
    with pytest.raises(UserError, match="vcsum"):
        longbench.load(DATA, "vcsum")
    with pytest.raises(UserError) as caught:
        longbench.load(tmp_path, "qasper")
    assert str(tmp_path / "qasper.jsonl") in str(caught.value)
    assert "data.zip" in caught.value.remedy


def test_rows_without_a_field_are_refused(tmp_path):
    row = longbench.load(DATA, "trec")[0]
    del row["all_classes"]
    (tmp_path / "trec.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="line 1, has no 'all_classes'"):
        longbench.load(tmp_path, "trec")


# -------------------------------------------------------------------- metrics


def score(metric, prediction, answer, classes=()):
    return getattr(longbench_metrics, metric)(prediction, answer, list(classes))


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("The River Axe.", "river axe", 1),
        # Two of three words, two of two: precision 2/3, recall 1.
        ("the big river Axe", "River Axe", 0.8),
        ("axe axe", "axe", 2 / 3),  # words count as often as they stand there
        ("Thames", "Axe", 0),
        ("", "Axe", 0),
        ("a the", "Axe", 0),
    ],
)
def test_qa_f1(prediction, answer, expected):
    assert score("qa_f1", prediction, answer) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("the cat sat", "the cat sat", 1),
        # Common subsequence "the cat": precision 2/3, recall 2/4.
        ("the cat sat", "the cat lay down", 2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2)),
        ("dogs", "the cat", 0),
        ("", "the cat", 0),
        (" . ", "the cat", 0),
    ],
)
def test_rouge_l(prediction, answer, expected):
    pytest.importorskip("rouge", reason="pip install 'kivi-vllm[eval]'")
    assert score("rouge_l", prediction, answer) == pytest.approx(expected, abs=1e-6)


CLASSES = ["Food", "Date", "Other location", "location", "City"]


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("Type: Date", "Date", 1),
        ("Date or City", "Date", 1 / 2),
        ("date", "Date", 0),  # classes are compared as they are written
        ("Other location", "Other location", 1),  # 'location' is a part of the right one
        ("Other location", "location", 1 / 2),
        ("Food", "Date", 0),
    ],
)
def test_classification(prediction, answer, expected):
    assert score("classification", prediction, answer, CLASSES) == expected


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("\n    return x\nmore", "    return x", 1),
        ("# first a comment\n```\n    return x", "    return x", 1),
        ("# nothing else", "return x", 0),
        ("", "return x", 0),
        ("ab", "ac", 0.5),  # 2 * 1 / 4
        ("abc", "abd", 0.67),  # 2 * 2 / 6, rounded to a percent
    ],
)
def test_code_similarity(prediction, answer, expected):
    assert score("code_similarity", prediction, answer) == expected


@pytest.mark.parametrize(
    ("metric", "prediction", "answer", "expected"),
    [
        ("count", "7", "7", 1),
        ("count", "There are 7, or 8.", "7", 1 / 2),
        ("count", "17", "7", 0),
        ("count", "seven", "7", 0),
        ("retrieval", "Paragraph 12", "Paragraph 12", 1),
        ("retrieval", "12", "Paragraph 12", 1),
        ("retrieval", "Paragraph 12, 3 and 12", "Paragraph 12", 2 / 3),
        ("retrieval", "Paragraph 1", "Paragraph 12", 0),
    ],
)
def test_numbers(metric, prediction, answer, expected):
    assert score(metric, prediction, answer) == pytest.approx(expected)


def test_the_best_answer_counts():
    rows = longbench.load(DATA, "hotpotqa")[:1]
    items = longbench.items("hotpotqa", rows, Words(), 4000)
    (found,) = run(Parrot([" River Axe"]), items)
    assert found.scores == {"score": 1.0}  # against 'Axe' alone it would be 2/3


def test_only_the_first_line_counts_after_examples():
    rows = longbench.load(DATA, "trec")
    items = longbench.items("trec", rows, Words(), 4000)
    (found,) = run(Parrot(["\n\nDate\nQuestion: Who?\nType: City"]), items)
    assert found.scores == {"score": 1.0}


@pytest.mark.parametrize(("task", "chats"), [("hotpotqa", 1), ("trec", 0), ("lcc", 0)])
def test_the_chat_template_is_used_where_longbench_does(task, chats):
    class Chatting(Words):
        chatted = 0

        def chat(self, text):
            self.chatted += 1
            return self.encode(text)

    tokens = Chatting()
    longbench.items(task, longbench.load(DATA, task)[:1], tokens, 4000, chat=True)
    assert tokens.chatted == chats
