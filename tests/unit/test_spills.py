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


@pytest.mark.parametrize(("version", "lines"), [("3.6.0", 1), ("3.8.0", 0), ("3.9.0", 0)])
def test_said_once_a_kernel(
    version: str, lines: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spills, "_said", set())
    monkeypatch.setattr(spills.triton, "__version__", version)
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
        knobs.runtime.kernel_load_end_hook.remove(spills._loaded)
    assert len(caplog.messages) == lines
    for line in caplog.messages:
        assert "Triton 3.6.0 keeps 8292 bytes a thread of _store_blocks in memory" in line
        assert "pip install 'triton>=3.8'" in line


def test_without_a_driver() -> None:
    with mock.patch("ctypes.CDLL", side_effect=OSError):
        assert spills._local_bytes(1) == 0
