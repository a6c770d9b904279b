"""What the cache groups share: pages of full-precision tokens, and rows with gaps."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

from kivi_vllm.config import BLOCK_SIZE
from kivi_vllm.ops.format import PageFormat

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock


def raw_fields(num_kv_heads: int, fmt: PageFormat) -> dict[str, Any]:
    """Pages as `page_spec`'s; their bytes are shown as `fmt.raw_tokens` tokens later.

    (`plan` makes pages of other sizes out of them, see `of_tokens`.)
    """
    return dict(
        block_size=BLOCK_SIZE,
        num_kv_heads=num_kv_heads,
        head_size=fmt.head_size,
        dtype=torch.uint8,
        state_content_bytes=fmt.bytes_per_token,
        dcp_sharded=False,
    )


def of_tokens(token_bytes: int, num_tokens: int, block_size: int) -> dict[str, Any]:
    """What makes a spec's page [num_kv_heads, num_tokens, token_bytes]."""
    return dict(
        block_size=block_size,
        state_content_bytes=token_bytes,
        tokens_per_state=Fraction(block_size, num_tokens),
    )


class SparseManager(SingleTypeKVCacheManager):
    """A manager whose requests have pages at some entries of their block table only.

    The other entries are vLLM's null page.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._held: dict[str, list[int]] = {}  # entries that have a page, in their order

    def observe(self, request: Any) -> None:
        """Look at a request before it gets pages: all else that managers see is its id."""
        raise NotImplementedError

    def _free_below(self, request_id: str, first: int) -> None:
        """Free the pages of the entries before `first`."""
        held, blocks = self._held.get(request_id, []), self.req_to_blocks.get(request_id, [])
        gone = [entry for entry in held if entry < first]
        self.block_pool.free_blocks([blocks[entry] for entry in gone])
        for entry in gone:
            blocks[entry] = self._null_block
        del held[: len(gone)]

    def _append(
        self, request_id: str, entries: Sequence[int], pages: Sequence[KVCacheBlock], length: int
    ) -> list[KVCacheBlock]:
        """Make the row `length` entries long, with `pages` at `entries`; returns the new ones."""
        blocks = self.req_to_blocks[request_id]
        known = len(blocks)
        blocks += [self._null_block] * (length - known)
        for entry, page in zip(entries, pages, strict=True):
            blocks[entry] = page
        self._held.setdefault(request_id, []).extend(entries)
        return blocks[known:]

    def allocate_external_computed_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: `allocate_new_blocks` follows in the same call."""

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Forget the request; returns its blocks."""
        self._held.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)
