"""Mistakes of use: shown in one line with their remedy, never as a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from kivi_vllm.cli.progress import console


class UserError(Exception):
    """Something that the user can mend.

    Args:
        message: what is wrong, with the value and the limit.
        remedy: what to do about it.
        status: exit status of the command line; 2 where the command line itself is at fault.
    """

    def __init__(self, message: str, remedy: str = "", status: int = 2) -> None:
        super().__init__(message)
        self.remedy = remedy
        self.status = status


@contextmanager
def mistakes_shown() -> Iterator[None]:
    """End the process with a message and its remedy where a UserError comes, or Ctrl-C."""
    try:
        yield
    except UserError as error:
        for name, text in (("[bold red]error:[/]", str(error)), ("[bold]remedy:[/]", error.remedy)):
            if text:
                console.print(name, end=" ")
                console.print(text, markup=False, soft_wrap=True)
        sys.exit(error.status)
    except KeyboardInterrupt:
        sys.exit(130)
