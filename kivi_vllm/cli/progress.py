"""Progress of slow steps on stderr: a spinner on a terminal, lines and a heartbeat elsewhere."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column

HEARTBEAT_S = 15.0

console = Console(stderr=True, highlight=False)

Update = Callable[[str], None]


@contextmanager
def step(title: str) -> Iterator[Update]:
    """Show `title` and the time that it takes; call what is yielded to say what goes on."""
    start = time.monotonic()
    try:
        with _spinner(title) if console.is_terminal else _heartbeat(title, start) as update:
            yield update
    except BaseException:
        _say(f"✗ {title} ({time.monotonic() - start:.0f} s)")
        raise
    _say(f"✓ {title} ({time.monotonic() - start:.0f} s)")


def note(text: str) -> None:
    """Say something that is no step."""
    _say(text)


def _say(text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


@contextmanager
def _spinner(title: str) -> Iterator[Update]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
        TextColumn(
            "{task.fields[now]}",
            style="dim",
            markup=False,
            table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
        ),
    )
    with Progress(*columns, console=console, transient=True, expand=True) as bar:
        task = bar.add_task(title, total=None, now="")
        yield lambda text: bar.update(task, now=text)


@contextmanager
def _heartbeat(title: str, start: float) -> Iterator[Update]:
    latest = [""]
    done = threading.Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT_S):
            _say(f"  {time.monotonic() - start:.0f} s {latest[0][:100]}")

    _say(f"  {title} …")
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield lambda text: latest.__setitem__(0, text)
    finally:
        done.set()
        thread.join()
