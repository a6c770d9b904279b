"""Engines on a pretended GPU: `python -m tests.cuda.child TASKS_JSON RESULTS_FILE`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

REPOSITORY = Path(__file__).parents[2]

ENVIRONMENT = {
    "TRITON_INTERPRET": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}

SETTINGS: dict[str, Any] = dict(
    max_model_len=512,
    max_num_seqs=4,
    max_num_batched_tokens=256,
    # PyTorch's operators where vLLM has compiled ones.
    compilation_config={"mode": 0, "custom_ops": ["none"], "cudagraph_mode": "NONE"},
    kernel_config={"ir_op_priority": {"rms_norm": ["native"], "fused_add_rms_norm": ["native"]}},
)
"""vLLM's engine arguments unless a task says otherwise."""

GRAPHS: dict[str, Any] = dict(
    enforce_eager=False,
    compilation_config={
        **SETTINGS["compilation_config"],
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [1, 4],
    },
)
"""Those for FULL graphs of decode steps."""


def results_in_child(
    sources: Path, folder: Path, tasks: dict[str, dict[str, Any]], **environment: str
) -> dict[str, dict[str, Any]]:
    """What each task gives in a fresh process with vLLM's `sources` and this environment.

    A task is the arguments of `answers`, or of `refusal` if it has a `capability`. Its
    result is what that returns, or `error`, a traceback.
    """
    path = folder / "results.json"
    done = subprocess.run(
        [sys.executable, "-m", __name__, json.dumps(tasks), str(path)],
        cwd=folder,
        env={
            **os.environ,
            **ENVIRONMENT,
            **environment,
            "PYTHONPATH": os.pathsep.join([str(sources), str(REPOSITORY)]),
        },
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads(path.read_text())


class ReferenceOperators:
    """`reference`'s operators for a `DeviceStep`, whose tensors they read as kernels do."""

    def __init__(self, graphs: Any) -> None:
        self.graphs = graphs
        from kivi_vllm.ops import reference
        from kivi_vllm.ops.triton import operators

        self.reference = reference
        self.limits, self.step, self.prepare = operators.limits, operators.step, operators.prepare
        self.calls = 0

    def _step(self, step: Any) -> Any:
        from kivi_vllm.ops.step import Row, Step

        starts, ends = step.query_start_loc.tolist(), step.seq_lens.tolist()
        rows = [
            Row(i, q0, q1, end - (q1 - q0), end)
            for i, (q0, q1, end) in enumerate(zip(starts[:-1], starts[1:], ends, strict=True))
            if q1 > q0
        ]
        return Step(rows, step.block_table, step.per_position, step.decode_len, step.last_visible)

    def store_blocks(self, step: Any, *args: Any) -> None:
        with self.graphs.in_a_kernel():
            self.reference.store_blocks(self._step(step), *args)

    def attend(self, step: Any, *args: Any) -> None:
        self.calls += 1
        with self.graphs.in_a_kernel():
            self.reference.attend(self._step(step), *args)

    def store_ring(self, step: Any, *args: Any) -> None:
        with self.graphs.in_a_kernel():
            self.reference.store_ring(self._step(step), *args)


@dataclasses.dataclass
class Steps:
    """What KIVI's metadata builders were asked for."""

    rows: int = 0
    padding: int = 0
    with_drafts: int = 0

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Count."""
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        from kivi_vllm.attention.metadata import KiviMetadataBuilder

        build = KiviMetadataBuilder.build

        def counting(builder: Any, prefix: int, m: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(builder.kv_cache_spec, FullAttentionSpec):  # ring or tail
                return build(builder, prefix, m, *args, **kwargs)
            lens = (m.query_start_loc[1:] - m.query_start_loc[:-1])[: m.num_reqs]
            self.rows += int((lens > 0).sum())
            self.padding += int((lens == 0).sum())
            self.with_drafts += int(((lens > 1) & (lens <= builder.decode_len)).sum())
            return build(builder, prefix, m, *args, **kwargs)

        with mock.patch.object(KiviMetadataBuilder, "build", counting):
            yield


def answers(
    graphs: Any,
    engine_args: dict[str, Any],
    batches: list[list[list[int]]],
    max_tokens: int,
    operators: str = "triton",
    images: list[list[list[int]]] | None = None,
) -> dict[str, Any]:
    """Greedy answers of one engine to each batch of prompts, and what it did.

    Args:
        graphs: the `Graphs` of this process.
        engine_args: of `tests.engine.engine`, with the model's path as `model`.
        batches: prompts as token ids; one batch after the other.
        max_tokens: of each answer.
        operators: "triton" or "reference".
        images: seeds of those in each prompt, if the model sees any.

    """
    import torch

    from kivi_vllm.ops import dispatch
    from tests.engine import engine, generate
    from tests.models.pictures import Prompt, ask, image_processors

    reference, steps = ReferenceOperators(graphs), Steps()
    captured, replayed = graphs.captured, graphs.replayed
    from kivi_vllm.ops.triton import operators as triton_operators

    with contextlib.ExitStack() as stack:
        # The interpreter has no 16-bit numbers of a GPU: float32, whatever does not fit there.
        limits = dataclasses.replace(triton_operators.limits, model_dtypes=(torch.float32,))
        stack.enter_context(mock.patch.object(triton_operators, "limits", limits))
        if operators == "reference":
            chosen = mock.Mock(return_value=reference)
            stack.enter_context(mock.patch.object(dispatch, "operators", chosen))
        if images:
            stack.enter_context(image_processors())
        llm = stack.enter_context(engine(**{**SETTINGS, **engine_args}))
        stack.enter_context(steps.watched())
        if images:
            seeing = [map(Prompt, *batch) for batch in zip(batches, images, strict=True)]
            found = [ask(llm, [*prompts], max_tokens) for prompts in seeing]
        else:
            found = [generate(llm, prompts, max_tokens) for prompts in batches]
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    return dict(
        answers=[[dataclasses.asdict(answer) for answer in batch] for batch in found],
        runner=f"{type(runner).__module__}.{type(runner).__qualname__}",
        steps=dataclasses.asdict(steps),
        reference_calls=reference.calls,
        captured=graphs.captured - captured,
        replayed=graphs.replayed - replayed,
    )


def refusal(
    graphs: Any, engine_args: dict[str, Any], capability: tuple[int, int]
) -> dict[str, Any]:
    """The exception with which a configuration is refused on a GPU of that capability."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    from tests.cuda import fake_device
    from tests.engine import SETTINGS as COMMON

    fake_device.become(tuple(capability))
    type(current_platform).get_device_capability.cache_clear()
    try:
        EngineArgs(**{**COMMON, **SETTINGS, **engine_args}).create_engine_config()
    except Exception as error:
        return dict(type=type(error).__name__, message=str(error))
    finally:
        fake_device.become(fake_device.CAPABILITY)
        type(current_platform).get_device_capability.cache_clear()
    return dict(type=None, message="")


def _main() -> None:
    tasks, path = json.loads(sys.argv[1]), Path(sys.argv[2])
    from tests.cuda import fake_device

    fake_device.install()
    from tests.cuda.graphs import emulate

    graphs = emulate()
    from tests.cuda import copies

    copies.install()
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    from tests.cuda import stand_ins

    stand_ins.install()
    found = {}
    for name, task in tasks.items():
        do = refusal if "capability" in task else answers
        try:
            found[name] = do(graphs, **task)
        except Exception:
            found[name] = dict(error=traceback.format_exc())
    path.write_text(json.dumps(found))


if __name__ == "__main__":
    _main()
