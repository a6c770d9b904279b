"""A fact early in a prompt of 7,000 tokens: `kivi4` answers as the full-precision cache does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.alone

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams

model, dtype = sys.argv[1:]
llm = LLM(model, kv_cache_dtype=dtype, max_model_len=8192, kv_cache_memory_bytes=512 << 20,
          enforce_eager=True, dtype="float32")  # bf16 is emulated on many a CPU
tokenizer = llm.get_tokenizer()
fact = "Remember this: the password of the old lighthouse is 'marigold'. "
filler = " ".join(f"On day {n} the keeper wrote down the wind and the tide." for n in range(3000))
question = " Question: what is the password of the old lighthouse? Answer: the password is '"
head, tail = tokenizer.encode(fact), tokenizer.encode(question)
middle = tokenizer.encode(filler)[: 7000 - len(head) - len(tail)]
prompt = head + middle + tail
sampling = SamplingParams(max_tokens=12, temperature=0, stop="'")
out = llm.generate([{"prompt_token_ids": prompt}], sampling)
print(json.dumps({"length": len(prompt), "text": out[0].outputs[0].text}))
"""


def start(model: Path, dtype: str, core: int) -> subprocess.Popen[str]:
    """An engine in a process of its own, on a core of its own."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment["VLLM_CPU_OMP_THREADS_BIND"] = str(core)
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(model), dtype],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> dict:
    """What it printed."""
    out, log = process.communicate(timeout=900)
    assert process.returncode == 0, log[-3000:]
    # vLLM may log a last word after ours.
    return json.loads(next(line for line in out.splitlines() if line.startswith("{")))


@pytest.mark.timeout(1000)
def test_fact_early_on(model: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    engines = [start(model, "auto", cores[0]), start(model, "kivi4", cores[-1])]
    try:
        full, quantized = [finish(engine) for engine in engines]
    finally:
        for engine in engines:
            engine.kill()
    assert full["length"] == quantized["length"] == 7000
    assert full["text"] == "marigold", "the model itself does not know: nothing is tested"
    assert quantized["text"] == full["text"]
