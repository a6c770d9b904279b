"""Matrix products that do not depend on how many rows they have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch


@contextmanager
def exact_products() -> Iterator[None]:
    """Engines started inside compute the model's linear layers in fp64.

    An fp32 product rounds one way for a batch of one and another way for a batch of
    nine. That 1e-7 moves a code of the cache by a whole step now and then, and an answer
    with it: other neighbours, other answers, and no fault anywhere. Summed in fp64 and
    rounded to fp32, a row is the same in any batch, and with it all that follows: a
    difference that is left is one of ours.
    """
    from vllm.model_executor.layers import utils

    usual = utils.dispatch_cpu_unquantized_gemm

    def in_fp64(layer: Any, remove_weight: bool) -> None:
        if layer.weight.dim() != 2:  # a convolution's
            usual(layer, remove_weight)
            return
        weight = layer.weight.detach().double().t().contiguous()

        def linear(x: torch.Tensor, _: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            y = (x.double() @ weight).to(x.dtype)
            return y if bias is None else y + bias

        layer.cpu_linear = linear

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "dispatch_cpu_unquantized_gemm", in_fp64)
        yield
