"""A pass key in filler text, with a bf16 and a 3-bit KV cache: KIVI's `long_context_example.py`.

    python examples/passkey.py [MODEL] [LINES] [DTYPE ...]

Without arguments: SmolLM2-135M-Instruct, 60 lines of filler (about 1,500 tokens), and `auto` beside
`kivi_k3v2`. KIVI's example has 12k tokens: 480 lines, for a model that is made for so many. By
length and depth, with scores: benchmarks/README.md, "Published evaluations".
"""

import os
import random
import subprocess
import sys

from kivi_vllm.cli.default_model import default_model

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
QUESTION = "What is the pass key? The pass key is"


def prompt(lines: int, key: int, depth: float) -> str:
    """The key after `depth` of the filler."""
    before = int(lines * depth)
    hidden = f"The pass key is {key}. Remember it. {key} is the pass key."
    return "\n".join([TASK, *[FILLER] * before, hidden, *[FILLER] * (lines - before), QUESTION])


def answer(model: str, dtype: str, prompts: dict[int, str]) -> None:
    """Ask one engine and print what it says."""
    from vllm import LLM, SamplingParams

    kivi = {"kivi": {"residual_length": 32}} if "kivi" in dtype else {}
    llm = LLM(
        model,
        kv_cache_dtype=dtype,
        additional_config=kivi,
        kv_cache_memory_bytes=1 << 30,
        enforce_eager=True,
    )
    found = llm.generate(list(prompts.values()), SamplingParams(temperature=0, max_tokens=10))
    print(f"\n=== {dtype}")
    for key, one in zip(prompts, found, strict=True):
        size = len(one.prompt_token_ids or [])
        print(f"{size} tokens, key {key}: [{QUESTION}{one.outputs[0].text!r}]", flush=True)


def main() -> None:
    """One cache in this process; several each in a process of its own."""
    given = sys.argv[1:] or [str(default_model())]
    model, lines, *dtypes = given if len(given) > 1 else [*given, "60"]
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # no further processes
    if len(dtypes) == 1:
        keys = random.Random(0).sample(range(10_000, 100_000), 4)
        prompts = {key: prompt(int(lines), key, (i + 0.5) / 4) for i, key in enumerate(keys)}
        answer(model, dtypes[0], prompts)
        return
    for dtype in dtypes or ["auto", "kivi_k3v2"]:
        subprocess.run([sys.executable, __file__, model, lines, dtype], check=True)


if __name__ == "__main__":
    main()
