"""Progress bars on stderr: bars on a terminal, lines and a heartbeat elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import MofNCompleteColumn, Progress

from kivi_vllm.cli.progress import console, step


@contextmanager
def bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how much of `total` is done; call what is yielded with the number."""
    if not console.is_terminal:
        with step(title) as update:
            yield lambda done: update(f"{done} of {total}")
        return
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done: progress.update(task, completed=done)
