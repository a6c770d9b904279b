"""The documentation: its figures, its links, and what the README must have."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from kivi_vllm.config import DTYPES

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    page
    for page in (*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("*/*/*.md"))
    if not any(part.startswith(".") for part in page.relative_to(ROOT).parts)
)
README = (ROOT / "README.md").read_text()


@pytest.fixture
def figures() -> ModuleType:
    """`docs/figures/make.py`, which is no module of a package."""
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs/figures/make.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_figures_show_what_the_code_says(figures: ModuleType) -> None:
    for name, draw in figures.FIGURES.items():
        assert (figures.FOLDER / name).read_text() == draw(), "run python docs/figures/make.py"


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [("page", "HEAD_SIZE", 64), ("sequence", "RESIDUAL", 64), ("blocks", "WINDOW", 512)],
)
def test_figures_of_another_format_differ(
    figures: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, setting: str, value: int
) -> None:
    """The negative control."""
    monkeypatch.setattr(figures, setting, value)
    assert figures.FIGURES[f"{name}.svg"]() != (figures.FOLDER / f"{name}.svg").read_text()


def _anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {text.strip().replace(" ", "-") for text in words}


def _broken(page: Path) -> list[str]:
    """Links of a page to files or headings that are not there."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if path.startswith("http"):
            continue
        if not target.exists() or (
            anchor and target.suffix == ".md" and anchor not in _anchors(target)
        ):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert _broken(page) == []


def test_broken_links_are_noticed(tmp_path: Path) -> None:
    """The negative control."""
    page = tmp_path / "page.md"
    page.write_text("# A heading\n[a](#a-heading) [b](#another) [c](missing.md) [d](page.md#x)\n")
    assert _broken(page) == ["#another", "missing.md", "page.md#x"]


def test_the_readme_names_all_environment_variables() -> None:
    sources = (path.read_text() for path in (ROOT / "kivi_vllm").rglob("*.py"))
    read = {name for text in sources for name in re.findall(r"\bKIVI_VLLM_[A-Z_]+\b", text)}
    assert {"KIVI_VLLM_CPU_ISA", "KIVI_VLLM_CACHE"} <= read
    assert read == set(re.findall(r"\bKIVI_VLLM_[A-Z_]+\b", README))


def test_the_readme_names_all_dtypes_and_is_short() -> None:
    assert all(f"`{name}`" in README for name in DTYPES)
    assert len(README.split()) <= 1100
