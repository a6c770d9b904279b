"""What computes a row, inside a process of its own: vLLM, or a model of `transformers`."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch

from benchmarks.common.child import report
from benchmarks.quality.engine import Answer
from benchmarks.quality.rows import TRANSFORMERS_BITS, CacheRow
from kivi_vllm.cli.errors import UserError

SLICE_NUMBERS = 1 << 25
"""Logits of one model that are held at a time: 128 MiB in fp32."""

CHUNK = 128
"""Tokens of a step of `QuantizedCacheModel`: what is older is read from the cache."""


class Model(ABC):
    """The model of a row: its hidden states, and logits made from anybody's."""

    def facts(self) -> dict[str, Any]:
        """See `Engine.facts`."""
        return dict(kv_cache_tokens=None, kv_bytes_per_token=None)

    @abstractmethod
    def hidden_states(self, window: Sequence[int]) -> np.ndarray:
        """Of T token ids computed from nothing, [T, hidden] fp32."""

    @abstractmethod
    def logits(self, states: np.ndarray) -> torch.Tensor:
        """[n, hidden] fp32 -> [n, vocabulary] fp32."""

    def compare(
        self, reference: np.ndarray, states: np.ndarray | None, targets: np.ndarray
    ) -> pd.DataFrame:
        """What two rows say of T positions, over the whole vocabulary: see `compare_logits`.

        Logits are made from the states by this model, in slices: the head is the same in every row.

        Args:
            reference, states: [T, hidden]; `states` is None if they are the reference's.
            targets: [T] the next tokens.

        """
        parts: list[pd.DataFrame] = []
        at, size = 0, 16
        while at < len(targets):
            mine = slice(at, at + size)
            a = self.logits(reference[mine])
            b = a if states is None else self.logits(states[mine])
            parts.append(compare_logits(a, b, targets[mine]))
            at += size
            size = max(1, SLICE_NUMBERS // a.shape[1])
        return pd.concat(parts, ignore_index=True)


def compare_logits(reference: torch.Tensor, row: torch.Tensor, targets: np.ndarray) -> pd.DataFrame:
    """Compare the logits [T, vocabulary] of the reference and of a row at the same positions.

    Args:
        reference, row: fp32; the same tensor if the reference itself is measured.
        targets: [T] the next tokens.

    Returns:
        T rows: `nll_reference` and `nll`, the negative log-probability of the next token by the
        reference and by the row, in nats; `kl`, KL(reference || row) over the whole vocabulary, in
        nats; `agree`, whether both have the same most probable token.

    """
    a = reference.log_softmax(-1)
    b = a if row is reference else row.log_softmax(-1)
    at = torch.from_numpy(np.asarray(targets, np.int64)).to(a.device)[:, None]
    # Terms of both signs nearly cancel where the rows are close: summed in float64. A token that
    # the model rules out (-inf) adds nothing.
    terms = torch.where(a == -torch.inf, 0.0, a.exp() * (a - b))
    figures = {
        "nll_reference": -a.gather(-1, at)[:, 0].double(),
        "nll": -b.gather(-1, at)[:, 0].double(),
        "kl": terms.sum(-1, dtype=torch.float64),
        "agree": a.argmax(-1) == b.argmax(-1),
    }
    return pd.DataFrame({name: values.cpu().numpy() for name, values in figures.items()})


class VllmModel(Model):
    """vLLM's `LLM` in this process, with a hook on the model's last hidden states.

    Args:
        row: to be computed.
        arguments: of `vllm.LLM`; all of the row is in them.

    """

    def __init__(self, row: CacheRow, arguments: dict[str, Any]) -> None:
        from vllm import LLM

        self.llm = LLM(**arguments)
        self._names = map(str, itertools.count())
        self.runner: Any = self.llm.collective_rpc(lambda worker: worker.model_runner)[0]
        self.model = self.runner.get_model()

    def facts(self) -> dict[str, Any]:
        """Capacity and size of the cache."""
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        tokens = self.llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
        size = sum(
            spec.page_size_bytes / spec.block_size
            for spec in self.runner.get_kv_cache_spec().values()
            # Rings and tails of a sequence do not grow with it, nor do windows.
            if type(spec).__name__.startswith("Kivi") or isinstance(spec, FullAttentionSpec)
        )
        return dict(kv_cache_tokens=tokens, kv_bytes_per_token=size or None)

    def generate(self, prompts: list[list[int]], params: dict[str, Any]) -> list[Answer]:
        """Greedy answers by vLLM's sampling parameters; reports the number of those done."""
        from vllm import SamplingParams

        detokenize = not self.llm.model_config.skip_tokenizer_init
        sampling = SamplingParams(temperature=0, detokenize=detokenize, **params)
        engine = self.llm.llm_engine
        names = [next(self._names) for _ in prompts]
        for name, prompt in zip(names, prompts, strict=True):
            engine.add_request(name, dict(prompt_token_ids=prompt), sampling)
        answers: dict[str, Answer] = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    said = output.outputs[0]
                    answers[output.request_id] = Answer(said.text, list(said.token_ids))
                    report(len(answers))
        return [answers[name] for name in names]

    def hidden_states(self, window: Sequence[int]) -> np.ndarray:
        """The model's outputs at all positions of a window, over the chunks of its prefill."""
        return self._states(window, len(window), 1)

    def decoded_states(self, window: Sequence[int], count: int) -> np.ndarray:
        """The model's outputs where it decodes the last tokens of a window: see `Engine`."""
        return self._states(window, len(window) - count, count)[-(count - 1) :]

    def _states(self, window: Sequence[int], prompt: int, answer: int) -> np.ndarray:
        """Outputs at all positions, of a prompt and of an answer that is the window's rest."""
        seen: list[torch.Tensor] = []

        def force(module: Any, inputs: Any, output: Any) -> None:
            at = sum(map(len, seen))  # positions computed so far: the token to come
            if prompt <= at < len(window):
                output.sampled_token_ids.fill_(window[at])

        handles = [
            self.model.register_forward_hook(
                lambda module, inputs, output: seen.append(output.float().cpu())
            ),
            self.runner.sampler.register_forward_hook(force),
        ]
        try:
            params = dict(max_tokens=answer, ignore_eos=True)
            (answered,) = self.generate([list(window[:prompt])], params)
        finally:
            for handle in handles:
                handle.remove()
        states, wanted = torch.cat(seen), prompt + answer - 1
        if len(states) != wanted:
            raise RuntimeError(
                f"{len(states)} hidden states of {wanted} positions were seen: the model's "
                "steps are padded or captured, which enforce_eager avoids"
            )
        if answered.token_ids[: len(window) - prompt] != list(window[prompt:]):
            raise RuntimeError("the engine has decoded other tokens than those of the window")
        return states.numpy()

    @torch.inference_mode()
    def logits(self, states: np.ndarray) -> torch.Tensor:
        """The model's own logits, in the dtype that it computes in: its head has no other."""
        given = torch.from_numpy(states).to(self.runner.device, self.runner.dtype)
        return self.model.compute_logits(given).float()


class TransformersModel(Model):
    """A model of `transformers` in this process; the base of the rows that vLLM does not compute.

    Args:
        arguments: `model` and `dtype` of the comparison.
        attention: name of an attention implementation.

    """

    def __init__(self, arguments: dict[str, Any], attention: str = "sdpa") -> None:
        from transformers import AutoModelForCausalLM

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            arguments["model"], dtype=arguments["dtype"], attn_implementation=attention
        )
        self.model.to(self.device).eval()

    @torch.inference_mode()
    def hidden_states(self, window: Sequence[int], **cache: Any) -> np.ndarray:
        """The model's final hidden states of a window at once, or behind a cache."""
        ids = torch.tensor([list(window)], device=self.device)
        output = self.model.base_model(input_ids=ids, **{"use_cache": False, **cache})
        return output.last_hidden_state[0].float().cpu().numpy()

    @torch.inference_mode()
    def logits(self, states: np.ndarray) -> torch.Tensor:
        """The model's own logits of given hidden states."""
        head, config = self.model.get_output_embeddings(), self.model.config
        logits = head(torch.from_numpy(states).to(self.device, head.weight.dtype)).float()
        if (scale := getattr(config, "logit_scale", None)) is not None:
            logits = logits * scale
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
            logits = cap * torch.tanh(logits / cap)
        return logits


class QuantizedCacheModel(TransformersModel):
    """transformers' own quantized cache: an idea like KIVI's, with other groups.

    Args:
        row: whose dtype is a key of `TRANSFORMERS_BITS`.
        arguments: see `TransformersModel`; `max_model_len` too.

    """

    def __init__(self, row: CacheRow, arguments: dict[str, Any]) -> None:
        super().__init__(arguments)
        self.settings = dict(
            backend=row.options.get("backend", "quanto"),
            nbits=TRANSFORMERS_BITS[row.dtype],
            q_group_size=row.options.get("group_size", 32),
            residual_length=row.options.get("residual_length", 128),
        )
        if arguments["max_model_len"] < CHUNK:
            raise UserError(f"windows shorter than {CHUNK} tokens are never quantized", "longer")

    def hidden_states(self, window: Sequence[int], **_: Any) -> np.ndarray:
        """The final hidden states, teacher-forced chunk by chunk through the cache."""
        from transformers import QuantizedCache

        cache = QuantizedCache(config=self.model.config, **self.settings)
        chunks = [window[at : at + CHUNK] for at in range(0, len(window), CHUNK)]
        behind = partial(super().hidden_states, past_key_values=cache, use_cache=True)
        return np.concatenate([behind(chunk) for chunk in chunks])
