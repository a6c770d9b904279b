"""Progress bars on stderr: bars on a terminal, lines and a heartbeat elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from kivi_vllm.cli.progress import console, step


@contextmanager
def bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how much of `total` is done; call what is yielded with the number."""
    if not console.is_terminal:
        with step(title) as update:
            yield lambda done: update(f"{done} of {total}")
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done: progress.update(task, completed=done)
