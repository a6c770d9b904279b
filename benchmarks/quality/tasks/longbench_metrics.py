"""LongBench's metrics for English and code (THUDM/LongBench, `LongBench/metrics.py`).

All take a prediction, a right answer and the classes of the data set, and give 0 .. 1.
"""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter

from kivi_vllm.cli.errors import UserError

ARTICLES = re.compile(r"\b(a|an|the)\b")
DIGITS = re.compile(r"\d+")
NOT_CODE = ("`", "#", "//")


def normalized(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous white space (SQuAD's rule)."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(ARTICLES.sub(" ", bare).split())


def qa_f1(prediction: str, answer: str, classes: list[str]) -> float:
    """F1 over the normalized words."""
    words, right = normalized(prediction).split(), normalized(answer).split()
    same = sum((Counter(words) & Counter(right)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(words), same / len(right)
    return 2 * precision * recall / (precision + recall)


def rouge_l(prediction: str, answer: str, classes: list[str]) -> float:
    """ROUGE-L's F, of the package `rouge`: LongBench's, and not the same as `rouge-score`'s."""
    from rouge import Rouge  # `longbench.check_packages` has looked

    try:
        scores = Rouge(metrics=["rouge-l"]).get_scores([prediction], [answer], avg=True)
    except (ValueError, RecursionError):  # no words at all, or too many without a full stop
        return 0.0
    return float(scores["rouge-l"]["f"])


def classification(prediction: str, answer: str, classes: list[str]) -> float:
    """1 / (number of classes that the prediction names), if the right one is among them."""
    named = [name for name in classes if name in prediction]
    # As published: what is a part of the right class' name does not count. Removing from the list
    # that is being walked skips the next entry; scores are comparable only with that.
    for name in named:
        if name in answer and name != answer:
            named.remove(name)
    return 1 / len(named) if answer in named else 0.0


def code_similarity(prediction: str, answer: str, classes: list[str]) -> float:
    """Similarity of the first line of code, in steps of 0.01.

    `fuzzywuzzy.fuzz.ratio` as LongBench's requirements install it, without python-Levenshtein: it
    is this `difflib` then.
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((one for one in lines if not any(mark in one for mark in NOT_CODE)), "")
    if line == answer:
        return 1.0
    if not line or not answer:
        return 0.0
    return round(100 * difflib.SequenceMatcher(None, line, answer).ratio()) / 100


def count(prediction: str, answer: str, classes: list[str]) -> float:
    """The share of the prediction's numbers that are the right one."""
    numbers = DIGITS.findall(prediction)
    return numbers.count(str(answer)) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, answer: str, classes: list[str]) -> float:
    """As `count`, with the number of an answer `Paragraph 12`."""
    found = re.search(r"Paragraph (\d+)", answer)
    if found is None:
        raise UserError(
            f"passage_retrieval_en: the answer {answer!r} names no paragraph",
            "the file must be LongBench's own: answers are like 'Paragraph 12'",
        )
    return count(prediction, found[1], classes)
