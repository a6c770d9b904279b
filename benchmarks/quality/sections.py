"""One row's engine through all sections of a quality comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.common.bars import bar
from benchmarks.quality import decoding, passkey, perplexity
from benchmarks.quality.engine import Engine
from benchmarks.quality.rows import CacheRow
from benchmarks.quality.texts import windows as cut
from kivi_vllm.cli.errors import UserError
from kivi_vllm.cli.progress import note, step

SECTIONS = ("perplexity", "passkey", "generation")
MORE_SECTIONS = ("decoding",)
"""On their own request only."""
WINDOWS, REPEATS, PROMPTS = 8, 8, 16
"""What a fraction of 1 is: windows of a text; questions of a kind and depth; prompts."""
PROMPT_TOKENS = ANSWER_TOKENS = 512
"""Of the long answers."""

Records = list[dict[str, Any]]
"""Of one kind in the JSON file: flat but for the intervals, each with its `cache` and `text`."""


@dataclass(frozen=True)
class Workload:
    """What every row computes; made once, before any engine starts.

    Attributes:
        lengths: contexts in tokens, ascending.
        windows: by text, for perplexity; empty without the section.
        cases: for passkey.
        prompts: by text, for generation.
        decoded: by text, for decoding.

    """

    lengths: tuple[int, ...]
    windows: dict[str, list[list[int]]] = field(default_factory=dict)
    cases: list[passkey.Case] = field(default_factory=list)
    prompts: dict[str, list[list[int]]] = field(default_factory=dict)
    decoded: dict[str, list[list[int]]] = field(default_factory=dict)

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths[-1], PROMPT_TOKENS + ANSWER_TOKENS if self.prompts else 0)

    @classmethod
    def make(
        cls,
        model: str,
        sections: Sequence[str],
        texts: Sequence[str],
        lengths: Sequence[int],
        kinds: Sequence[str],
        fraction: float,
        limit: int,
        seed: int,
    ) -> Workload:
        """Read the texts and cut them.

        Args:
            model: whose tokens.
            sections, texts, lengths, kinds: what is asked for; kinds are those of hidden facts.
            fraction: of `WINDOWS`, `REPEATS` and `PROMPTS`, one at least.
            limit: the longest context of the model.
            seed: of the hidden facts.

        Raises:
            UserError: a context does not fit into the model or a text, or has no halves worth
                measuring.

        """
        if (shortest := min(lengths)) < 16:
            raise UserError(f"--lengths {shortest}: a context has at least 16 tokens", "1024")
        least = decoding.DECODED + 16
        if "decoding" in sections and shortest < least:
            raise UserError(
                f"--lengths {shortest}: {decoding.DECODED} tokens are decoded behind a prompt",
                f"lengths of {least} and more",
            )
        if (longest := max(lengths)) > limit:
            raise UserError(
                f"--lengths {longest}: the model's limit is {limit} tokens",
                f"lengths up to {limit}, or a model with a longer context",
            )
        if "generation" in sections and limit < (need := PROMPT_TOKENS + ANSWER_TOKENS):
            raise UserError(
                f"the generation section needs {need} tokens, this model has {limit}",
                "--section perplexity --section passkey",
            )
        windows, repeats, prompts = (
            max(1, round(whole * fraction)) for whole in (WINDOWS, REPEATS, PROMPTS)
        )
        work = cls(tuple(sorted(set(lengths))))
        for name in texts:
            if "perplexity" in sections:
                work.windows[name] = cut(name, model, work.lengths[-1], windows)
            if "decoding" in sections:
                work.decoded[name] = cut(name, model, work.lengths[-1], windows)
            for size in work.lengths if "passkey" in sections else ():
                work.cases.extend(passkey.cases(name, model, size, repeats, kinds=kinds, seed=seed))
            if "generation" in sections:
                work.prompts[name] = cut(name, model, PROMPT_TOKENS, prompts)
        return work


def measure(
    row: CacheRow, arguments: dict[str, Any], work: Workload, reference: dict[str, Any]
) -> dict[str, Records]:
    """Start a row's engine and take it through the sections.

    Args:
        row: to measure.
        arguments: of its engine.
        work: what to compute.
        reference: what rows are compared with; filled by the first one, empty until then.

    Returns:
        Records by section, and the row's own (`caches`).

    """
    with step(f"{row.name}: starting") as update:
        engine = Engine(row, arguments, update)
    with engine:
        found: dict[str, Records] = {"caches": [{**asdict(row), **engine.facts}]}
        if work.windows and row.selects:
            note(f"  {row.name} selects nothing in the perplexity section: see decoding")
        elif work.windows:
            found["perplexity"] = _perplexity(engine, work, reference)
        if row.kind != "vllm" and (work.cases or work.prompts or work.decoded):
            note(f"  {row.name} is for the perplexity section only")
            return found
        if work.cases:
            found["passkey"] = _passkey(engine, work.cases)
        if work.decoded:
            found["decoding"] = _decoding(engine, work, reference)
        if work.prompts:
            found["generation"] = _generation(engine, work.prompts, reference)
    return found


def _perplexity(engine: Engine, work: Workload, reference: dict[str, Any]) -> Records:
    name, count = engine.row.name, sum(map(len, work.windows.values()))
    with bar(f"{name}: windows of {work.lengths[-1]:,} tokens", count) as done:
        first = reference.get("states")
        states, records = perplexity.measure(engine, work.windows, work.lengths, first, done)
    reference.setdefault("states", states)
    return [{"cache": name, **record} for record in records]


def _decoding(engine: Engine, work: Workload, reference: dict[str, Any]) -> Records:
    name, base = engine.row.name, reference.setdefault("decoded", {})
    count = len(work.lengths) * sum(map(len, work.decoded.values()))
    with bar(f"{name}: {decoding.DECODED} decoded tokens of windows", count) as done:
        records = decoding.measure(engine, work.decoded, work.lengths, base, done)
    return [{"cache": name, **record} for record in records]


def _passkey(engine: Engine, cases: list[passkey.Case]) -> Records:
    frame = pd.DataFrame(cases)
    frame.insert(0, "cache", engine.row.name)
    with bar(f"{engine.row.name}: hidden facts", len(cases)) as done:
        answers = engine.generate(list(frame.pop("prompt")), passkey.ANSWER_TOKENS, on_done=done)
    frame["answer"] = [answer.text for answer in answers]
    frame["correct"] = list(map(passkey.Case.score, cases, frame["answer"]))
    return frame.to_dict("records")


def _generation(
    engine: Engine, prompts: dict[str, list[list[int]]], reference: dict[str, Any]
) -> Records:
    name, records = engine.row.name, []
    everything = [prompt for mine in prompts.values() for prompt in mine]
    with bar(f"{name}: answers of {ANSWER_TOKENS} tokens", len(everything)) as done:
        answers = iter(engine.generate(everything, ANSWER_TOKENS, on_done=done, ignore_eos=True))
    for text, mine in prompts.items():
        tokens = [next(answers).token_ids for _ in mine]
        figures = compare_answers(reference.setdefault(f"answers {text}", tokens), tokens)
        records.append({"cache": name, "text": text, **figures})
    return records


def compare_answers(
    reference: Sequence[Sequence[int]], mine: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Compare answers of the same lengths to the same prompts, token by token.

    Returns:
        `prompts`, how many; `tokens` of each answer; by prompt `first_divergence`, the tokens
        before the first that differs (`tokens` if none does), and `agreement`, the share of places
        with the same token; `median_divergence`, `mean_agreement`, and how many are `identical`.

    """
    same = np.equal(reference, mine)  # [prompts, tokens]
    first = np.where(same.all(1), same.shape[1], same.argmin(1))
    return dict(
        prompts=same.shape[0],
        tokens=same.shape[1],
        first_divergence=first.tolist(),
        agreement=same.mean(1).tolist(),
        median_divergence=float(np.median(first)),
        mean_agreement=float(same.mean()),
        identical=int(same.all(1).sum()),
    )
