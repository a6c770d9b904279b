"""What the user chose: one frozen `KiviConfig`, parsed once and loudly.

The KV cache dtype's name fixes the bits; the options travel in vLLM's own
`--additional-config '{"kivi": {...}}'`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

BLOCK_SIZE = 128
"""Tokens per page block (`B` in the documentation)."""

HEAD_SIZES = (32, 64, 96, 128, 160, 192, 256)

RAW_BITS = 0
"""Stands for "kept as the model's own dtype" in `k_bits` and `v_bits`."""

DTYPES: dict[str, tuple[int, int]] = {
    "kivi2": (2, 2),
    "kivi_k4v2": (4, 2),
    "kivi4": (4, 4),
    # Diagnostic: keys and values verbatim in the same pages, so that a fault of
    # the plumbing can be told from an effect of the quantization. Saves nothing.
    "kivi_raw": (RAW_BITS, RAW_BITS),
}
"""`--kv-cache-dtype` names to (key bits, value bits)."""

QUANTIZED_DTYPES = tuple(name for name, bits in DTYPES.items() if bits != (RAW_BITS, RAW_BITS))
"""Those that save memory: what users are offered."""

RECOMMENDED_DTYPE = "kivi2"
"""Where the user names none: in the demo."""

GROUP_SIZES = (32, 64, 128)

PrefillMode = Literal["exact", "cached"]

SINK_TOKENS = (0, 4, 8, 16)

RECIPES: dict[str, dict[str, Any]] = {
    "paper": {"sink_tokens": 0, "rotate_values": False, "clip": False},
    "best": {"sink_tokens": 4, "rotate_values": True, "clip": True},
}
"""What a `recipe` sets, where an option of its own does not."""

DEFAULT_RECIPE = "best"


class KiviConfigError(ValueError):
    """A setting that the KIVI cache cannot serve; the message names the remedy."""


@dataclass(frozen=True)
class KiviConfig:
    """How keys and values are quantized, and what a query sees at full precision.

    Attributes:
        dtype: a key of `DTYPES`.
        group_size: numbers that share one scale and zero: tokens for keys,
            channels for values (KIVI's G).
        residual_length: tokens before the current block that stay at full
            precision (KIVI's R), besides the current block itself.
        prefill: `"exact"`: the tokens of one prefill step see each other at full
            precision, as in the KIVI paper; `"cached"`: every position sees what
            it would see at decode, whatever the chunks.
        sink_tokens: first tokens of a sequence that always stay at full precision,
            and out of the ranges of their groups.
        rotate_values: values are quantized after a Hadamard rotation of their
            channels, which the attention's output undoes.
        clip: ranges minimize the squared error instead of spanning their group.

    The defaults here are KIVI as published; users get a `recipe` (`from_options`).

    """

    dtype: str
    group_size: int = 32
    residual_length: int = 0
    prefill: PrefillMode = "exact"
    sink_tokens: int = 0
    rotate_values: bool = False
    clip: bool = False

    def __post_init__(self) -> None:
        _one_of("--kv-cache-dtype", self.dtype, tuple(DTYPES))
        _one_of("kivi.group_size", self.group_size, GROUP_SIZES)
        _one_of("kivi.residual_length", self.residual_length, (0, 32, 64, 128))
        _one_of("kivi.prefill", self.prefill, get_args(PrefillMode))
        _one_of("kivi.sink_tokens", self.sink_tokens, SINK_TOKENS)
        _one_of("kivi.rotate_values", self.rotate_values, (False, True))
        _one_of("kivi.clip", self.clip, (False, True))
        if self.clip and not self.sink_tokens:
            raise KiviConfigError(
                "kivi.clip needs kivi.sink_tokens: a range of least squared error gives up the "
                "first token's outliers, on which attention rests; set kivi.sink_tokens to 4, or "
                "kivi.clip to false"
            )
        for name in ("rotate_values", "clip"):
            if self.k_bits == RAW_BITS and getattr(self, name):
                raise KiviConfigError(
                    f"kivi.{name} changes how numbers are quantized, and {self.dtype} does not "
                    "quantize; leave it out, or use another --kv-cache-dtype"
                )

    @property
    def k_bits(self) -> int:
        """Bits per key number, or `RAW_BITS`."""
        return DTYPES[self.dtype][0]

    @property
    def v_bits(self) -> int:
        """Bits per value number, or `RAW_BITS`."""
        return DTYPES[self.dtype][1]

    @classmethod
    def from_options(cls, dtype: str, options: Any) -> KiviConfig:
        """Parse the `kivi` entry of `--additional-config`.

        Raises:
            KiviConfigError: an unknown option or a value out of range; the
                message lists the good ones.

        """
        if not isinstance(options, dict):
            raise KiviConfigError(
                f"the 'kivi' entry of --additional-config must be an object, got {options!r}; "
                'for example: --additional-config \'{"kivi": {"group_size": 32}}\''
            )
        known = ["recipe", *(f.name for f in dataclasses.fields(cls) if f.name != "dtype")]
        for name in options:
            if name not in known:
                raise KiviConfigError(
                    f"unknown option {name!r} in the 'kivi' entry of --additional-config; "
                    f"the options are: {', '.join(known)}"
                )
        options = dict(options)
        recipe = options.pop("recipe", DEFAULT_RECIPE)
        _one_of("kivi.recipe", recipe, tuple(RECIPES))
        if DTYPES.get(dtype) == (RAW_BITS, RAW_BITS):  # nothing is quantized
            recipe = "paper"
        return cls(dtype, **{**RECIPES[recipe], **options})


def is_kivi(cache_dtype: object) -> bool:
    """Whether a `--kv-cache-dtype` value is one of ours."""
    return isinstance(cache_dtype, str) and cache_dtype in DTYPES


def _one_of(name: str, value: object, allowed: tuple) -> None:
    # `True == 1`, so compare types too: booleans are no numbers of tokens.
    if not any(value == a and type(value) is type(a) for a in allowed):
        raise KiviConfigError(
            f"{name} is {value!r}, but must be one of: {', '.join(map(str, allowed))}"
        )
