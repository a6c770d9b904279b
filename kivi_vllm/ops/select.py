"""Which pages a generated token reads: Quest (arXiv 2406.10774) over what pages hold anyway.

With `token_budget` = M > 0, a **generated** token at position t reads of its whole pages, those
below F(t) that it sees (see `residual`), only the M / B best for its head of K and V; of these
always the newest one. Sinks, full-precision tokens and the page that F(t) cuts it reads always, and
a prompt's tokens read all.

A page's ranges bound its keys. With the range [zero, zero + top * scale] of a channel c and group
g of keys, and h the query heads of a head of K and V, a group's estimate of its best score is

    x[h, g] = sum_c q[c] * middle[g, c] + RADIUS * sum_c |q[c]| * half[g, c],

for middle = zero + half and half = top * scale / 2. (RADIUS 1 is Quest's own bound. It is loose:
half of it ranks pages better, docs/selection.md.) A page weighs as much as all softmaxes say,

    w[page] = sum_h sum_(g in page) softmax_g(x[h, :]),

and of pages that weigh the same, the older one is the better. Estimates that are not finite count
as minus infinity.

With the estimate "keys" a page is a single group, of which the best score is that of its keys, in
a quarter of the channels: x[h, page] is the largest, over the tokens s that are read from the page,
of the sum of q[c] * key[s, c] over the `estimate_channels` for which the head of K and V has the
largest sum_h (q[c] * step[c])^2, steps being those of the newest page, in groups of `QUAD`
channels. It costs more, and hardly ever misses a page that ranges may.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kivi_vllm.config import BLOCK_SIZE as B
from kivi_vllm.config import Estimate
from kivi_vllm.ops.codec import decode_pages
from kivi_vllm.ops.codes import top, zero_step
from kivi_vllm.ops.format import PageFormat
from kivi_vllm.ops.residual import first_visible, full_precision_from

if TYPE_CHECKING:
    from kivi_vllm.ops.step import AttentionParams

RADIUS = 0.5

QUAD = 4
"""Channels whose codes lie together."""

COUNTED = torch.zeros(2, dtype=torch.int64)
"""What the generated tokens of this process saw and read of pages, in layers with a budget: one for
each page, token and head of K and V. The kernels that read the pages count."""

COUNTERS: list[Callable[[], tuple[int, int]]] = [lambda: (int(COUNTED[0]), int(COUNTED[1]))]
"""Where such counts are: these, and those of GPUs."""


@dataclass(frozen=True)
class Selection:
    """The pages that each generated token of a step reads in one layer.

    Attributes:
        blocks: [num_tokens, num_kv_heads, n] int32, the request's blocks whose pages are read, in
            ascending order; with the one that F(t) cuts, if it does.
        counts: [num_tokens] int32, how many of them there are; -1: all that there is, as tokens
            of prompts do. Those are not even written.

    """

    blocks: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def empty(cls, num_tokens: int, num_kv_heads: int, budget: int) -> Selection:
        """Room for lists of `budget` tokens, none of which is made."""
        blocks = torch.empty(num_tokens, num_kv_heads, budget // B + 1, dtype=torch.int32)
        return cls(blocks, torch.full((num_tokens,), -1, dtype=torch.int32))

    def unread(self, token: int, start: int, end: int, until: int, sinks: int) -> torch.Tensor:
        """Which positions from `start` to `until` lie in pages that a token does not read.

        Those from `end` on are in no page. Returns bool [num_kv_heads, until - start].
        """
        at = torch.arange(start, until)
        blocks, count = self.blocks[token], int(self.counts[token])
        read = (at < sinks) | (at >= end) | (count < 0)
        return ~(read | (at // B == blocks[:, : max(0, count), None]).any(1))


def candidates(position: int, residual: int, params: AttentionParams) -> range:
    """Blocks whose pages a position may choose of: whole ones, of which it sees something."""
    first = first_visible(position, params.sliding_window, params.chunk_size) // B
    return range(first, max(first, full_precision_from(position, residual) // B))


def count_pages(
    token: int,
    positions: range,
    residual: int,
    params: AttentionParams,
    num_kv_heads: int,
    selection: Selection | None,
) -> None:
    """Add to `COUNTED` what generated tokens, from `token` on at `positions`, see and read."""
    for i, t in enumerate(positions):
        end = -(-full_precision_from(t, residual) // B)
        seen = max(0, end - candidates(t, residual, params).start)
        listed = -1 if selection is None else int(selection.counts[token + i])
        read = seen if listed < 0 else listed
        COUNTED.add_(torch.tensor([seen, read]) * num_kv_heads)


def must_choose(position: int, residual: int, budget: int) -> bool:
    """Whether some position up to this one may have more whole pages than `budget` tokens."""
    return budget > 0 and full_precision_from(max(0, position), residual) // B * B > budget


def check_pages(fmt: PageFormat, estimate: Estimate) -> None:
    """Raise ValueError unless pages can be chosen by this."""
    if fmt.is_raw:
        raise ValueError("pages of kivi_raw have no ranges to select by")
    if estimate == "keys" and not fmt.two_level:
        raise ValueError("pages are selected by their keys under recipe 'best' only")


def estimates(query: torch.Tensor, pages: torch.Tensor, fmt: PageFormat) -> torch.Tensor:
    """x of the queries [num_heads, D], times the scale, and pages [n, num_kv_heads, page_bytes].

    Returns:
        fp32 [num_kv_heads, heads of each, n, groups].

    """
    get = {name: fmt.fields[name].of(pages) for name in fmt.fields if name.startswith("k_")}
    if fmt.two_level:
        step = get["k_step"].float().unsqueeze(-2)
        scale = (get["k_range"] & 15) * step
        low = get["k_low"].float().unsqueeze(-2)
        zero = low + (get["k_range"] >> 4) * (step * zero_step(fmt.k_bits))
    else:
        scale, zero = get["k_scale"].float(), get["k_zero"].float()
    half = scale * (top(fmt.k_bits) / 2)  # [n, H, groups, D]
    q = query.float().unflatten(0, (pages.shape[1], -1))  # [H, heads of each, D]
    product = "hrd,nhgd->hrng"
    return torch.einsum(product, q, zero + half) + RADIUS * torch.einsum(product, q.abs(), half)


def estimate_channels(head_size: int) -> int:
    """Channels by which keys are estimated: a quarter of them, and a multiple of 32."""
    return (head_size // 4 + 31) // 32 * 32


def main_channels(query: torch.Tensor, page: torch.Tensor, fmt: PageFormat) -> torch.Tensor:
    """Channels that say most of the products of queries [num_heads, D] with keys as in a page.

    Args:
        query: of one token.
        page: [num_kv_heads, page_bytes], of which the steps are read.
        fmt: of recipe "best".

    Returns:
        int64 [num_kv_heads, estimate_channels], ascending.

    """
    step = fmt.fields["k_step"].of(page).float()
    q = query.float().unflatten(0, (len(page), -1))
    power = (q * step[:, None]).square().sum(1).unflatten(1, (-1, QUAD)).sum(-1)
    power = power.masked_fill(~power.isfinite(), 0)
    count = estimate_channels(fmt.head_size) // QUAD
    quads = power.sort(dim=-1, descending=True, stable=True).indices[:, :count].sort(-1).values
    return (quads[..., None] * QUAD + torch.arange(QUAD, device=page.device)).flatten(1)


def key_estimates(
    query: torch.Tensor, pages: torch.Tensor, fmt: PageFormat, unread: int = 0
) -> torch.Tensor:
    """x of each page, by its keys' main channels: as `estimates`, but [.., n, 1] for the groups.

    The last of the pages is the newest one. The first `unread` tokens of the first are not read
    from there: sinks, and what a window hides.
    """
    channels = main_channels(query, pages[-1], fmt)  # [H, C]
    k = decode_pages(pages, fmt)[0].transpose(0, 1)  # [H, n, B, D]
    k = k.gather(-1, channels[:, None, None].expand(*k.shape[:3], -1))
    q = query.float().unflatten(0, (len(channels), -1))
    q = q.gather(-1, channels[:, None].expand(*q.shape[:2], -1))
    x = torch.einsum("hrc,hnsc->hrns", q, k)
    x = x.masked_fill(~x.isfinite(), -torch.inf)
    x[:, :, 0, :unread] = -torch.inf
    return x.amax(-1, keepdim=True)


def weights(x: torch.Tensor, soft_cap: float = 0.0) -> torch.Tensor:
    """w of the estimates x [num_kv_heads, heads of each, n, groups]: fp32 [num_kv_heads, n]."""
    finite = x.isfinite()
    if soft_cap:
        x = soft_cap * torch.tanh(x / soft_cap)
    x = x.masked_fill(~finite, -torch.inf)
    most = x.amax((2, 3), keepdim=True)
    e = (x - most.masked_fill(most.isinf(), 0)).exp()
    total = e.sum((2, 3), keepdim=True)
    return (e / total.masked_fill(total == 0, 1)).sum((1, 3))


def best(w: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` pages that weigh most of w [.., n], the last one among them.

    [.., count] int64, ascending.
    """
    w = w.clone()
    w[..., -1] = torch.inf
    return w.sort(dim=-1, descending=True, stable=True).indices[..., :count].sort(-1).values
