"""The plugin on vLLM 0.33's real Python sources, without its compiled parts.

What runs there is vLLM's own: the dtype registry, argument parsing, the selector,
the attention layers of a real model on the meta device, their cache specs, the
grouping and the capacity. What does not is a forward pass.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engine import tiny_model
from tests.patches.vllm033 import SourcesUnavailable, vllm_033_sources

REPOSITORY = Path(__file__).parents[2]

PRELUDE = """
import json, sys
import vllm
from vllm import platforms
from vllm.platforms.cpu import CpuPlatform
platforms.current_platform = CpuPlatform()  # as `vllm bench` does where none is found
from kivi_vllm import plugin
from kivi_vllm.attention import hooks, versions
versions.vllm_version = lambda: vllm.__version__  # this tree has no metadata of its own
plugin.register()
plugin.register()
"""


def run(script: str, *args: str) -> Any:
    """The JSON that `script` prints last, run on the 0.33 sources."""
    try:
        sources = vllm_033_sources()
    except SourcesUnavailable as reason:
        pytest.skip(str(reason))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(sources), str(REPOSITORY)]),
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + script, *args],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_registry() -> None:
    found = run("""
from vllm.config.cache import CacheConfig, KV_CACHE_DTYPES, get_kv_cache_dtype_handler
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import get_kv_quant_mode
def accepted(name):
    try:
        return CacheConfig(cache_dtype=name).cache_dtype == name
    except ValueError:
        return False
names = ["kivi2", "kivi_k3v2", "kivi_k4v2", "kivi5"]
print(json.dumps({
    "version": vllm.__version__,
    "registry": hooks.of_this_version().__name__,
    "listed": [KV_CACHE_DTYPES.count(n) for n in names],
    "accepted": [accepted(n) for n in names],
    "stored": str(STR_DTYPE_TO_TORCH_DTYPE["kivi2"]),
    "mode": get_kv_quant_mode("kivi2").value,
    "backend": AttentionBackendEnum["KIVI"].get_class().__name__,
}))
""")
    assert found.pop("mode") > 0  # quantized; the value itself collides in 0.33.0
    assert found == {
        "version": "0.33.0",
        "registry": "kivi_vllm.attention.hooks.v033",
        "listed": [1, 1, 1, 0],
        "accepted": [True, True, True, False],
        "stored": "torch.uint8",
        "backend": "KiviAttentionBackend",
    }


@pytest.mark.slow
@pytest.mark.parametrize("residual", [0, 32], ids=lambda r: f"R{r}")
def test_layers_and_capacity(residual: int) -> None:
    found = run(
        """
from kivi_vllm.attention.hooks import capacity as plan
seen = {}
collect = plan._cache_specs
def collected(config):
    specs = collect(config)
    context = config.compilation_config.static_forward_context
    seen[config.cache_config.cache_dtype] = [
        (name.rsplit("layers.1.", 1)[1], type(spec).__name__, spec.page_size_bytes,
         context[name].get_attn_backend().get_name())
        for name, spec in specs.items() if "layers.1." in name
    ]
    return specs
plan._cache_specs = collected
options = {"kivi": {"residual_length": int(sys.argv[2])}}
tokens = {
    dtype: plan.capacity(sys.argv[1], dtype, 32 << 20, 1024, dtype="bfloat16",
                         max_num_batched_tokens=256, additional_config=extra).tokens
    for dtype, extra in (("auto", {}), ("kivi2", options))
}
print(json.dumps([seen, tokens]))
""",
        tiny_model(),
        str(residual),
    )
    seen, tokens = found
    page = 128 * 22 * 2  # tokens × bytes of one at D = 32 × kv heads
    assert [layer[:2] for layer in seen["auto"]] == [["self_attn.attn", "FullAttentionSpec"]]
    assert seen["auto"][0][3] == "CPU_ATTN"
    kivi = [
        ["self_attn.attn", "PageSpec", page, "KIVI"],
        ["self_attn.attn.kivi_ring", "RingSpec", page, "KIVI_RAW"],
    ]
    if residual:
        kivi += [[f"self_attn.attn.kivi_tail{i}", "TailSpec", page, "KIVI_RAW"] for i in (0, 1)]
    kivi.append(["self_attn.attn.kivi_sinks", "SinkSpec", page, "KIVI_RAW"])
    assert seen["kivi2"] == kivi
    blocks = (32 << 20) // (2 * page)
    # 8 pages, 6 of ring, one of sinks; each tail: (128 + 256) tokens in flight, and one more page.
    needed = 8 + 6 + 1 + (2 * 4 if residual else 0)
    assert tokens["kivi2"] == int(blocks / needed * 1024)
    assert tokens["auto"] == int((32 << 20) // (2 * 128 * 128 * 2) / 8 * 1024)
