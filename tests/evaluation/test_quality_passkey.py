"""Facts hidden in text."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.quality import passkey, texts
from kivi_vllm.cli.errors import UserError
from tests.evaluation.tokenizers import bytes_tokenizer

LENGTH = 1500


@pytest.fixture(params=[False, True], ids=["plain", "chat"])
def chat(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A piece of Python's manual: single characters are many tokens."""
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_text(texts.text("pydoc")[:20_000])
    return str(path)


@pytest.fixture
def model(tmp_path: Path, chat: bool) -> str:
    return bytes_tokenizer(tmp_path / "model", bos=True, chat=chat)


def test_cases(model: str, text: str, chat: bool) -> None:
    found = passkey.cases(text, model, LENGTH, 2, depths=(0.1, 0.5, 0.9))
    assert len(found) == 2 * 3 * 2
    tokenizer = texts.tokenizer(model)
    for case in found:
        size = len(case.prompt) + passkey.ANSWER_TOKENS
        assert LENGTH - 20 <= size <= LENGTH
        prompt = tokenizer.decode(case.prompt)
        assert prompt.count(case.key) == (2 if case.kind == "passkey" else 1)
        assert case.prompt.count(tokenizer.bos_token_id) == (2 if chat else 1)
        assert prompt.endswith("assistant: ") == chat
        at = prompt.index(case.key) / len(prompt)
        assert abs(at - case.depth) < 0.2
    assert len({tuple(case.prompt) for case in found}) == len(found)


def test_a_seed_decides(model: str, text: str) -> None:
    def made(**changes: object) -> list[passkey.Case]:
        arguments: dict = dict(depths=(0.5,), kinds=("passkey",), seed=3)
        return passkey.cases(text, model, LENGTH, 1, **{**arguments, **changes})

    assert made() == made()
    assert made()[0].key != made(seed=4)[0].key
    assert made(depths=(0.1, 0.5))[1] == made()[0], "a case does not depend on the others"


def test_the_key_is_not_in_the_text(tmp_path: Path, model: str) -> None:
    path = tmp_path / "text"
    path.write_text(" ".join(word for word in passkey.WORDS[:-1]) * 20)
    case = passkey.cases(str(path), model, LENGTH, 1, depths=(0.5,), kinds=("needle",))[0]
    assert case.key == passkey.WORDS[-1]


@pytest.mark.parametrize(
    ("kind", "key", "answer", "right"),
    [
        ("passkey", "12345", " 12345.", True),
        ("passkey", "12345", "It is 12,345", True),
        ("passkey", "12345", "112345", False),
        ("passkey", "12345", "54321 or 12345", False),
        ("passkey", "12345", "none", False),
        ("needle", "walnut", "The word is Walnut.", True),
        ("needle", "walnut", "walnuts", False),
        ("needle", "walnut", "", False),
    ],
)
def test_scores(kind: str, key: str, answer: str, right: bool) -> None:
    assert passkey.Case("t", 1, 0.5, kind, key, []).score(answer) is right


def test_prompts_without_room_are_refused(model: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no room"):
        passkey.cases(text, model, 300, 1)
    path = tmp_path / "short"
    path.write_text("short " * 50)
    with pytest.raises(UserError, match="has 300 tokens, less than a prompt of 1,500"):
        passkey.cases(str(path), model, LENGTH, 1)
