"""What the user chose: one frozen `KiviConfig`, parsed once and loudly.

The KV cache dtype's name fixes the bits; the options travel in vLLM's own
`--additional-config '{"kivi": {...}}'`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

BLOCK_SIZE = 128
"""Tokens per page block (`B` in the documentation)."""

HEAD_SIZES = (32, 64, 96, 128, 160, 192, 256, 512)
"""Channels of a head in pages, and in the kernels."""

PADDED_HEAD_SIZES = {80: 96, 112: 128}
"""Head sizes of models that take pages of a larger one, filled up with zeros."""

RAW_BITS = 0
"""Stands for "kept as the model's own dtype" in `k_bits` and `v_bits`."""


class CacheDtype(NamedTuple):
    """What a `--kv-cache-dtype` stands for.

    Attributes:
        k_bits, v_bits: bits per key and per value number, or `RAW_BITS`.
        group_size: tokens of a channel of K that share a range, under recipe "best".
        published: KIVI (arXiv 2402.02750) has it, so that there is a recipe "paper".

    """

    k_bits: int
    v_bits: int
    group_size: int
    published: bool = False


DTYPES: dict[str, CacheDtype] = {
    "kivi2": CacheDtype(2, 2, 16, published=True),
    "kivi_k3v2": CacheDtype(3, 2, 32),
    "kivi3": CacheDtype(3, 3, 32),
    "kivi_k4v3": CacheDtype(4, 3, 32),
    "kivi4": CacheDtype(4, 4, 32, published=True),
    # Diagnostic: keys and values verbatim in the same pages, so that a fault of
    # the plumbing can be told from an effect of the quantization. Saves nothing.
    "kivi_raw": CacheDtype(RAW_BITS, RAW_BITS, 32, published=True),
}
"""All values of `--kv-cache-dtype` that are ours."""

QUANTIZED_DTYPES = tuple(name for name, dtype in DTYPES.items() if dtype.k_bits != RAW_BITS)
"""Those that save memory: what users are offered."""

RECOMMENDED_DTYPE = "kivi_k3v2"
"""Where the user names none: in the demo."""

RENAMED_DTYPES = {"kivi_k4v2": "kivi_k4v3"}
"""Values that there were once, and what took their place. vLLM is told of them too, so that it is
we who refuse them."""

ACCEPTED_DTYPES = (*DTYPES, *RENAMED_DTYPES)

PAPER_GROUP_SIZES = (32, 64, 128)

PrefillMode = Literal["exact", "cached"]

SINK_TOKENS = (0, 4, 8, 16)

LEAST_TOKEN_BUDGET = 1024

FORMER_OPTIONS = ("rotate_values", "clip")

Recipe = Literal["best", "paper"]

Estimate = Literal["ranges", "keys"]

DEFAULT_RECIPE: Recipe = "best"


class KiviConfigError(ValueError):
    """A setting that the KIVI cache cannot serve; the message names the remedy."""


@dataclass(frozen=True)
class KiviConfig:
    """How keys and values are quantized, and what a query sees at full precision.

    Attributes:
        dtype: a key of `DTYPES`.
        recipe: `"best"`, or `"paper"`: KIVI as published.
        group_size: tokens of a channel of K that share a range (KIVI's G); of a paper page
            also channels of a token of V.
        sink_tokens: first tokens of a sequence that always stay at full precision,
            and out of the ranges and means of their page.
        residual_length: tokens before the current block that stay at full
            precision (KIVI's R), besides the current block itself.
        prefill: `"exact"`: the tokens of one prefill step see each other at full
            precision, as in the KIVI paper; `"cached"`: every position sees what
            it would see at decode, whatever the chunks.
        token_budget: tokens of pages that a generated token reads for each head of K and V
            (see `ops.select`); 0: all.
        dense_layers: the first layers of the model, where it reads all.
        estimate: what says which pages those are: the `"ranges"` of their keys, or a quarter
            of the channels of the `"keys"` themselves, which takes longer and misses less. None:
            the first of `estimates` that the devices have.
        hit_stride: most tokens between the places where prefix hits may end, in models whose
            layers differ; 0: as many as fill the blocks of the pool.

    """

    dtype: str
    recipe: Recipe
    group_size: int
    sink_tokens: int
    residual_length: int = 0
    prefill: PrefillMode = "exact"
    token_budget: int = 0
    dense_layers: int = 2
    estimate: Estimate | None = None
    hit_stride: int = 0

    def __post_init__(self) -> None:
        if self.dtype in RENAMED_DTYPES:
            raise KiviConfigError(
                f"--kv-cache-dtype {self.dtype} is no more; use {RENAMED_DTYPES[self.dtype]}, "
                "which takes fewer bytes and loses less"
            )
        _one_of("--kv-cache-dtype", self.dtype, tuple(DTYPES))
        _one_of("kivi.recipe", self.recipe, get_args(Recipe))
        _one_of("kivi.residual_length", self.residual_length, (0, 32, 64, 128))
        _one_of("kivi.prefill", self.prefill, get_args(PrefillMode))
        _one_of("kivi.sink_tokens", self.sink_tokens, SINK_TOKENS)
        stride = self.hit_stride
        if type(stride) is not int or stride < 0 or stride % BLOCK_SIZE:
            raise KiviConfigError(
                f"kivi.hit_stride is {stride!r}, but must be a multiple of {BLOCK_SIZE}, such "
                "as 512, or 0 (as many tokens as fill the blocks of the pool)"
            )
        if self.recipe == "paper":
            self._check_paper()
        else:
            self._check_best()
        self._check_selection()

    def _check_selection(self) -> None:
        budget, layers = self.token_budget, self.dense_layers
        if type(layers) is not int or layers < 0:
            raise KiviConfigError(
                f"kivi.dense_layers is {layers!r}, but must be a number of layers: 0 or more"
            )
        if self.estimate is not None:
            _one_of("kivi.estimate", self.estimate, get_args(Estimate))
        if type(budget) is int and budget == 0:
            return
        if type(budget) is not int or budget < LEAST_TOKEN_BUDGET or budget % BLOCK_SIZE:
            raise KiviConfigError(
                f"kivi.token_budget is {budget!r}, but must be 0 (a generated token reads all), or "
                f"a multiple of {BLOCK_SIZE} from {LEAST_TOKEN_BUDGET} on, for example 4096"
            )
        if self.k_bits == RAW_BITS:
            raise KiviConfigError(
                f"kivi.token_budget {budget} needs the ranges of quantized keys, which "
                f"{self.dtype} has not; leave it out, or use another --kv-cache-dtype"
            )
        if self.prefill == "cached":
            raise KiviConfigError(
                "kivi.prefill 'cached' promises that an answer depends on its prompt alone, but "
                f"kivi.token_budget {budget} makes that of a preempted request depend on when that "
                "was; leave one of the two out"
            )

        if self.estimate not in (None, *self.estimates):
            raise KiviConfigError(
                f"kivi.estimate {self.estimate!r} is there for pages of recipe 'best', not "
                f"{self.recipe!r}; leave one of the two out"
            )

    def _check_paper(self) -> None:
        if not DTYPES[self.dtype].published:
            published = [name for name in QUANTIZED_DTYPES if DTYPES[name].published]
            raise KiviConfigError(
                f"kivi.recipe 'paper' is KIVI as published, which has no {self.dtype}; leave "
                f"kivi.recipe out, or use --kv-cache-dtype {' or '.join(published)}"
            )
        _one_of("kivi.group_size under recipe 'paper'", self.group_size, PAPER_GROUP_SIZES)

    def _check_best(self) -> None:
        own = DTYPES[self.dtype]
        if self.group_size != own.group_size or type(self.group_size) is not int:
            sizes = ", ".join(f"{name} {DTYPES[name].group_size}" for name in QUANTIZED_DTYPES)
            paper = f"; recipe 'paper' takes {', '.join(map(str, PAPER_GROUP_SIZES))}"
            raise KiviConfigError(
                f"kivi.group_size is {self.group_size!r}, but under recipe 'best' a dtype has its "
                f"own ({sizes}): leave it out or make it {own.group_size}"
                + (paper if own.published else "")
            )
        if not self.sink_tokens and self.k_bits != RAW_BITS:
            other = ", or kivi.recipe to 'paper'" if own.published else ""
            raise KiviConfigError(
                "kivi.sink_tokens is 0, but recipe 'best' needs them: ranges of least squared "
                "error give up the first token's outliers, on which attention rests; set "
                f"kivi.sink_tokens to 4{other}"
            )

    @property
    def k_bits(self) -> int:
        """Bits per key number, or `RAW_BITS`."""
        return DTYPES[self.dtype].k_bits

    @property
    def v_bits(self) -> int:
        """Bits per value number, or `RAW_BITS`."""
        return DTYPES[self.dtype].v_bits

    @property
    def estimates(self) -> tuple[Estimate, ...]:
        """What its pages can be chosen by, the best one first."""
        return ("keys", "ranges") if self.recipe == "best" else ("ranges",)

    @property
    def has_better(self) -> bool:
        """Whether `RECOMMENDED_DTYPE` takes little more memory and loses much less."""
        return self.k_bits == 2 and self.recipe == "best"

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
                'for example: --additional-config \'{"kivi": {"residual_length": 32}}\''
            )
        known = [f.name for f in dataclasses.fields(cls) if f.name != "dtype"]
        for name in options:
            if name not in known:
                former = "recipe 'best' includes it, recipe 'paper' does not; "
                raise KiviConfigError(
                    f"unknown option {name!r} in the 'kivi' entry of --additional-config; "
                    f"{former if name in FORMER_OPTIONS else ''}the options are: {', '.join(known)}"
                )
        defaults = {"recipe": DEFAULT_RECIPE, "group_size": PAPER_GROUP_SIZES[0], "sink_tokens": 0}
        if dtype in QUANTIZED_DTYPES and options.get("recipe", DEFAULT_RECIPE) == "best":
            defaults |= {"group_size": DTYPES[dtype].group_size, "sink_tokens": 4}
        return cls(dtype, **{**defaults, **options})


def is_kivi(cache_dtype: object) -> bool:
    """Whether a `--kv-cache-dtype` value is one of ours."""
    return isinstance(cache_dtype, str) and cache_dtype in ACCEPTED_DTYPES


def _one_of(name: str, value: object, allowed: tuple) -> None:
    # `True == 1`, so compare types too: booleans are no numbers of tokens.
    if not any(value == a and type(value) is type(a) for a in allowed):
        raise KiviConfigError(
            f"{name} is {value!r}, but must be one of: {', '.join(map(str, allowed))}"
        )
