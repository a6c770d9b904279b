"""What is compared: one KV cache dtype with its options, as a user writes it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from benchmarks.common.machine import version_of
from kivi_vllm.cli.errors import UserError
from kivi_vllm.config import DTYPES, KiviConfig, KiviConfigError, is_kivi

TRANSFORMERS_BITS = {"kv2": 2, "kv4": 4}
"""Names of `transformers:` rows to the bits of its `QuantizedCache`."""

TRANSFORMERS_OPTIONS = {
    "backend": ("quanto", "hqq"),
    "group_size": (32, 64, 128),
    "residual_length": (32, 64, 128, 256),
}
DISTRIBUTIONS = {"quanto": "optimum-quanto", "hqq": "hqq"}
"""Backends to what has to be installed for them."""

EXAMPLE = "for example auto, fp8, kivi2:residual_length=32, simulated:kivi2, transformers:kv2"

HISTORY_CHUNK = 128
"""Tokens of a step, see `CacheRow.chunk`."""


@dataclass(frozen=True)
class CacheRow:
    """One row of a comparison.

    Attributes:
        name: as the user wrote it.
        dtype: a `--kv-cache-dtype` of vLLM, ours among them; `kv2` or `kv4` for `transformers`.
        options: of the dtype: the `kivi` entry of `--additional-config`.
        kind: who computes: `vllm`; `simulated`, the rule of the KIVI dtypes in plain PyTorch inside
            transformers' model; or `transformers`, that library's own quantized cache.

    """

    name: str
    dtype: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    kind: str = "vllm"

    @classmethod
    def parse(cls, text: str) -> CacheRow:
        """Read `[simulated:|transformers:]dtype[:option=value,option=value]`.

        Raises:
            UserError: no such dtype or option; the message lists the good ones.

        """
        name = text.strip()
        kind, _, rest = name.partition(":")
        if kind not in ("simulated", "transformers"):
            kind, rest = "vllm", name
        dtype, _, listed = rest.partition(":")
        row = cls(name, dtype, _options(name, listed), kind)
        if mistake := row._mistake():
            raise UserError(f"--cache {name}: {mistake[0]}", mistake[1])
        return row

    @property
    def is_kivi(self) -> bool:
        """Whether the dtype is one of ours, whoever computes."""
        return self.kind != "transformers" and is_kivi(self.dtype)

    @property
    def selects(self) -> bool:
        """Whether generated tokens choose what they read."""
        return self.is_kivi and bool(self.options.get("token_budget"))

    @property
    def chunk(self) -> int | None:
        """Tokens of a step; None for vLLM's choice.

        vLLM's attention takes earlier steps' keys and values from the cache, and of a step's own as
        each backend likes: with small steps nearly everything is history. It makes no difference to
        the KIVI dtypes with `prefill=cached`, nor where the cache keeps what it is given (`auto`).
        """
        exact = self.dtype == "auto" or self.is_kivi or self.kind != "vllm"
        return None if exact else HISTORY_CHUNK

    @property
    def missing(self) -> str | None:
        """What has to be installed for the row, as a command; None if nothing."""
        if self.kind != "transformers":
            return None
        needed = DISTRIBUTIONS[self.options.get("backend", "quanto")]
        return f"pip install {needed}" if version_of(needed) == "not installed" else None

    def _mistake(self) -> tuple[str, str] | None:
        """What is wrong with the row, and the remedy."""
        ours = f"one of: {', '.join(DTYPES)}"
        if self.kind == "transformers":
            if self.dtype not in TRANSFORMERS_BITS:
                names = ", ".join(f"transformers:{name}" for name in TRANSFORMERS_BITS)
                return f"there is no transformers row {self.dtype!r}", f"one of: {names}"
            for name, value in self.options.items():
                if value not in TRANSFORMERS_OPTIONS.get(name, ()):
                    known = TRANSFORMERS_OPTIONS.items()
                    good = "; ".join(f"{k}={'|'.join(map(str, v))}" for k, v in known)
                    return f"bad option {name}={value}", good
        elif self.selects and self.kind == "simulated":
            return "simulations compute prompts alone, which select nothing", EXAMPLE
        elif self.is_kivi:
            try:
                KiviConfig.from_options(self.dtype, self.options)
            except KiviConfigError as error:
                return str(error), EXAMPLE
        elif self.kind == "simulated":
            return "only the KIVI dtypes can be simulated", ours
        # vLLM refuses what it does not know; it has none of these.
        elif not self.dtype or self.dtype.startswith("kivi"):
            return f"there is no cache dtype {self.dtype!r}", f"one of vLLM's, or {ours}"
        elif self.options:
            return f"{self.dtype} has no options; only the KIVI dtypes do", EXAMPLE
        return None


def _options(name: str, listed: str) -> dict[str, Any]:
    """The options in `a=1,b=true,c=word`."""
    options: dict[str, Any] = {}
    for part in listed.split(",") if listed else []:
        key, equals, value = (word.strip() for word in part.partition("="))
        if not (key and equals and value):
            raise UserError(f"--cache {name}: {part!r} is not option=value", EXAMPLE)
        if key in options:
            raise UserError(f"--cache {name}: the option {key} is given twice", EXAMPLE)
        try:
            options[key] = json.loads(value.lower())
        except ValueError:  # no number and no boolean, but a word
            options[key] = value
    return options
