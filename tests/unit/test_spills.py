"""The line about registers that Triton keeps in memory."""

from __future__ import annotations

import logging
from unittest import mock

import pytest
from triton import knobs

from kivi_vllm.ops.triton import spills


def loads(name: str, nbytes: int) -> None:
    """Triton loads a kernel that takes so many bytes a thread."""
    with mock.patch.object(spills, "_local_bytes", lambda _: nbytes):
        knobs.runtime.kernel_load_end_hook(None, 1, name, None, "")


@pytest.mark.parametrize(("version", "remedy"), [("3.6.0", "triton>=3.8"), ("3.9.0", "report it")])
def test_said_once_a_kernel(
    version: str, remedy: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spills, "_said", set())
    monkeypatch.setattr(spills.triton, "__version__", version)
    hooks = knobs.runtime.kernel_load_end_hook
    spills.watch()
    spills.watch()
    try:
        with caplog.at_level(logging.WARNING, "vllm.kivi_vllm"):
            loads("_combine", 0)
            loads("somebody_elses", 64)
            assert not caplog.messages
            loads("_store_blocks", 8292)
            loads("_store_blocks", 8292)
    finally:
        hooks.remove(spills._loaded)
    [line] = caplog.messages
    assert f"Triton {version} keeps 8292 bytes a thread of _store_blocks in memory" in line
    assert remedy in line


def test_without_a_driver() -> None:
    with mock.patch("ctypes.CDLL", side_effect=OSError):
        assert spills._local_bytes(1) == 0
