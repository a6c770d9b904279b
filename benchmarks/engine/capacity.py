"""How many tokens fit into one memory, by cache dtype: `kivi-vllm plan`'s figures as JSON."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from benchmarks.common.command import Json, Memory, Model, folder_of, start
from benchmarks.common.files import check_folder, write_json
from benchmarks.common.machine import header
from benchmarks.common.tables import show
from kivi_vllm.cli.plan import CACHE_DTYPES, capacity, parse_memory


def command(
    model: Model = None,
    memory: Memory = "256MiB",
    max_model_len: Annotated[
        list[int] | None, typer.Option(min=128, help="Repeatable; default: 4096 and 8192.")
    ] = None,
    json_path: Json = None,
) -> None:
    """Ask vLLM's own accounting for every cache dtype; only the model's config is read."""
    check_folder("--json", json_path)
    size, folder = parse_memory(memory), folder_of(model)
    head = header("engine.capacity") | {"model": Path(folder).name, "memory_bytes": size}
    rows = [
        asdict(capacity(folder, dtype, size, length))
        for length in max_model_len or [4096, 8192]
        for dtype in CACHE_DTYPES
    ]
    for row in rows:
        del row["parts"]
    write_json(json_path, {"header": head, "rows": rows})
    show(pd.DataFrame(rows), forms={"tokens": ",d", "sequences": ".2f"}, by=["max_model_len"])


if __name__ == "__main__":
    start(command)
