"""What is compared: one KV cache dtype with its options, as a user writes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from kivi_vllm.cli.errors import UserError
from kivi_vllm.config import DTYPES, KiviConfig, KiviConfigError, is_kivi

Kind = Literal["vllm", "simulated", "transformers"]

TRANSFORMERS_BITS = {"kv2": 2, "kv4": 4}
"""Names of `transformers:` rows to the bits of its `QuantizedCache`."""

TRANSFORMERS_OPTIONS = {
    "backend": ("quanto", "hqq"),
    "group_size": (32, 64, 128),
    "residual_length": (32, 64, 128, 256),
}

EXAMPLE = "for example auto, fp8, kivi2:residual_length=32, simulated:kivi2, transformers:kv2"


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
    kind: Kind = "vllm"

    @classmethod
    def parse(cls, text: str) -> CacheRow:
        """Read `[simulated:|transformers:]dtype[:option=value,option=value]`.

        Raises:
            UserError: no such dtype or option; the message lists the good ones.

        """
        name = text.strip()
        kind: Kind = "vllm"
        rest = name
        for prefix in get_args(Kind)[1:]:
            if rest.startswith(prefix + ":"):
                kind, rest = prefix, rest[len(prefix) + 1 :]
        dtype, _, listed = rest.partition(":")
        row = cls(name, dtype, _options(name, listed), kind)
        row._check()
        return row

    @property
    def is_kivi(self) -> bool:
        """Whether the dtype is one of ours, whoever computes."""
        return self.kind != "transformers" and is_kivi(self.dtype)

    def _check(self) -> None:
        if self.kind == "transformers":
            _check_transformers(self)
        elif self.is_kivi:
            try:
                KiviConfig.from_options(self.dtype, self.options)
            except KiviConfigError as error:
                raise UserError(f"--cache {self.name}: {error}", EXAMPLE) from None
        elif self.kind == "simulated":
            raise UserError(
                f"--cache {self.name}: only the KIVI dtypes can be simulated",
                f"one of: {', '.join(DTYPES)}",
            )
        else:
            # vLLM refuses what it does not know; it has none of these.
            if not self.dtype or self.dtype.startswith("kivi"):
                raise UserError(
                    f"--cache {self.name}: there is no cache dtype {self.dtype!r}",
                    f"one of vLLM's, or one of: {', '.join(DTYPES)}",
                )
            if self.options:
                raise UserError(
                    f"--cache {self.name}: {self.dtype} has no options; only the KIVI dtypes do",
                    EXAMPLE,
                )


def _check_transformers(row: CacheRow) -> None:
    if row.dtype not in TRANSFORMERS_BITS:
        raise UserError(
            f"--cache {row.name}: there is no transformers row {row.dtype!r}",
            f"one of: {', '.join(f'transformers:{name}' for name in TRANSFORMERS_BITS)}",
        )
    for name, value in row.options.items():
        good: tuple = TRANSFORMERS_OPTIONS.get(name, ())
        if value not in good:
            options = "; ".join(
                f"{k}={'|'.join(map(str, v))}" for k, v in TRANSFORMERS_OPTIONS.items()
            )
            raise UserError(f"--cache {row.name}: bad option {name}={value}", options)


def _options(name: str, listed: str) -> dict[str, Any]:
    """The options in `a=1,b=true,c=word`."""
    options: dict[str, Any] = {}
    for part in listed.split(",") if listed else []:
        key, equals, value = (word.strip() for word in part.partition("="))
        if not (key and equals and value):
            raise UserError(f"--cache {name}: {part!r} is not option=value", EXAMPLE)
        if key in options:
            raise UserError(f"--cache {name}: the option {key} is given twice", EXAMPLE)
        options[key] = _value(value)
    return options


def _value(text: str) -> Any:
    """An int, a float, a boolean, or the text itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text
