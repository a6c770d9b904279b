"""How this project's pictures look, and what has to be there to draw them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kivi_vllm.cli.errors import UserError

COLOURS = ("#444444", "#c58a2b", "#86b6dd", "#4f8fc4", "#a03b5c", "#0b4f8a", "#6d9a4b", "#7a5ca8")
MARKERS = "osD^vPX*"


def check_matplotlib() -> None:
    """Refuse where matplotlib is missing; otherwise let it draw into files."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("matplotlib is not installed", "pip install matplotlib", status=1) from None
    matplotlib.use("Agg")


def read(path: Path, script: str, look: Callable[[Any], object]) -> Any:
    """A result's JSON; UserError if it is none of this script's.

    `look` raises KeyError or TypeError if what is to be drawn is not there.
    """
    try:
        data = json.loads(path.read_text())
        look(data)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no result of {script}: {error!r}", "measure") from error
    return data


def new_axes(title: str) -> tuple[Any, Any]:
    """A figure of one panel."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.set_title(title, fontsize=10)
    axes.grid(True, which="both", alpha=0.3)
    return figure, axes


def save(figure: Any, name: str) -> Iterator[Path]:
    """Write a figure as PNG and SVG; yields the files."""
    import matplotlib.pyplot as plt

    for suffix in ("png", "svg"):
        path = Path(f"{name}.{suffix}")
        figure.savefig(path, dpi=150)
        yield path
    plt.close(figure)
