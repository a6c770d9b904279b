"""The workloads of benchmarks/serving, as arguments of `vllm bench serve`."""

from __future__ import annotations

import math
from collections.abc import Iterator
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

    Attributes:
        input_len: mean tokens of a long prompt; they spread by a seventh to both sides.
        output_len: tokens of an answer.
        prefixes: different shared prefixes.
        scale: multiplies all numbers of requests.
        max_model_len: of the server; contexts that do not fit are left out.

    """

    input_len: int
    output_len: int
    prefixes: int
    scale: float
    max_model_len: int

    def requests(self, full: int) -> int:
        """That many requests at the full scale; at least one."""
        return max(1, round(full * self.scale))


def saturating(name: str, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Arguments of `vllm bench serve`, by record, for one of `WORKLOADS`.

    The requests of `context` come one by one.
    """
    if name == "long":
        yield {
            "_benchmark_name": name,
            "num_prompts": sizes.requests(24),
            "dataset_name": "random",
            "random_input_len": sizes.input_len,
            "random_output_len": sizes.output_len,
            "random_range_ratio": {"input": 1 / 7, "output": 0.0},
        }
    elif name == "shared":
        yield {"_benchmark_name": name, **shared(sizes, 4)}
    elif name == "kivi":
        yield {
            "_benchmark_name": name,
            "num_prompts": sizes.requests(KIVI_BATCH),
            "dataset_name": "random",
            "random_input_len": KIVI_INPUT,
            "random_output_len": KIVI_OUTPUT,
            "random_range_ratio": {"input": KIVI_SPREAD, "output": KIVI_SPREAD},
        }
    elif name == "context":
        longest = sizes.max_model_len - CONTEXT_OUTPUT
        for exponent in range(9, 1 + int(math.log2(longest))):
            yield {
                "_benchmark_name": f"{name}-{1 << exponent}",
                "num_prompts": sizes.requests(2),
                "max_concurrency": 1,
                "dataset_name": "random",
                "random_input_len": 1 << exponent,
                "random_output_len": CONTEXT_OUTPUT,
            }
    else:
        raise ValueError(f"there is no workload {name!r}")


def shared(sizes: Sizes, per_prefix: int) -> dict[str, Any]:
    """Prompts of a shared prefix and a tail of their own, in random order."""
    return {
        # vLLM gives every prefix the same number of requests.
        "num_prompts": sizes.prefixes * sizes.requests(per_prefix),
        "dataset_name": "prefix_repetition",
        "prefix_repetition_prefix_len": sizes.input_len - SUFFIX,
        "prefix_repetition_suffix_len": SUFFIX,
        "prefix_repetition_num_prefixes": sizes.prefixes,
        "prefix_repetition_output_len": sizes.output_len,
    }


def rising(sizes: Sizes, rates: list[float]) -> Iterator[dict[str, Any]]:
    """The workload `shared` at several request rates, in requests a second (Poisson)."""
    for rate in rates:
        yield {"_benchmark_name": f"rate-{rate:.4g}", "request_rate": rate, **shared(sizes, 2)}
