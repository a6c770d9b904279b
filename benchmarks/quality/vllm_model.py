"""A row that vLLM computes, inside its engine's process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


class VllmModel:
    """vLLM's `LLM` in this process, with a hook on the model's last hidden states.

    Args:
        arguments: of `vllm.LLM`.

    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        from vllm import LLM

        # Every window is computed from nothing.
        self.llm = LLM(**{"enable_prefix_caching": False, **arguments})
        self._requests = 0
        self._seen: list[torch.Tensor] = []
        self.runner = self._on_worker(lambda worker: worker.model_runner)
        self.model = self.runner.get_model()

    def _on_worker(self, function: Callable[[Any], Any]) -> Any:
        return self.llm.collective_rpc(function)[0]

    def facts(self) -> dict[str, Any]:
        """Capacity and size of the cache."""
        tokens = self.llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
        return dict(kv_cache_tokens=tokens, kv_bytes_per_token=self._bytes_per_token())

    def _bytes_per_token(self) -> float | None:
        """Bytes of the caches that grow with a sequence, a token."""
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        total = 0.0
        for spec in self.runner.get_kv_cache_spec().values():
            # Rings and tails of a sequence do not grow with it, nor do windows.
            if type(spec).__name__.startswith("Kivi") or isinstance(spec, FullAttentionSpec):
                total += spec.page_size_bytes / spec.block_size
        return total or None

    def generate(
        self, prompts: list[list[int]], params: dict[str, Any], done: Callable[[int], None]
    ) -> list[tuple[str, list[int]]]:
        """Greedy answers; `params` are vLLM's sampling parameters."""
        from vllm import SamplingParams

        detokenize = not self.llm.model_config.skip_tokenizer_init
        sampling = SamplingParams(temperature=0, detokenize=detokenize, **params)
        engine = self.llm.llm_engine
        places: dict[str, int] = {}
        for index, prompt in enumerate(prompts):
            name = str(self._requests)
            self._requests += 1
            engine.add_request(name, dict(prompt_token_ids=prompt), sampling)
            places[name] = index
        answers: list[tuple[str, list[int]]] = [("", [])] * len(prompts)
        finished = 0
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    completion = output.outputs[0]
                    place = places[output.request_id]
                    answers[place] = (completion.text, list(completion.token_ids))
                    finished += 1
                    done(finished)
        return answers

    def hidden_states(self, window: Sequence[int]) -> np.ndarray:
        """The model's outputs at all positions of a window, over the chunks of its prefill."""
        import torch

        seen: list[torch.Tensor] = []

        def keep(module: Any, inputs: Any, output: Any) -> None:
            seen.append(output.float().cpu())

        handle = self.model.register_forward_hook(keep)
        try:
            self.generate([list(window)], dict(max_tokens=1), lambda n: None)
        finally:
            handle.remove()
        states = torch.cat(seen)
        if len(states) != len(window):
            raise RuntimeError(
                f"{len(states)} hidden states of {len(window)} positions were seen: the model's "
                "steps are padded or captured, which enforce_eager avoids"
            )
        return states.numpy()

    def logits(self, states: np.ndarray) -> torch.Tensor:
        """The model's own logits of given hidden states."""
        import torch

        with torch.inference_mode():
            # The dtype that the model computes in: its head has no other weights.
            given = torch.from_numpy(states).to(self.runner.device, self.runner.dtype)
            found: torch.Tensor = self.model.compute_logits(given)
            return found.float()
