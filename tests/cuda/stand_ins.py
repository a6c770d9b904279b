"""PyTorch in place of kernels of vLLM's own that neither exist here nor can be interpreted.

They are those of the layers beside attention: Mamba's convolutions and scans (compiled, or beyond
Triton's interpreter), and gpt-oss' experts. What they read and write of the states in the cache is
as in vLLM; how fast they are does not matter.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import silu, softplus

Tensor = torch.Tensor


def install() -> None:
    """Put them into vLLM's modules; once, when its platform is chosen."""
    from vllm.model_executor.layers.mamba import mamba_mixer, mamba_mixer2
    from vllm.model_executor.layers.mamba.ops.cpu.causal_conv1d import causal_conv1d_fn_cpu
    from vllm.model_executor.models import gpt_oss

    for module in (mamba_mixer, mamba_mixer2):
        module.causal_conv1d_fn = causal_conv1d_fn_cpu  # in PyTorch
        module.causal_conv1d_update = causal_conv1d_update
        module.selective_state_update = selective_state_update
    mamba_mixer.selective_scan_fn = selective_scan_fn
    mamba_mixer2.mamba_chunk_scan_combined_varlen = mamba_chunk_scan_combined_varlen
    gpt_oss.MLPBlock.forward = experts_of_gpt_oss


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    conv_state_indices: Any = None,
    **kwargs: Any,
) -> Tensor:
    """One token more for each sequence: x [sequences, channels]."""
    slots = conv_state_indices.flatten()
    seen = torch.cat([conv_state[slots], x[..., None]], -1)
    conv_state[slots] = seen[..., -conv_state.shape[-1] :]
    out = (seen[..., -weight.shape[-1] :] * weight).sum(-1)
    out = out if bias is None else out + bias
    return silu(out) if activation else out


def _scan(state: Tensor, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Any:
    """The recurrence of one sequence: (its outputs [T, D], its state after them [D, N]).

    `x` and `dt` are [T, D], `a` is [D, N], `b` and `c` are [T, D or 1, N].
    """
    out = torch.empty_like(x)
    for t in range(len(x)):
        state = state * (dt[t][:, None] * a).exp() + (dt[t] * x[t])[:, None] * b[t]
        out[t] = (state * c[t]).sum(-1)
    return out, state


def selective_scan_fn(
    u: Tensor,
    ssm_states: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
    *,
    cache_indices: Tensor,
    has_initial_state: Tensor,
    query_start_loc: Tensor,
    **kwargs: Any,
) -> Tensor:
    """Mamba-1, of prompts: u, delta, z [channels, tokens]; B, C [states, tokens]."""
    dt = softplus(delta + delta_bias[:, None])
    out = torch.empty_like(u)
    for i, (start, end) in enumerate(pairwise(query_start_loc.tolist())):
        slot, at = cache_indices[i], slice(start, end)
        before = ssm_states[slot] * has_initial_state[i]
        b, c = (x.view(-1, x.shape[-1])[:, at].T[:, None] for x in (B, C))
        y, ssm_states[slot] = _scan(before, u[:, at].T, dt[:, at].T, A, b, c)
        out[:, at] = y.T
    return (out + D[:, None] * u) * silu(z)


def mamba_chunk_scan_combined_varlen(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    cu_chunk_seqlens: Tensor,
    last_chunk_indices: Tensor,
    seq_idx: Tensor,
    out: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    initial_states: Tensor | None,
    return_intermediate_states: bool = False,
    final_states_out: Tensor | None = None,
    final_state_indices: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Mamba-2, of prompts in chunks, of which each is of one sequence: x [tokens, heads, channels].

    Returns the states after each chunk, or writes those after each sequence.
    """
    _, num_heads, size = x.shape
    step = softplus(dt + dt_bias).repeat_interleave(size, -1)
    a = A.repeat_interleave(size)[:, None]
    b, c = (s.repeat_interleave(num_heads * size // s.shape[1], 1) for s in (B, C))
    states: list[Tensor] = []
    owners = seq_idx.tolist()
    for i, (start, end) in enumerate(pairwise(cu_chunk_seqlens.tolist())):
        at = slice(start, end)
        if i and owners[i - 1] == owners[i]:
            state = states[-1]
        elif initial_states is not None:
            state = initial_states[owners[i]].flatten(0, 1)
        else:
            state = x.new_zeros(num_heads * size, B.shape[-1])
        y, state = _scan(state, x[at].flatten(1), step[at], a, b[at], c[at])
        out[at] = y.view_as(x[at]) + D[:, None] * x[at]
        states.append(state)
    after = torch.stack(states).unflatten(1, (num_heads, size))
    if return_intermediate_states:
        return after
    if final_states_out is None:
        return after[last_chunk_indices]
    final_states_out[final_state_indices] = after[last_chunk_indices]
    return None


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    *,
    z: Tensor | None = None,
    state_batch_indices: Any = None,
    out: Any = None,
    **kwargs: Any,
) -> None:
    """One token more for each sequence: x [sequences, (heads,) channels]."""
    slots = state_batch_indices.flatten()
    if x.dim() == 3:  # groups of heads share them
        B, C = (s.repeat_interleave(x.shape[1] // s.shape[1], 1)[:, :, None] for s in (B, C))
    else:
        B, C = B[:, None], C[:, None]
    step = softplus(dt + dt_bias)[..., None]
    after = state[slots] * (step * A).exp() + step * x[..., None] * B
    state[slots] = after
    y = (after * C).sum(-1) + D * x
    out.copy_(y if z is None else y * silu(z))


def experts_of_gpt_oss(self: Any, x: Tensor) -> Tensor:
    """`MLPBlock.forward`: each token's best experts, with gpt-oss' activation."""
    experts = self.experts
    found = dict(experts.named_parameters())
    w13, b13, w2, b2 = (
        next(p for name, p in found.items() if name.endswith(end))
        for end in ("w13_weight", "w13_bias", "w2_weight", "w2_bias")
    )
    best = self.router(x).topk(self.experts_per_token)
    share = torch.zeros(len(x), self.num_experts).scatter(1, best.indices, best.values.softmax(-1))
    y = torch.einsum("th,eih->tei", x, w13) + b13
    gate, up = y[..., ::2].clamp(max=7), y[..., 1::2].clamp(-7, 7)
    y = torch.einsum("tei,ehi->teh", (up + 1) * gate * torch.sigmoid(1.702 * gate), w2) + b2
    return (share[..., None] * y).sum(1)
