"""What every operator takes: a step, a layer's caches, and what the model asks of attention."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from kivi_vllm.config import BLOCK_SIZE as B
from kivi_vllm.config import Estimate
from kivi_vllm.ops.format import PageFormat


@dataclass(frozen=True)
class Batch:
    """What the engine knows of a step, before a backend makes of it what its kernels take.

    Request r has the tokens `query_start_loc[r]` to `query_start_loc[r + 1]` of the step,
    which are its positions up to `seq_lens[r]`; none, where it is padding.

    Attributes:
        query_start_loc: [num_reqs + 1] int32 on the device.
        query_start_loc_cpu: the same on the host.
        seq_lens: [num_reqs] int32 on the device, tokens of each request after the step.
        seq_lens_cpu: the same on the host, exact for requests with more than `decode_len`
            tokens and not less for others; None: not known there.
        block_table: [>= num_reqs, max_blocks] int32 on the device, see `Step`.
        num_tokens: tokens of the step, or more.
        max_query_len: tokens of the longest request, or more.
        per_position, decode_len: see `Step`.
        last_visible: see `Step`; on the CPU.
        generated: [num_reqs] bool, of the requests whose tokens in this step all come after their
            prompts; None: it is not known of any. On a GPU, the same memory in every step.

    """

    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    seq_lens_cpu: torch.Tensor | None
    block_table: torch.Tensor
    num_tokens: int
    max_query_len: int
    per_position: bool
    decode_len: int
    last_visible: torch.Tensor | None = None
    generated: torch.Tensor | None = None


@dataclass(frozen=True)
class Row:
    """One request of a step: its tokens are `query[q0:q1]`, at positions a..b-1; a < b.

    `generated`: they are a decode's, of at most `decode_len` tokens, none of which is the
    prompt's. So each may choose what it reads (see `select`).
    """

    index: int
    q0: int
    q1: int
    a: int
    b: int
    generated: bool = False


@dataclass(frozen=True)
class Step:
    """What one step computes, shared by all layers of a model.

    Attributes:
        rows: the requests that have tokens in this step.
        block_table: [num_reqs, n]. With k pages in a block of the pool (see `LayerCache`), entry
            e is the one that holds blocks e * k to e * k + k - 1 of the request; 0, vLLM's null
            block: they have no pages. Those that no position of a step sees through a sliding
            window have none, or another request's.
        per_position: queries of all rows follow F(t) of their own position
            ("cached"); otherwise those of rows longer than `decode_len` take
            F(a) of the row's first ("exact").
        decode_len: longest row that counts as decode: 1 + draft tokens.
        last_visible: [num_tokens] int32, the last position that each token sees, where that is
            after its own: images whose tokens see each other (see `images`).

    """

    rows: list[Row]
    block_table: torch.Tensor
    per_position: bool = True
    decode_len: int = 1
    last_visible: torch.Tensor | None = None

    @classmethod
    def of(cls, batch: Batch) -> Step:
        """The step of a batch whose tensors are on the CPU."""
        starts, ends = batch.query_start_loc_cpu.tolist(), batch.seq_lens.tolist()
        made = [False] * len(ends) if batch.generated is None else batch.generated.tolist()
        rows = [
            Row(i, q0, q1, end - (q1 - q0), end, made[i] and q1 - q0 <= batch.decode_len)
            for i, (q0, q1, end) in enumerate(zip(starts, starts[1:], ends, strict=False))
            if q1 > q0
        ]
        return cls(
            rows, batch.block_table, batch.per_position, batch.decode_len, batch.last_visible
        )

    @functools.cached_property
    def row_array(self) -> torch.Tensor:
        """The rows as [n, 6] int64 on the CPU: index, q0, q1, a, b, generated."""
        rows = [(r.index, r.q0, r.q1, r.a, r.b, r.generated) for r in self.rows]
        return torch.tensor(rows, dtype=torch.int64).view(-1, 6)

    @functools.cached_property
    def longest_generated(self) -> int:
        """The largest position of a token that may choose what it reads; -1: there is none."""
        return max((row.b - 1 for row in self.rows if row.generated), default=-1)

    @functools.cached_property
    def num_tokens(self) -> int:
        """Tokens that the step's tensors must hold at least."""
        return max((row.q1 for row in self.rows), default=0)

    @functools.cached_property
    def completes_a_block(self) -> bool:
        """Whether `store_blocks` has anything to do."""
        return any(row.a // B != row.b // B for row in self.rows)

    @functools.cached_property
    def num_reqs(self) -> int:
        """Rows that the step's tables must have at least."""
        return 1 + max((row.index for row in self.rows), default=-1)


@dataclass(frozen=True)
class DeviceStep:
    """What one step computes, shared by all layers of a model.

    As `Step`, for operators that read nothing of it on the host: what was a list of rows is
    tensors on the device. What a launch must know (how many programs) comes from counts that
    the scheduler knows, and rows without tokens are skipped, so that a step can be captured
    into a CUDA graph and replayed.

    Attributes:
        query_start_loc, seq_lens, block_table: see `Batch`.
        num_decodes: leading requests that have at most `decode_len` tokens; at most one token,
            where there is `last_visible`: decodes see nothing after themselves.
        num_decode_tokens: tokens of the step that are theirs, or more.
        num_tokens: tokens of the step, or more.
        max_query_len: tokens of the longest request, or more.
        per_position, decode_len, last_visible: see `Step`.
        nothing_cached: requests after the decodes have all their tokens in this step.
        prefill_lens: tokens of each of those requests in this step.
        generated: see `Batch`.

    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    num_decodes: int
    num_decode_tokens: int
    num_tokens: int
    max_query_len: int
    per_position: bool = True
    decode_len: int = 1
    nothing_cached: bool = False
    prefill_lens: list[int] = field(default_factory=list)
    last_visible: torch.Tensor | None = None
    generated: torch.Tensor | None = None

    @property
    def num_reqs(self) -> int:
        """Requests, padding included."""
        return self.seq_lens.shape[0]

    @property
    def num_prefills(self) -> int:
        """Requests after the decodes."""
        return self.num_reqs - self.num_decodes

    @classmethod
    def of(cls, batch: Batch) -> DeviceStep:
        """The step of a batch: from counts on the host, and from tensors on the device."""
        starts = batch.query_start_loc_cpu
        lens = starts[1:] - starts[:-1]
        seen = batch.last_visible
        long = lens > (batch.decode_len if seen is None else 1)
        num_decodes = int(long.int().argmax()) if bool(long.any()) else len(lens)
        only_decodes = num_decodes == len(lens)
        prefills, ends = slice(num_decodes, len(lens)), batch.seq_lens_cpu
        return cls(
            query_start_loc=batch.query_start_loc,
            seq_lens=batch.seq_lens,
            block_table=batch.block_table,
            num_decodes=num_decodes,
            num_decode_tokens=batch.num_tokens if only_decodes else int(starts[num_decodes]),
            num_tokens=batch.num_tokens,
            max_query_len=batch.max_query_len,
            per_position=batch.per_position,
            decode_len=batch.decode_len,
            nothing_cached=not only_decodes
            and ends is not None
            and bool((ends[prefills] == lens[prefills]).all()),
            prefill_lens=lens[prefills].tolist(),
            last_visible=None if seen is None else seen.to(batch.query_start_loc.device),
            generated=batch.generated,
        )


@dataclass(frozen=True)
class Raw:
    """Pages of full-precision tokens with the table that finds them.

    Attributes:
        cache: [num_blocks, num_kv_heads, T, >= 2 * head_size], the model's dtype; K in
            [..., :D], V in [..., D:2D]. T, the tokens of a page, is 1 to 128, and at least
            `fmt.sink_tokens` where it holds these; rings, tails and sinks may differ in it.
        table: [num_reqs, max_pages] page ids.

    """

    cache: torch.Tensor
    table: torch.Tensor


@dataclass(frozen=True)
class LayerCache:
    """One layer's caches for one step.

    Attributes:
        fmt: the page format.
        pages: [num_blocks, k, num_kv_heads, page_bytes] uint8, of which the last dimension is
            dense: a block of the pool holds k pages of every head, for k blocks of a request.
        ring: the tokens of each request's current block, found by `residual.ring_entry` and
            `ring_slot`. Entries of tokens that no step needs any more hold anything.
        tails: one per T tokens of R, in order, all of the same T: entry j of a table finds (a
            part of) the last R tokens of block j. Those of a block whose entry is 0, vLLM's
            null block, are not kept.
        residual_length: R.
        sinks: with `fmt.sink_tokens`: entry 0 of a table finds the first tokens of the
            sequence, from its first whole block on; they are not kept where it is 0.
        native: what a compiled implementation keeps between the calls of a step.

    """

    fmt: PageFormat
    pages: torch.Tensor
    ring: Raw
    tails: tuple[Raw, ...] = ()
    residual_length: int = 0
    sinks: Raw | None = None
    native: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.pages.shape[2]

    @property
    def pages_per_block(self) -> int:
        """k: pages of a head in a block of the pool."""
        return self.pages.shape[1]

    @property
    def tail_tokens(self) -> int:
        """T of the tails; 0 if there are none."""
        return self.tails[0].cache.shape[2] if self.tails else 0


@dataclass(frozen=True)
class AttentionParams:
    """What the model asks of the attention besides Q, K and V.

    Attributes:
        scale: factor of q·k.
        logits_soft_cap: c > 0 replaces a score x by c * tanh(x / c); 0: none.
        alibi_slopes: [num_heads] fp32 or None; adds slope * (s - t).
        sliding_window: W > 0: position t sees t - W < s <= t; 0: all.
        chunk_size: C > 0, a multiple of the block size: position t sees no s before C * (t // C);
            0: all.
        token_budget: tokens of pages that a generated token reads (see `select`), a multiple of
            the block size; 0: all. It is the user's, and the layer's.
        estimate: what pages are chosen by: `"ranges"` or `"keys"` (see `select`).
        sink_logits: [num_heads] fp32 or None; each softmax of a head has one term more in its
            denominator, exp(logit), which has no value. (vLLM calls them `sinks`. They have
            nothing to do with the sinks of a cache, the first tokens of a sequence.)
        first_chunk: serves requests that have nothing cached, where a backend uses a
            library for them (`Operators.prepare` sets it).

    """

    scale: float
    logits_soft_cap: float = 0.0
    alibi_slopes: torch.Tensor | None = None
    sliding_window: int = 0
    sink_logits: torch.Tensor | None = None
    chunk_size: int = 0
    token_budget: int = 0
    estimate: Estimate = "ranges"
    first_chunk: Callable[..., None] | None = None

    def __post_init__(self) -> None:
        for name in ("chunk_size", "token_budget"):
            if (value := getattr(self, name)) % B:
                raise ValueError(f"{name} is {value}, but must be a multiple of {B}")


@dataclass(frozen=True)
class Layer:
    """The form of an attention layer, and the largest decode that it will meet.

    Attributes:
        num_heads, num_kv_heads, head_size: of the layer.
        dtype: of the model.
        max_rows: requests of a step.
        decode_len: tokens of a request that still is a decode.
        max_tokens: of a sequence.

    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    max_rows: int
    decode_len: int
    max_tokens: int
