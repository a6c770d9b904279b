"""Retrieval: a fact hidden in real text at some depth, asked for at the end of the prompt."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.quality import texts
from kivi_vllm.cli.errors import UserError

ANSWER_TOKENS = 24
"""Tokens of an answer."""

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)

INTRO = "Somewhere in the following text there is a sentence that does not belong to it. Find it."


KINDS = {
    "passkey": (
        "The pass key is {key}. Remember it: {key} is the pass key.",
        "What is the pass key mentioned in the text above? Answer with the number alone.",
        "The pass key is",
    ),
    "needle": (
        "The secret word that opens the garden gate is {key}.",
        "What is the secret word that opens the garden gate, according to the text above? "
        "Answer with the word alone.",
        "The secret word that opens the garden gate is",
    ),
}
"""What is hidden, how it is asked for, and how an answer begins where there is no chat."""

# fmt: off
WORDS = (
    "marzipan", "saxophone", "tungsten", "pelican", "bicycle", "walnut", "thermos", "kayak",
    "zeppelin", "velcro", "turbine", "papaya", "flamingo", "gearbox", "origami", "trombone",
    "penguin", "cactus", "yogurt", "lasagna", "helicopter", "tornado", "jigsaw", "moped",
    "avocado", "satellite", "domino", "polenta", "gazelle", "harmonica",
)
# fmt: on


@dataclass(frozen=True)
class Case:
    """One question.

    Attributes:
        text: in which text.
        length: tokens of prompt and answer together, at most, and nearly.
        depth: where the fact is, as a share of the text before it.
        kind: of `KINDS`: a number or a word is hidden.
        key: the right answer.
        prompt: token ids.

    """

    text: str
    length: int
    depth: float
    kind: str
    key: str
    prompt: list[int]

    def score(self, answer: str) -> bool:
        """Whether the answer's first number, or its words, are the key."""
        if self.kind == "passkey":
            found = re.search(r"\d[\d,]*", answer)
            return found is not None and found[0].replace(",", "") == self.key
        return re.search(rf"\b{self.key}\b", answer.lower()) is not None


def cases(
    text: str,
    model: str,
    length: int,
    repeats: int,
    depths: Sequence[float] = DEPTHS,
    kinds: Iterable[str] = KINDS,
    seed: int = 0,
) -> list[Case]:
    """Questions at every depth, `repeats` of each kind; the same for the same seed.

    Args:
        text: see `texts.text`.
        model: folder of the model whose tokenizer and chat template are used.
        length: tokens of prompt and answer together.
        repeats: questions of each kind and depth, each in another piece of the text.
        depths: shares of the piece that come before the fact.
        kinds: what is hidden.
        seed: of keys and pieces.

    Raises:
        UserError: the text is shorter than the prompt, or the prompt than its question.

    """
    tokenizer, ids = texts.tokenizer(model), texts.tokens(text, model)
    found = []
    for kind, depth, repeat in itertools.product(kinds, depths, range(repeats)):
        # By content: another choice of depths or kinds leaves a case as it is.
        rng = random.Random(f"{seed} {text} {length} {kind} {depth} {repeat}")
        room = length - ANSWER_TOKENS - len(_prompt(tokenizer, kind, "", depth, "00000"))
        if room < 16:
            raise UserError(
                f"{length} tokens have no room for a question and a text to search", "512 or more"
            )
        if room > len(ids):
            raise UserError(
                f"the text {text} has {len(ids):,} tokens, less than a prompt of {length:,}",
                "take shorter prompts or a longer text",
            )
        start = rng.randrange(len(ids) - room + 1)
        # Pieces of words at a cut may make other tokens, and so does the fact: less, if need be.
        for end in range(start + room, start, -4):
            piece = tokenizer.decode(ids[start:end])
            key = _key(kind, piece, rng)
            prompt = _prompt(tokenizer, kind, piece, depth, key)
            if len(prompt) + ANSWER_TOKENS <= length:
                found.append(Case(text, length, depth, kind, key, prompt))
                break
    return found


def _key(kind: str, piece: str, rng: random.Random) -> str:
    """A number or a word that is not in the text."""
    lower = piece.lower()
    while True:
        key = str(rng.randrange(10_000, 100_000)) if kind == "passkey" else rng.choice(WORDS)
        if key not in lower:
            return key


def _prompt(tokenizer: Any, kind: str, piece: str, depth: float, key: str) -> list[int]:
    at, (fact, question, start) = _between_sentences(piece, depth), KINDS[kind]
    content = f"{INTRO}\n\n{piece[:at]}{fact.format(key=key)} {piece[at:]}\n\n{question}"
    if not getattr(tokenizer, "chat_template", None):
        return list(tokenizer(f"{content}\n\n{start}", verbose=False).input_ids)
    message = [{"role": "user", "content": content}]
    chat = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    # The template has written the special tokens already.
    return list(tokenizer(chat, add_special_tokens=False, verbose=False).input_ids)


def _between_sentences(piece: str, depth: float) -> int:
    """The end of the sentence or line next to a depth; the depth itself if there is none near."""
    wanted = round(len(piece) * depth)
    ends = [m.end() for m in re.finditer(r"[.!?]\s+|\n+", piece)]
    near = min(ends, key=lambda end: abs(end - wanted), default=wanted)
    return near if abs(near - wanted) < max(200, len(piece) // 20) else wanted
