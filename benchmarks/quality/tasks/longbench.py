"""LongBench (Bai et al., arXiv 2308.14508): loading, prompts, truncation in the middle, scores.

The protocol is that of `pred.py` and `eval.py` in the repository THUDM/LongBench, greedy. One
difference: there an answer of `samsum` ends at its first line break but cannot begin with one; here
it goes on to its full length, and, as there, only its first line counts.
"""

from __future__ import annotations

import importlib.util
import shutil
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.tasks import longbench_metrics
from benchmarks.quality.tasks.data import DataSet, read_jsonl
from benchmarks.quality.tasks.items import Item
from benchmarks.quality.tasks.longbench_tasks import TASKS, Task
from benchmarks.quality.tasks.tokens import Tokens
from kivi_vllm.cli.errors import UserError

FIELDS: dict[str, type | tuple[type, ...]] = {
    "input": str,
    "context": str,
    "answers": list,
    "length": int,
    "dataset": str,
    "language": str,
    "all_classes": (list, type(None)),
    "_id": str,
}


def _download(folder: Path) -> None:
    from huggingface_hub import hf_hub_download

    path = hf_hub_download("THUDM/LongBench", "data.zip", repo_type="dataset")
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(".jsonl"):
                with archive.open(name) as source, (folder / Path(name).name).open("wb") as file:
                    shutil.copyfileobj(source, file)


DATA = DataSet(
    name="longbench",
    command="longbench",
    origin="the folder data/ in LongBench's data.zip (the hub's data set THUDM/LongBench)",
    download=_download,
)


def load(folder: Path, task: str) -> list[dict[str, Any]]:
    """The rows of `TASK.jsonl`, in LongBench's schema; `TASK_e` is LongBench-E's file."""
    base(task)
    path = folder / f"{task}.jsonl"
    if not path.is_file():
        raise DATA.missing(path)
    return read_jsonl(path, FIELDS)


def base(task: str) -> Task:
    """The task of a name, with or without LongBench-E's `_e`."""
    found = TASKS.get(task) or TASKS.get(task.removesuffix("_e"))
    if found is None:
        raise UserError(
            f"--task {task}: LongBench has no such task, or it is not an English one",
            f"one of: {', '.join(TASKS)}; with _e at the end for LongBench-E",
        )
    return found


def check_packages(tasks: Sequence[str]) -> None:
    """Refuse before hours of work what could not be scored after them."""
    scored = [task for task in tasks if base(task).metric is longbench_metrics.rouge_l]
    if scored and importlib.util.find_spec("rouge") is None:
        raise UserError(
            f"{', '.join(scored)}: scored with ROUGE-L, of the package 'rouge', which is not here",
            "pip install 'kivi-vllm[eval]', or name other tasks with --task",
        )


def prompt_limit(model_length: int) -> int:
    """Tokens to which LongBench shortens prompts for a model of this length.

    Its `model2maxlen.json` has 3,500 for 4k models, 7,500, 15,500 and 31,500 for 8k to 32k: 500
    less than the thousands.
    """
    limit = model_length // 1000 * 1000 - 500
    if limit <= 0:
        raise UserError(
            f"LongBench's prompts cannot be shortened for a model of {model_length} tokens",
            "give --max-length: tokens of a prompt",
        )
    return limit


def items(
    task: str, rows: Sequence[dict[str, Any]], tokens: Tokens, limit: int, chat: bool = False
) -> list[Item]:
    """The items of a task.

    Args:
        task: a name of `TASKS`, `_e` or not.
        rows: of its file.
        tokens: of the model.
        limit: tokens of a prompt: what is over is cut from its middle, before the chat template.
        chat: put the model's chat template around the prompts of those tasks where LongBench does.

    """
    kind = base(task)
    found = []
    for row in rows:
        prompt, cut = shortened(kind.prompt.format(**row), tokens, limit)
        ids = tokens.chat(prompt) if chat and kind.chat else tokens.encode(prompt)
        found.append(
            Item(
                task=task,
                id=row["_id"],
                prompt=ids,
                max_tokens=kind.max_tokens,
                expected=row["answers"],
                scores={"score": _scorer(kind, row["answers"], row["all_classes"] or [])},
                facts={"cut": cut, "length": row["length"]},
            )
        )
    return found


def shortened(prompt: str, tokens: Tokens, limit: int) -> tuple[str, int]:
    """LongBench's middle truncation: the first and the last `limit // 2` tokens, as text.

    Returns:
        the text, and how many tokens were cut out of its middle (0 if it was short enough).

    """
    ids = tokens.encode(prompt)
    if len(ids) <= limit:
        return prompt, 0
    half = limit // 2
    return tokens.decode(ids[:half]) + tokens.decode(ids[-half:]), len(ids) - 2 * half


def _scorer(kind: Task, answers: list[str], classes: list[str]) -> Callable[[str], float]:
    """The best score over the right answers."""

    def score(text: str) -> float:
        if kind.few_shot:
            text = text.lstrip("\n").split("\n")[0]
        return max((kind.metric(text, answer, classes) for answer in answers), default=0.0)

    return score
