"""A vLLM that this plugin does not know: left alone, with one warning."""

from __future__ import annotations

from inspect import signature
from types import FunctionType, SimpleNamespace

import pytest
import vllm.logger

import tests.engine  # noqa: F401  (sets vLLM's environment before it is imported)
from kivi_vllm import plugin
from kivi_vllm.attention import hooks, versions
from kivi_vllm.attention.hooks import v032, wraps


@pytest.mark.parametrize(
    ("version", "supported"),
    [
        ("0.32.0", True),
        ("0.32.1+cpu", True),
        ("0.33.0", True),
        ("0.31.2", False),
        ("0.34.0", False),
        ("1.0", False),
        ("", False),
    ],
)
def test_supported(version: str, supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "vllm_version", lambda: version)
    ok, found = versions.supported_vllm()
    assert ok is supported
    assert version in found


def test_nothing_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    steps = [
        name
        for name, made in vars(wraps).items()
        if isinstance(made, FunctionType) and made.__module__ == wraps.__name__
        if not signature(made).parameters and not name.startswith("_")
    ]
    assert "attach_residual_to_layers" in steps
    for name in steps:
        monkeypatch.setattr(wraps, name, lambda name=name: called.append(name))
    assert hooks.of_this_version() is v032
    monkeypatch.setattr(v032, "register_dtypes", lambda: called.append("register_dtypes"))
    warnings: list[str] = []
    logger = SimpleNamespace(warning=lambda text, *values: warnings.append(text % values))
    monkeypatch.setattr(vllm.logger, "init_logger", {"vllm.kivi_vllm": logger}.__getitem__)
    monkeypatch.setattr(versions, "vllm_version", lambda: "0.31.2")
    plugin.register()
    assert not called
    [warning] = warnings
    assert "found vLLM 0.31.2, not one of 0.32, 0.33" in warning
    monkeypatch.setattr(versions, "vllm_version", lambda: "0.32.0")
    plugin.register()
    assert len(called) == 1 + len(steps)
