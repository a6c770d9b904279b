"""Word problems after worked examples, with bf16, 3-bit and 4-bit KV caches: KIVI's `example.py`.

    python examples/gsm8k.py [MODEL] [DTYPE ...]

Without arguments: SmolLM2-135M-Instruct, and `auto`, `kivi_k3v2` and `kivi4`, one after the other.
The problems in `gsm8k.jsonl` are in GSM8K's format: the first 6 are the examples, the others are
asked. For the benchmark itself, see benchmarks/README.md, "Published evaluations".
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from kivi_vllm.cli.default_model import default_model

SHOTS = 6
DTYPES = ["auto", "kivi_k3v2", "kivi4"]


def main() -> None:
    """One cache in this process; several each in a process of its own."""
    model, *dtypes = sys.argv[1:] or [str(default_model())]
    if len(dtypes) == 1:
        ask(model, dtypes[0])
        return
    for dtype in dtypes or DTYPES:
        subprocess.run([sys.executable, __file__, model, dtype], check=True)


def ask(model: str, dtype: str) -> None:
    """Ask everything of one engine and print what it says."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # no further processes
    from vllm import LLM, SamplingParams

    lines = Path(__file__).with_name("gsm8k.jsonl").read_text().splitlines()
    problems = [json.loads(line) for line in lines]
    shots = "".join(
        f"Question: {p['question']}\nAnswer: {p['answer']}\n\n" for p in problems[:SHOTS]
    )
    prompts = [f"{shots}Question: {p['question']}\nAnswer:" for p in problems[SHOTS:]]
    kivi = {"kivi": {"residual_length": 32}} if "kivi" in dtype else {}
    llm = LLM(
        model,
        kv_cache_dtype=dtype,
        additional_config=kivi,
        max_model_len=2048,
        kv_cache_memory_bytes=256 << 20,
        enforce_eager=True,
    )
    found = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=96, stop=["Question:"]))
    print(f"\n=== {dtype}: {len(found[0].prompt_token_ids or [])} tokens of prompt")
    right = 0
    for problem, one in zip(problems[SHOTS:], found, strict=True):
        said = one.outputs[0].text.strip()
        same = said.rpartition("#### ")[2] == problem["answer"].rpartition("#### ")[2]
        right += same
        print(f"{problem['question']}\n  {'right' if same else 'wrong'}: {said!r}")
    print(f"{right} of {len(found)} right", flush=True)


if __name__ == "__main__":
    main()
