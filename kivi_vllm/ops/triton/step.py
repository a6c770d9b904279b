"""A step as the kernels see it: what was a list of rows is tensors on the device.

Nothing here is read back: what a launch must know on the host (how many programs)
comes from counts that vLLM's scheduler knows, and rows without tokens are skipped
by the kernels. So a step can be captured into a CUDA graph and replayed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kivi_vllm.ops.reference import Step


@dataclass(frozen=True)
class DeviceStep:
    """What one step computes, shared by all layers of a model.

    Request r has the tokens `query_start_loc[r]` to `query_start_loc[r + 1]` of the
    step, which are its positions up to `seq_lens[r]`; none, where it is padding.

    Attributes:
        query_start_loc: [num_reqs + 1] int32.
        seq_lens: [num_reqs] int32, tokens of each request after the step.
        block_table: [num_reqs, max_blocks] int32, page ids of each request's blocks.
        num_decodes: leading requests that have at most `decode_len` tokens.
        num_decode_tokens: tokens of the step that are theirs, or more.
        num_tokens: tokens of the step, or more.
        max_query_len: tokens of the longest request, or more.
        per_position, decode_len: see `reference.Step`.
        nothing_cached: requests after the decodes have all their tokens in this step.
        prefill_lens: tokens of each of those requests in this step.

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

    @property
    def num_reqs(self) -> int:
        """Requests, padding included."""
        return self.seq_lens.shape[0]

    @property
    def num_prefills(self) -> int:
        """Requests after the decodes."""
        return self.num_reqs - self.num_decodes

    @classmethod
    def of(cls, step: Step) -> DeviceStep:
        """The same step; requests without tokens in it become rows of length 0."""
        device = step.block_table.device
        n = step.block_table.shape[0]
        lens, ends = torch.zeros(n, dtype=torch.int32), torch.zeros(n, dtype=torch.int32)
        for row in step.rows:
            lens[row.index], ends[row.index] = row.q1 - row.q0, row.b
        starts = torch.cat([torch.zeros(1, dtype=torch.int32), lens.cumsum(0).int()])
        if any(starts[row.index] != row.q0 for row in step.rows):
            raise ValueError("the rows of a step must lie in the order of their requests")
        long = (lens > step.decode_len).nonzero().flatten().tolist()
        num_decodes = long[0] if long else n
        prefills = slice(num_decodes, n)
        return cls(
            query_start_loc=starts.to(device),
            seq_lens=ends.to(device),
            block_table=step.block_table,
            num_decodes=num_decodes,
            num_decode_tokens=int(starts[num_decodes]),
            num_tokens=int(starts[-1]),
            max_query_len=int(lens.max()) if n else 0,
            per_position=step.per_position,
            decode_len=step.decode_len,
            nothing_cached=bool((lens[prefills] == ends[prefills]).all()),
            prefill_lens=lens[prefills].tolist(),
        )
