"""Drives the three operators as an engine would, and knows in float64 what they must give.

A simulator owns one pool of blocks, from which the quantized pages, the ring and the tails of its
requests are drawn in random order. The pool starts as 0xFF bytes, a NaN in every dtype, and the
entries of the tables beyond what a request holds point at block 0, which stays so, as do those
of the ring's pages that it has given back. Blocks whose pages have left a sliding window become
NaN too, and are the first that others get; the entries become 0 or, as in vLLM's workers, stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

from kivi_vllm.config import Estimate, KiviConfig, Recipe
from kivi_vllm.ops import reference
from kivi_vllm.ops.format import PageFormat
from kivi_vllm.ops.images import last_visible
from kivi_vllm.ops.step import AttentionParams, LayerCache, Raw, Row, Step
from tests.unit import kivi_numpy

B = 128
TOLERANCE = 2e-5
POISON = 255
SPARE = 2  # heads and tokens of the inputs, and entries of the tables, that nobody may read


def first_raw(t: int, residual: int) -> int:
    """F(t): position t sees s at full precision iff s >= F(t)."""
    return max(0, B * (t // B) - residual)


@dataclass(frozen=True)
class Case:
    """A layer and its settings; where `group` and `sinks` are None, the recipe's own."""

    dtype: str = "kivi2"
    recipe: Recipe = "best"
    residual: int = 0
    heads: tuple[int, int] = (4, 2)
    head_size: int = 64
    model: torch.dtype = torch.float32
    exact: bool = False
    drafts: int = 0
    scale: float | None = None
    soft_cap: float = 0.0
    alibi: bool = False
    window: int = 0
    chunk: int = 0
    sink_logits: tuple[float, ...] = ()  # of the heads in turn
    tokens: int = 300
    group: int | None = None
    sinks: int | None = None
    per_block: int = 1  # k, the pages of a head in a block of the pool
    raw: tuple[int, int, int] | None = None  # T of the ring, the tails and the sinks
    budget: int = 0  # tokens of pages that a generated token reads
    estimate: Estimate = "ranges"

    def __str__(self) -> str:
        """For example kivi2-best-R0-H4x2-D64-T300."""
        name = f"{self.dtype}-{self.recipe}-R{self.residual}"
        name += f"-H{self.heads[0]}x{self.heads[1]}-D{self.head_size}-T{self.tokens}"
        short = {torch.float32: "", torch.bfloat16: "-bf16", torch.float16: "-fp16"}[self.model]
        more = {"exact": self.exact, "drafts": self.drafts, "scale": self.scale}
        more |= {"cap": self.soft_cap, "alibi": self.alibi, "window": self.window}
        more |= {"chunk": self.chunk, "budget": self.budget, "keys": self.estimate == "keys"}
        words = [k if v is True else f"{k}{v:g}" for k, v in more.items() if v]
        given = {"G": self.group, "sinks": self.sinks}
        words += [f"{k}{v}" for k, v in given.items() if v is not None]
        words += [f"k{self.per_block}"] if self.per_block > 1 else []
        words += ["raw{}.{}.{}".format(*self.raw)] if self.raw else []
        words += ["logits" + ",".join(f"{x:g}" for x in self.sink_logits)] * bool(self.sink_logits)
        return "-".join([name + short, *words])

    @property
    def fmt(self) -> PageFormat:
        given = {"recipe": self.recipe, "group_size": self.group, "sink_tokens": self.sinks}
        options = {name: value for name, value in given.items() if value is not None}
        config = KiviConfig.from_options(self.dtype, options)
        return PageFormat.of(config, self.head_size, self.model)

    @property
    def params(self) -> AttentionParams:
        n = self.heads[0]
        slopes = torch.tensor([2.0 ** (-8 * (i + 1) / n) for i in range(n)]) if self.alibi else None
        scale = self.scale or self.head_size**-0.5
        logits = None
        if self.sink_logits:
            logits = torch.tensor(self.sink_logits).repeat(n)[:n].float()
        asked = (scale, self.soft_cap, slopes, self.window, logits, self.chunk)
        return AttentionParams(*asked, token_budget=self.budget, estimate=self.estimate)


@dataclass(eq=False)
class Request:
    """One sequence; `q`, `k` and `v` are all that it will ever have, [tokens, heads, head_size]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    output: torch.Tensor
    images: list[tuple[int, int]] = field(default_factory=list)  # first and last position
    prompt: int = 1 << 40  # tokens after these are generated
    read: dict[int, np.ndarray] = field(
        default_factory=dict
    )  # of positions: blocks that each head reads
    computed: int = 0
    blocks: list[int] = field(default_factory=list)  # 0: it left the window, or was not wanted
    stale: dict[int, int] = field(default_factory=dict)  # what is left in entries of the table
    ring: list[int] = field(default_factory=list)
    tails: dict[int, list[int]] = field(default_factory=dict)
    sinks: list[int] = field(default_factory=list)
    quantized: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.q)


class Simulator:
    """Requests, their pages, and the truth."""

    def __init__(
        self,
        case: Case,
        *,
        ops: Any = reference,
        rule: Callable[[int, int], int] = first_raw,
        decode_len: int | None = None,
        sparse: bool = False,
        num_blocks: int = 256,
        device: str = "cpu",
        output_dtype: torch.dtype = torch.float32,
        tolerance: float = TOLERANCE,
        seed: int = 0,
    ) -> None:
        self.case, self.fmt, self.ops, self.rule, self.device = case, case.fmt, ops, rule, device
        self.output_dtype, self.tolerance = output_dtype, tolerance
        self.rng = np.random.default_rng(seed)
        self.requests: list[Request] = []
        self.decode_len = decode_len or 1 + case.drafts
        self.sparse = sparse  # tails of those blocks only that the requests themselves need
        self.raw_tokens = case.raw or (self.fmt.raw_tokens,) * 3
        self.num_tails = -(-case.residual // self.raw_tokens[1])
        # What a block holds of another layer lies between ours.
        self.token_bytes = 2 * self.fmt.head_size * case.model.itemsize
        most = max(case.per_block * self.fmt.page_bytes, max(self.raw_tokens) * self.token_bytes)
        shape = (num_blocks, 2, case.heads[1] * most)
        self.pool = torch.full(shape, POISON, dtype=torch.uint8, device=device)
        self.touched = {0}
        self.left: list[int] = []  # what windows have left and nobody has taken, newest last
        self.num_left = 0  # blocks that windows have left so far
        self.errors: list[np.ndarray] = []  # of every row that was computed, [tokens, heads]

    # ------------------------------------------------------------ requests

    def random(self, *shape: int) -> torch.Tensor:
        """Numbers of the model's dtype, with channels of different size and mean."""
        size, mean = np.linspace(0.5, 2, shape[-1]), np.sin(np.arange(shape[-1]))
        return torch.from_numpy(self.rng.normal(size=shape) * size + mean).to(self.case.model)

    def add(self, tokens: int, like: Request | None = None, hit_blocks: int = 0) -> Request:
        """A new request; with `like`, one whose first `hit_blocks` are that request's."""
        (hq, hkv), d = self.case.heads, self.case.head_size
        out = torch.full((tokens, hq, d), torch.nan)
        new = Request(*(self.random(tokens, h, d) for h in (hq, hkv, hkv)), out)
        if like:
            self._grow(like, hit_blocks * B)  # perhaps in the step that is to come
            new.computed = hit_blocks * B
            for mine, theirs in ((new.k, like.k), (new.v, like.v)):
                mine[: new.computed] = theirs[: new.computed]
            assert hit_blocks % self.case.per_block == 0, "a hit ends within a block of the pool"
            new.blocks = like.blocks[: hit_blocks // self.case.per_block]
            new.stale = dict(like.stale)
            new.tails = {hit_blocks - 1: like.tails[hit_blocks - 1]}
            new.sinks = like.sinks
        self.requests.append(new)
        return new

    def show(self, request: Request, *, longest: int = 90) -> None:
        """Make about every second token one of an image, whose tokens see each other."""
        at = int(self.rng.integers(0, 3))
        while (last := at + int(self.rng.integers(0, longest))) < len(request):
            request.images.append((at, last))
            at = last + 1 + int(self.rng.integers(0, longest)) * int(self.rng.integers(0, 2))

    def _whole_images(self, request: Request, n: int) -> int:
        """About n tokens that no image goes beyond."""
        end = request.computed + n
        for first, last in request.images:
            if n and first < end <= last:
                early = first > request.computed and self.rng.random() < 0.5
                end = first if early else last + 1
        return end - request.computed

    def rewind(self, request: Request, to: int) -> None:
        """The tokens from position `to` on were rejected: others take their place."""
        request.computed = to
        for x in (request.q, request.k, request.v):
            x[to:] = self.random(*x[to:].shape)
        request.quantized = {s: x for s, x in request.quantized.items() if s + B <= to}

    def finish(self, request: Request) -> None:
        """Its pages go back, contents and all."""
        self.requests.remove(request)

    def _grow(self, request: Request, upto: int) -> None:
        def more(held: list[int], wanted: int) -> None:
            held += self._take(wanted - len(held))

        self._leave_window(request)
        entries = -(-(upto // B) // self.case.per_block)
        unwanted = self._unseen_entries(request, upto) - len(request.blocks)
        request.blocks += [0] * min(unwanted, entries - len(request.blocks))
        more(request.blocks, entries)
        self._move_ring(request, upto)
        newest = max(0, upto - self.case.drafts) // B - 1
        for block in range(request.computed // B, upto // B):
            if block >= newest or not self.sparse:
                more(request.tails.setdefault(block, []), self.num_tails)
        more(request.sinks, int(upto >= B and self.fmt.sink_tokens > 0))

    def _leave_window(self, request: Request) -> None:
        """Give back, and spoil, what no position from the next one on sees through the window."""
        seen = self._first_seen(request.computed)
        entries = range(min(len(request.blocks), seen // (B * self.case.per_block)))
        left: list[int] = []
        if seen >= self.fmt.sink_tokens and any(request.sinks):
            left, request.sinks = request.sinks, [0]
        for i in entries:
            if page := request.blocks[i]:
                left.append(page)
                request.blocks[i] = 0
                if self.rng.random() < 0.5:
                    request.stale[i] = page
        left = [page for page in left if page not in self._used()]
        self.pool[left, 1] = POISON
        self.left += left
        self.num_left += len(left)

    def _oldest_tail(self, request: Request) -> int:
        """The first block whose tail is held: the newest one's, if the window reaches it."""
        block = request.computed // B
        return block - (block * B > self._first_seen(request.computed))

    def _first_seen(self, t: int) -> int:
        """The first position that position t sees."""
        chunk = self.case.chunk
        seen = t // chunk * chunk if chunk else 0
        return max(seen, t + 1 - self.case.window) if self.case.window else seen

    def _unseen_entries(self, request: Request, upto: int) -> int:
        """Entries of whose new pages neither the step nor a later one reads any."""
        if not self.case.exact or upto - request.computed <= self.decode_len:
            return 0
        return self._first_seen(upto) // (B * self.case.per_block)

    def _used(self) -> set[int]:
        """What requests hold."""
        used = {0}
        for r in self.requests:
            used |= {*r.blocks, *r.ring, *r.sinks}.union(*r.tails.values())
        return used

    def _take(self, wanted: int) -> list[int]:
        """Blocks that no request holds: first those that left a window."""
        if wanted <= 0:
            return []
        free = set(range(len(self.pool))) - self._used()
        left = [page for page in self.left if page in free]
        taken, self.left = left[-wanted:], left[:-wanted]
        free -= set(left)
        taken += self.rng.permutation(sorted(free))[: wanted - len(taken)].tolist()
        assert len(taken) == wanted, "the simulator's pool is too small"
        self.touched |= set(taken)
        return taken

    def _move_ring(self, request: Request, upto: int) -> None:
        """The ring's pages for a step that ends at `upto`, as few as there can be.

        Entries that no step needs any more are 0; the page of one that only this step
        still needs may be that of a new entry too, which the step writes last.
        """
        per_page, ring = self.raw_tokens[0], request.ring
        a_block = -(-B // per_page)
        live = request.computed // B * a_block
        ring[:live] = [0] * min(live, len(ring))
        after = max(0, upto - self.case.drafts) // B * a_block
        leaving = [page for page in ring[:after] if page]
        needed = upto // B * a_block + -(-(upto % B) // per_page)
        new = range(max(after, len(ring)), needed)
        pages = leaving[: len(new)]
        pages += self._take(len(new) - len(pages))
        if new:
            ring += [0] * (new[0] - len(ring)) + pages

    # ---------------------------------------------------------------- steps

    def step(self, counts: Mapping[Request, int]) -> None:
        """Compute the next tokens of some requests in one batch, and compare with the truth."""
        counts = {r: self._whole_images(r, min(n, len(r) - r.computed)) for r, n in counts.items()}
        for request, n in counts.items():
            self._grow(request, request.computed + n)
        order = [self.requests[i] for i in self.rng.permutation(len(self.requests))]
        rows, at = [], 0
        for index, request in enumerate(order):
            if n := counts.get(request, 0):
                made = request.computed >= request.prompt and n <= self.decode_len
                rows.append(Row(index, at, at + n, request.computed, request.computed + n, made))
                at += n
        table = self._table(
            [[page or r.stale.get(i, 0) for i, page in enumerate(r.blocks)] for r in order]
        )
        seen = self._last_visible(rows, order)
        step = Step(rows, table, not self.case.exact, self.decode_len, seen)
        q, k, v = self._inputs(rows, order, at)
        shape = (at + SPARE, *order[0].q.shape[1:])
        output = torch.full(shape, torch.nan, dtype=self.output_dtype, device=self.device)

        cache = self._cache(order)
        self.ops.store_blocks(step, cache, k, v)
        self._attend(step, cache, q, k, v, output, order)
        self.ops.store_ring(step, cache, k, v)

        for row in rows:
            request = order[row.index]
            request.output[row.a : row.b] = output[row.q0 : row.q1].float().cpu()
            request.computed = row.b
            self.check(request, row.a, row.b)
        assert output[at:].isnan().all(), "padding of the output was written"

    def _attend(
        self,
        step: Step,
        cache: LayerCache,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        output: torch.Tensor,
        order: list[Request],
    ) -> None:
        self.ops.attend(step, cache, q, k, v, self.case.params, output)

    def run(self, *requests: Request, longest: int = 200) -> None:
        """All the rest of the requests, in ragged batches of random chunks."""
        while live := [r for r in requests if r.computed < len(r)]:
            counts = {r: int(self.rng.integers(0, longest)) for r in live}
            # Some decode, some prefill, some have nothing in this step.
            self.step({r: n if self.rng.random() < 0.6 else min(n, 1) for r, n in counts.items()})

    def _last_visible(self, rows: list[Row], order: list[Request]) -> torch.Tensor | None:
        images = {row.index: order[row.index].images for row in rows}
        starts, ends = torch.zeros(len(order) + 1), torch.zeros(len(order))
        for row in rows:
            # Of what generates, vLLM knows no more than a bound, which drafts may not have reached.
            more = 0 if any(last >= row.a for _, last in images[row.index]) else 3
            starts[row.index + 1], ends[row.index] = row.q1 - row.q0, row.b + more
        seen = last_visible(images, starts.cumsum(0).int(), ends.int())
        return None if seen is None else seen.to(self.device)

    def _table(self, rows: list[list[int]]) -> torch.Tensor:
        table = torch.zeros(len(rows), max(map(len, rows)) + SPARE, dtype=torch.int32)
        for i, row in enumerate(rows):
            table[i, : len(row)] = torch.tensor(row, dtype=torch.int32)
        return table.to(self.device)

    def _inputs(self, rows: list[Row], order: list[Request], n: int) -> tuple[torch.Tensor, ...]:
        """Parts of one tensor, as of a fused projection, with NaN around them."""
        (hq, hkv), d = self.case.heads, self.case.head_size
        fused = torch.full((n + SPARE, hq + 2 * hkv + SPARE, d), torch.nan).to(self.case.model)
        for row in rows:
            r = order[row.index]
            parts = [x[row.a : row.b] for x in (r.q, r.k, r.v)]
            fused[row.q0 : row.q1, : hq + 2 * hkv] = torch.cat(parts, 1)
        return fused.to(self.device).split([hq, hkv, hkv, SPARE], 1)[:3]

    def _cache(self, order: list[Request]) -> LayerCache:
        own, heads, k = self.pool[:, 1], self.case.heads[1], self.case.per_block
        page_bytes, token_bytes = self.fmt.page_bytes, self.token_bytes

        def raw(which: int, ids: list[list[int]]) -> Raw:
            tokens = self.raw_tokens[which]
            pages = own[:, : heads * tokens * token_bytes].unflatten(1, (heads, -1))
            return Raw(self.fmt.as_raw(pages, tokens), self._table(ids))

        tails = []
        for i in range(self.num_tails):
            ids = [[0] * (1 + max(r.tails, default=-1)) for r in order]
            for r, row in zip(order, ids, strict=True):
                for block, held in r.tails.items():
                    if block >= self._oldest_tail(r):
                        row[block] = held[i]
            tails.append(raw(1, ids))
        ring = raw(0, [r.ring for r in order])
        sinks = raw(2, [r.sinks for r in order]) if self.fmt.sink_tokens else None
        pages = own[:, : heads * k * page_bytes].unflatten(1, (heads, k, page_bytes))
        return LayerCache(
            self.fmt, pages.transpose(1, 2), ring, tuple(tails), self.case.residual, sinks
        )

    # ---------------------------------------------------------------- truth

    def check(self, request: Request, a: int, b: int) -> None:
        """Assert that the outputs of one row are float64 attention over what it should see."""
        wanted = truth(request, a, b, self.seen(a, b), self.case)
        error = relative_error(request.output[a:b].double().numpy(), wanted)
        self.errors.append(error)
        unit = torch.finfo(self.output_dtype).eps if self.output_dtype != torch.float32 else 0
        bad = np.argwhere(~(error <= self.tolerance + unit))
        assert not bad.size, (
            f"positions {sorted({a + int(i) for i, _ in bad})[:8]} of row {a}..{b} are off by up "
            f"to {error.max():.2g} (of {len(bad)} heads)"
        )

    def seen(self, a: int, b: int) -> list[int]:
        """F(t) of the positions t of the row a..b."""
        decode = b - a <= 1 + self.case.drafts
        by_position = decode or not self.case.exact
        return [self.rule(t if by_position else a, self.case.residual) for t in range(a, b)]

    def check_untouched(self) -> None:
        """No page was written that no request has ever held, nor another layer's."""
        others = [0, *set(range(len(self.pool))) - self.touched]
        assert (self.pool[others, 1] == POISON).all()
        assert (self.pool[:, 0] == POISON).all()


def relative_error(got: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Largest difference of each output [..., D], in terms of the largest number of `wanted`."""
    return np.abs(got - wanted).max(-1) / np.abs(wanted).max(-1)


def quantized(
    k: torch.Tensor, v: torch.Tensor, fmt: PageFormat, sinks: int
) -> tuple[np.ndarray, np.ndarray]:
    """One block [128, num_kv_heads, D] as its pages, and its first tokens' page, give it back.

    Where heads of pages are larger, zeros fill them up.
    """
    d = k.shape[-1]
    out = k.double().numpy().copy(), v.double().numpy().copy()
    for h in range(0 if fmt.is_raw else k.shape[1]):
        heads = (pad(x[:, h].float(), (0, fmt.head_size - d)).numpy() for x in (k, v))
        lossy = kivi_numpy.decode_page(kivi_numpy.encode_page(*heads, fmt, sinks), fmt)
        for x, y in zip(out, lossy, strict=True):
            x[sinks:, h] = y[sinks:, :d]
    return out


def truth(request: Request, a: int, b: int, seen: list[int], case: Case) -> np.ndarray:
    """Attention in float64 of positions a..b-1, of which t sees `seen[t - a]` on as it was."""
    k, v = (x[:b].double().numpy() for x in (request.k, request.v))
    for s in range(0, max(seen), B):
        if s not in request.quantized:
            block = slice(s, s + B)
            sinks = 0 if s else case.fmt.sink_tokens
            request.quantized[s] = quantized(request.k[block], request.v[block], case.fmt, sinks)
    out = np.empty((b - a, case.heads[0], case.head_size))
    for f in set(seen):
        at = np.array([t for t in range(a, b) if seen[t - a] == f])
        kf, vf = k.copy(), v.copy()
        for s in range(0, f, B):
            lossy = slice(s, min(s + B, f))
            kf[lossy], vf[lossy] = (x[: lossy.stop - s] for x in request.quantized[s])
        q, params = request.q[at].double().numpy(), case.params
        slopes, logits = (
            None if x is None else x.numpy() for x in (params.alibi_slopes, params.sink_logits)
        )
        out[at - a] = kivi_numpy.attention(
            q,
            kf,
            vf,
            at,
            params.scale,
            params.logits_soft_cap,
            slopes,
            params.sliding_window,
            logits,
            params.chunk_size,
            images=request.images,
            unread=_unread(request, at, b, case),
        )
    return out


def _unread(request: Request, at: np.ndarray, end: int, case: Case) -> np.ndarray | None:
    """Positions up to `end` whose pages those at `at` leave out: [at, num_kv_heads, end]."""
    if not any(int(t) in request.read for t in at):
        return None
    out = np.zeros((len(at), case.heads[1], end), bool)
    for i, t in enumerate(at):
        if (read := request.read.get(int(t))) is not None:  # [num_kv_heads, blocks] bool
            out[i, :, : B * read.shape[1]] = ~read.repeat(B, 1)
            out[i, :, : case.fmt.sink_tokens] = False
    return out
