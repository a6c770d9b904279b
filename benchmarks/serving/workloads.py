"""The workloads of benchmarks/serving, as arguments of `vllm bench serve`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

SUFFIX = 256
"""Tokens of a prompt behind its shared prefix."""

KIVI_INPUT, KIVI_OUTPUT, KIVI_BATCH = 160, 338, 96
"""KIVI's throughput figure (section 4.2.3): ShareGPT's mean lengths, and a batch of its."""

KIVI_SPREAD = 0.5
"""Its lengths spread by this part to both sides: ShareGPT's do, and by more."""

KIVI_LONGEST = math.ceil((KIVI_INPUT + KIVI_OUTPUT) * (1 + KIVI_SPREAD))
"""Tokens of its longest sequence."""

CONTEXT_OUTPUT = 33
"""Answers of the section `context`: 32 decode steps behind the first token."""

SATURATING = ("long", "shared", "kivi")
"""Workloads of which all requests are there from the start: the cache's memory limits the batch."""

WORKLOADS = (*SATURATING, "context")


@dataclass(frozen=True)
class Sizes:
    """What the workloads are made of.

    Long prompts have `input_len` tokens on average and spread by a seventh to both sides, answers
    `output_len`; there are `prefixes` shared ones. `scale` multiplies all numbers of requests.
    Contexts that do not fit into the server's `max_model_len` are left out.
    """

    input_len: int
    output_len: int
    prefixes: int
    scale: float
    max_model_len: int

    def requests(self, full: int) -> int:
        """That many requests at the full scale; at least one."""
        return max(1, round(full * self.scale))

    def random(self, name: str, full: int, tokens: int, answer: int, **more: Any) -> dict[str, Any]:
        """Prompts of their own, of so many random tokens."""
        return {
            "_benchmark_name": name,
            "num_prompts": self.requests(full),
            "dataset_name": "random",
            "random_input_len": tokens,
            "random_output_len": answer,
            **more,
        }

    def shared(self, name: str, per_prefix: int, **more: Any) -> dict[str, Any]:
        """Prompts of a shared prefix and a tail of their own, in random order."""
        return {
            "_benchmark_name": name,
            # vLLM gives every prefix the same number of requests.
            "num_prompts": self.prefixes * self.requests(per_prefix),
            "dataset_name": "prefix_repetition",
            "prefix_repetition_prefix_len": self.input_len - SUFFIX,
            "prefix_repetition_suffix_len": SUFFIX,
            "prefix_repetition_num_prefixes": self.prefixes,
            "prefix_repetition_output_len": self.output_len,
            **more,
        }


def saturating(name: str, sizes: Sizes) -> list[dict[str, Any]]:
    """Arguments of `vllm bench serve`, by record, for one of `WORKLOADS`.

    The requests of `context` come one by one.
    """
    if name == "shared":
        return [sizes.shared(name, 4)]
    if name == "long":
        spread = {"input": 1 / 7, "output": 0.0}
        own = (24, sizes.input_len, sizes.output_len)
        return [sizes.random(name, *own, random_range_ratio=spread)]
    if name == "kivi":
        spread = dict.fromkeys(("input", "output"), KIVI_SPREAD)
        own = (KIVI_BATCH, KIVI_INPUT, KIVI_OUTPUT)
        return [sizes.random(name, *own, random_range_ratio=spread)]
    longest = int(math.log2(sizes.max_model_len - CONTEXT_OUTPUT))
    lengths = [1 << exponent for exponent in range(9, longest + 1)]
    return [sizes.random(f"{name}-{n}", 2, n, CONTEXT_OUTPUT, max_concurrency=1) for n in lengths]


def rising(sizes: Sizes, rates: list[float]) -> list[dict[str, Any]]:
    """The workload `shared` at several request rates, in requests a second (Poisson)."""
    return [sizes.shared(f"rate-{rate:.4g}", 2, request_rate=rate) for rate in rates]
