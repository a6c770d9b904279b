"""The Python sources of vLLM 0.33.0, without installing it."""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VERSION = "0.33.0"


class SourcesUnavailable(RuntimeError):
    """The sources are neither in the cache nor to be had from a package index."""


def _cache_dir() -> Path:
    given = os.environ.get("KIVI_VLLM_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "kivi_vllm"


def _download_wheel(folder: Path) -> Path:
    # Named by platform and Python version: the wheel is only read, so it need not fit this machine.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", "3.12"]
    command += ["--platform", "manylinux_2_28_x86_64", "--retries", "1", "--timeout", "20"]
    command += ["--dest", str(folder), f"vllm=={VERSION}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    except subprocess.TimeoutExpired as error:
        raise SourcesUnavailable(f"vLLM {VERSION} could not be downloaded: {error}") from error
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip() or "pip said nothing").splitlines()[-1]
        raise SourcesUnavailable(f"vLLM {VERSION} could not be downloaded: {reason}")
    return wheels[0]


def vllm_033_sources() -> Path:
    """The folder with `vllm/**/*.py` and the METADATA of vLLM 0.33.0.

    It is kept in `$KIVI_VLLM_CACHE` (default `~/.cache/kivi_vllm`) and filled on first use.
    Raises SourcesUnavailable where it can be neither found nor filled.
    """
    target = _cache_dir() / f"vllm-{VERSION}-sources"
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # A sibling, so that the rename below stays within one file system and is atomic.
        partial = Path(tempfile.mkdtemp(prefix=target.name + ".", dir=target.parent))
    except OSError as error:
        raise SourcesUnavailable(f"no cache for vLLM {VERSION}: {error}") from error
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            zipfile.ZipFile(_download_wheel(Path(folder))) as wheel,
        ):
            names = [n for n in wheel.namelist() if n.endswith((".py", ".dist-info/METADATA"))]
            wheel.extractall(partial, names)
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was first
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target
