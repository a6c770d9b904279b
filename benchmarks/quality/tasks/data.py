"""Where the data of a task lies, how it is read, and how to get it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kivi_vllm.cli.default_model import cache_folder
from kivi_vllm.cli.errors import UserError


@dataclass(frozen=True)
class DataSet:
    """A published data set that is not shipped with this project.

    Attributes:
        name: of its folder: `$KIVI_VLLM_CACHE/data/NAME`.
        command: the subcommand that uses it, for the remedy.
        origin: where it is published.
        download: fetches it into a folder, from a hub; may raise anything.

    """

    name: str
    command: str
    origin: str
    download: Callable[[Path], None]

    def folder(self, given: Path | None) -> Path:
        """The folder that the user gave, or the one in the cache."""
        return given if given is not None else cache_folder() / "data" / self.name

    def fetch(self, folder: Path) -> None:
        """Download everything into `folder`.

        Raises:
            UserError: the hub cannot be reached, or a package is missing.

        """
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self.download(folder)
        except ImportError as error:
            raise UserError(
                f"--download of {self.name} needs the package {error.name!r}",
                f"pip install {error.name}, or put the files into {folder} yourself",
            ) from None
        except Exception as error:  # whatever a hub's client raises
            first = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f"--download of {self.name} failed: {type(error).__name__}: {first[0][:300]}",
                f"is the hub reachable (HF_HUB_OFFLINE, HF_ENDPOINT)? Or get {self.origin} "
                f"elsewhere and put it into {folder}",
                status=1,
            ) from None

    def missing(self, path: Path) -> UserError:
        """The error for a file that is not there."""
        return UserError(
            f"{self.name}: there is no {path}",
            f"get {self.origin} and put it there; or name another folder with --data; or, where "
            f"a hub can be reached, run `evaluate.py {self.command} ... --download`",
        )


def read_jsonl(path: Path, fields: dict[str, type | tuple[type, ...]]) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines.

    Args:
        path: of the file.
        fields: what each row must have, with its types.

    Raises:
        UserError: a row is no object, or lacks a field; the message names the line.

    """
    return list(_rows(path, fields))


def _rows(path: Path, fields: dict[str, type | tuple[type, ...]]) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise _bad(path, number, f"is no JSON ({error})", fields) from None
            if not isinstance(row, dict):
                raise _bad(path, number, "is no JSON object", fields)
            for name, kind in fields.items():
                if name not in row:
                    raise _bad(path, number, f"has no {name!r}", fields)
                if not isinstance(row[name], kind):
                    what = f"has {name!r} of type {type(row[name]).__name__}"
                    raise _bad(path, number, what, fields)
            yield row


def _bad(path: Path, number: int, what: str, fields: Sequence[str] | dict[str, Any]) -> UserError:
    return UserError(
        f"{path}, line {number}, {what}", f"each line is an object with: {', '.join(fields)}"
    )


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as JSON lines, whole or not at all."""
    new = path.with_name(f"{path.name}.new-{os.getpid()}")
    with new.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    new.replace(path)
