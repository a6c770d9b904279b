"""GSM8K, pass key and PG-19: loaders on files of the real schemas, prompts, scores."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.quality.metrics import TokenFigures
from benchmarks.quality.tasks import gsm8k, passkey, pg19
from benchmarks.quality.tasks.data import DataSet, read_jsonl
from benchmarks.quality.tasks.items import Item, fitting_length, mean, means, run
from kivi_vllm.cli.errors import UserError

DATA = Path(__file__).with_name("data")


class Words:
    """A tokenizer of words and line breaks, with a token that begins every text."""

    positions = 4096

    def __init__(self) -> None:
        self.known: dict[str, int] = {"<s>": 0}

    def encode(self, text: str) -> list[int]:
        words = text.replace("\n", " \n ").replace("  ", " ").split(" ")
        return [0] + [self.known.setdefault(word, len(self.known)) for word in words if word]

    def decode(self, ids: Sequence[int]) -> str:
        names = list(self.known)
        return " ".join(names[i] for i in ids if i)


class Parrot:
    """An engine that says what it is told, and remembers what it was asked."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = list(texts)
        self.asked: list[tuple] = []

    def generate(self, prompts, max_tokens, stop=None, on_done=None):
        self.asked.append((list(prompts), max_tokens, stop))
        found = [SimpleNamespace(text=self.texts.pop(0)) for _ in prompts]
        for n in range(len(prompts)):
            on_done(n + 1)
        return found


def item(task="t", prompt=(1, 2), max_tokens=3, right="x", stop=()):
    scores = {"score": lambda text: float(text == right)}
    return Item(task, "0", list(prompt), max_tokens, [right], scores, stop)


# ---------------------------------------------------------------------- GSM8K


def test_gsm8k_loads_the_published_schema():
    problems = gsm8k.load(DATA / "gsm8k", "train")
    assert len(problems) == 3
    assert problems[0].question.startswith("Mia has 3 bags")
    assert problems[2].answer.endswith("#### 180")


def test_gsm8k_prompt():
    shots = [gsm8k.Problem("Q1?", "Reason.\n#### 3"), gsm8k.Problem("Q2?", "#### 4")]
    assert gsm8k.prompt(shots, "Q3?") == (
        "Question: Q1?\nAnswer: Reason.\n#### 3\n\n"
        "Question: Q2?\nAnswer: #### 4\n\n"
        "Question: Q3?\nAnswer:"
    )


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        (" 3*4=<<3*4=12>>12 marbles.\n#### 12", "12", "12"),
        ("#### 1,250", "1250", "1250"),
        ("#### -5", "-5", "-5"),
        ("so it is $1,250.50.", None, "1250.50"),
        ("#### 7\nNo: 8 or 9", "7", "9"),
        ("The answer is 42.", None, "42"),
        ("#### $30", None, "30"),  # lm-evaluation-harness' strict pattern takes no dollar sign
        ("I do not know", None, None),
    ],
)
def test_gsm8k_answers(text, strict, flexible):
    assert (gsm8k.strict(text), gsm8k.flexible(text)) == (strict, flexible)


def test_gsm8k_items_are_scored():
    items = gsm8k.items(
        gsm8k.load(DATA / "gsm8k", "test"), gsm8k.load(DATA / "gsm8k", "train")[:2], Words().encode
    )
    assert [one.expected for one in items] == [["1250"], ["-5"]]
    assert all(one.max_tokens == 256 and "Question:" in one.stop for one in items)
    answers = run(Parrot([" 1000+250=1250.\n#### 1250", " It is -5 degrees."]), items)
    assert [one.scores for one in answers] == [
        {"strict": 1.0, "flexible": 1.0},
        {"strict": 0.0, "flexible": 1.0},
    ]
    table = means(answers)["gsm8k"]
    assert (table["strict"].mean, table["flexible"].mean) == (50.0, 100.0)


def test_gsm8k_refuses_another_file(tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "?", "answer": "12"}) + "\n")
    with pytest.raises(UserError, match=r"problem 1.*####"):
        gsm8k.load(tmp_path, "test")


# ----------------------------------------------------------------------- data


def test_missing_data_says_where_to_put_it(tmp_path):
    with pytest.raises(UserError) as caught:
        gsm8k.load(tmp_path, "train")
    assert str(tmp_path / "train.jsonl") in str(caught.value)
    assert "openai/grade-school-math" in caught.value.remedy
    assert "--download" in caught.value.remedy


def test_data_lies_in_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("KIVI_VLLM_CACHE", str(tmp_path))
    assert gsm8k.DATA.folder(None) == tmp_path.resolve() / "data" / "gsm8k"
    assert gsm8k.DATA.folder(Path("here")) == Path("here")


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "line 2, is no JSON"),
        ("[]", "no JSON object"),
        ("{}", "has no 'a'"),
        ('{"a": 1}', "int"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, what):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": "good"}\n' + line + "\n")
    with pytest.raises(UserError, match=what):
        read_jsonl(path, {"a": str})


def test_a_failed_download_says_what_to_do(tmp_path):
    def unreachable(folder: Path) -> None:
        raise ConnectionError("no route\nto host")

    data = DataSet("things", "things", "the things", unreachable)
    with pytest.raises(UserError, match=r"ConnectionError: no route$") as caught:
        data.fetch(tmp_path / "new")
    assert str(tmp_path / "new") in caught.value.remedy


# ---------------------------------------------------------------------- items


def test_answers_keep_the_order_of_the_items():
    items = [item(max_tokens=3, right="a"), item(max_tokens=5, right="c"), item(right="b")]
    engine = Parrot(["a", "b", "c"])  # the first and the third item go together
    seen: list[int] = []
    answers = run(engine, items, seen.append)
    assert [one.text for one in answers] == ["a", "c", "b"]
    assert [one.scores["score"] for one in answers] == [1, 1, 1]
    assert [asked[1] for asked in engine.asked] == [3, 5]
    assert seen == [1, 2, 3]


def test_mean_and_its_error():
    one = mean([1.0, 0.0, 1.0, 1.0])
    # Variance of the sample 0.25, of the mean 0.0625.
    assert (one.mean, one.error, one.count) == (75.0, 25.0, 4)
    assert mean([1.0]).error is None


@pytest.mark.parametrize(
    ("given", "model", "expected"),
    [(None, 100, 13), (64, 100, 64), (13, 100, 13), (None, None, 13), (64, 10, 64)],
)
def test_the_length_is_what_is_needed(given, model, expected):
    assert fitting_length([item(), item(prompt=range(10))], given, model) == expected


@pytest.mark.parametrize(
    ("given", "model", "remedy"),
    [
        (12, 100, "--max-model-len 13"),
        (12, 12, "a model with a longer context"),
        (None, 12, "a model with a longer context"),
    ],
)
def test_too_long_is_an_error_with_a_remedy(given, model, remedy):
    with pytest.raises(UserError, match="10 tokens and up to 3") as caught:
        fitting_length([item(), item(prompt=range(10))], given, model)
    assert remedy in caught.value.remedy


# ------------------------------------------------------------------- pass key


def test_passkey_prompt():
    assert passkey.prompt(12345, 1, 2).split("\n") == [
        passkey.TASK,
        passkey.FILLER,
        "The pass key is 12345. Remember it. 12345 is the pass key.",
        passkey.FILLER,
        passkey.FILLER,
        "What is the pass key? The pass key is",
    ]


@pytest.mark.parametrize("length", [150, 1000, 1019, 1020, 1021])
def test_passkey_prompts_have_the_length(length):
    tokens = Words()
    items = passkey.items([length], 4, tokens)
    line = len(tokens.encode(passkey.FILLER)) - 1 + 1  # its words and a line break
    for one in items:
        assert length - line < len(one.prompt) <= length
    assert [one.facts["depth"] for one in items] == [25, 50, 75, 100]
    assert len({tuple(one.expected) for one in items}) == 4


def test_passkey_depths_are_where_they_say():
    tokens = Words()
    for one in passkey.items([2000], 5, tokens):
        text = tokens.decode(one.prompt)
        at = text.index(one.expected[0]) / len(text)
        assert abs(100 * at - one.facts["depth"]) < 6


def test_passkey_too_short():
    with pytest.raises(UserError, match="--length 20"):
        passkey.items([20], 1, Words())


@pytest.mark.parametrize(
    ("text", "score"),
    [(" 12345. The grass", 1), ("12345", 1), (" 1234", 0), (" 99 or 12345", 0), ("", 0)],
)
def test_passkey_scores(text, score):
    assert passkey.scorer("12345")(text) == score


def test_kivis_passkey_file():
    tokens = Words()
    (one,) = passkey.read(DATA / "passkey_examples.jsonl", tokens)
    assert one.expected == ["74509"]
    assert tokens.decode(one.prompt).endswith("What is the pass key? The pass key is")
    with pytest.raises(UserError, match="no such file"):
        passkey.read(DATA / "nothing.jsonl", tokens)


# ---------------------------------------------------------------------- PG-19


def test_pg19_loads_the_published_folder():
    books = pg19.load(DATA / "pg19", limit=5)
    assert [one.name for one in books] == ["The Lamp, and Other Tales", "The Lane"]
    assert books[0].text.startswith("THE LAMP")
    assert [one.name for one in pg19.load(DATA / "pg19", limit=1)] == ["The Lamp, and Other Tales"]
    # A folder of texts alone will do.
    assert [one.name for one in pg19.load(DATA / "pg19" / "test", limit=5)] == ["10146", "2544"]


def test_pg19_missing(tmp_path):
    with pytest.raises(UserError, match=r"test/\*\.txt"):
        pg19.load(tmp_path, 1)


def test_pg19_windows_begin_with_the_book():
    tokens = Words()
    books = pg19.load(DATA / "pg19", limit=2)
    found = pg19.windows(books, 20, tokens)
    assert [len(one) for one in found] == [20, 20]
    assert found[0] == tokens.encode(books[0].text)[:20]
    with pytest.raises(UserError, match=r"The Lane has .* less than --length 200"):
        pg19.windows(books, 200, tokens)


def test_pg19_figures_by_hand():
    # Nine predictions of a book of ten tokens: surprise 1 in the first half, 3 in the second.
    nll = np.array([1.0] * 5 + [3.0] * 4)
    book = TokenFigures(np.ones(9), nll, kl=np.full(9, 0.5), agree=np.arange(9) < 6)
    five, ten = pg19.figures([book, book], [5, 10])
    # The first five tokens: four predictions, at positions 0 to 3.
    assert (five.whole.tokens, five.whole.perplexity) == (8, pytest.approx(math.e))
    assert (five.tail.tokens, five.tail.perplexity) == (4, pytest.approx(math.e))
    assert ten.whole.tokens == 18
    assert ten.whole.perplexity == pytest.approx(math.exp((5 * 1 + 4 * 3) / 9))
    assert ten.whole.ratio.value == pytest.approx(math.exp(8 / 9))
    assert ten.tail.perplexity == pytest.approx(math.exp(3))
    assert ten.whole.kl.value == pytest.approx(0.5)
    assert ten.whole.top1.value == pytest.approx(6 / 9)
