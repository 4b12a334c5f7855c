"""What the evaluations share around a task: the folder, the progress bar and the tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .eval_options import Opened, Run, describe_config
from .inputs import compose
from .output import at_terminal, note, print_json, readable_bytes, table
from .ranks import is_first
from .settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..evaluation.questions import Layout
    from ..evaluation.runs import Record, RunFolder
    from ..storage.files import Inputs


def open_folder(
    run: Run,
    opened: Opened,
    homer: Settings,
    settings: Record,
    inputs: Inputs | None = None,
) -> RunFolder:
    """The run's folder. A stopped run of the same settings continues there.

    inputs: files that are read besides the checkpoint and the calibration. Raises the errors of
    `RunFolder`, and `ValueError` if the folder holds one of the files that are read.
    """
    from ..evaluation.environment import describe_environment
    from ..evaluation.runs import RunFolder
    from ..storage.files import check_folder

    model = opened.model
    check_folder("-o", run.output, {**(inputs or {}), "--model": opened.checkpoint, **homer.files})
    settings = {
        **settings,
        "fingerprint": model.fingerprint,
        "dtype": str(model.dtype).removeprefix("torch."),
        "homer": describe_config(homer.config),
    }
    environment = {"model": opened.checkpoint, **describe_environment(model.device)}
    folder = RunFolder(run.output, settings, environment, opened.ranks)
    if folder.records and folder.is_first:
        note(f"{run.output} has {len(folder.records):,} predictions already; the run continues.")
    return folder


def layout_of(tokenizer: PreTrainedTokenizerBase, chat: bool) -> Layout:
    """A function that lays out prefix and suffix around a text, for a question about it.

    chat: whether to use the tokenizer's chat template. The beginning of an answer, if a task has
    one, starts the model's turn.
    """

    def lay_out(question: str, instruction: str = "", reply: str = "") -> tuple[str | None, str]:
        parts = compose(tokenizer, instruction or None, None, [question], chat, ask_later=False)
        return parts.prefix, (parts.suffix or question) + reply

    return lay_out


@contextmanager
def progress(task: str, total: int) -> Iterator[Callable[[], Any]]:
    """A progress bar of `total` answers; yields the function that advances it by one."""
    from tqdm import tqdm

    shown = at_terminal() and is_first()
    with tqdm(total=total, desc=task, unit="answer", disable=not shown) as bar:
        yield bar.update


def report(folder: RunFolder, metrics: Record, text: str, as_json: bool) -> None:
    """Print the figures as JSON, or as a table with the names of the folder's files."""
    if as_json:
        print_json({"output": str(folder.path), **metrics})
    else:
        print(
            f"{text}\n\n{folder.path}: {', '.join(sorted(p.name for p in folder.path.iterdir()))}"
        )


def length_table(metrics: Record, limit: int) -> str:
    """A table of accuracies and costs, one line for each method at each length. If there are
    several tasks, it has the accuracy of each.
    """
    tasks: dict[str, list[str]] = {}
    for row in metrics.get("by_task", []):
        tasks.setdefault(row["task"], []).append(f"{row['accuracy']:.1%}")
    rows = [
        [
            row["method"],
            f"{row['length'] / limit:g}×",
            f"{row['length']:,}",
            *share_cells(row),
            "" if row["held"] is None else f"{row['held']:.1%}",
            *of_tasks,
            *cost_cells(row),
            str(row["errors"]),
        ]
        for row, *of_tasks in zip(metrics["by_length"], *tasks.values(), strict=True)
    ]
    shares = ["right", "95 % interval", "kept", *tasks]
    costs = ["per question", "peak memory"]
    return table(["method", "limit", "tokens", *shares, *costs, "errors"], rows)


def share_cells(row: Record) -> list[str]:
    """An accuracy and its interval."""
    return [
        f"{row['accuracy']:.1%} ({round(row['right'], 2):g}/{row['total']})",
        f"{row['low']:.1%} to {row['high']:.1%}",
    ]


def cost_cells(row: Record) -> list[str]:
    """The time and the peak memory of a question, empty where they are unknown."""
    seconds, peak = row["seconds"], row["peak_bytes"]
    return [
        "" if seconds is None else f"{seconds:.2f} s",
        "" if peak is None else readable_bytes(peak),
    ]


def perplexity_table(metrics: Record) -> str:
    """Two tables with a line for each method: perplexities over everything scored, and by where a
    token last occurred in the text.
    """

    def figures(row: Record, middle: str, low: str, high: str, digits: int) -> list[str]:
        if row.get(middle) is None:
            return ["none", "none"]
        return [f"{row[middle]:,.{digits}f}", f"{row[low]:,.{digits}f} to {row[high]:,.{digits}f}"]

    def perplexity(row: Record) -> list[str]:
        return figures(row, "perplexity", "low", "high", 2)

    def times_window(row: Record) -> list[str]:
        return figures(row, "times_window", "times_window_low", "times_window_high", 3)

    overall = [
        [row["method"], *perplexity(row), str(row["segments"]), str(row["errors"])]
        for row in metrics["overall"]
    ]
    by_reference = [
        [
            *(row["method"], row["reference"], f"{row['tokens']:,}"),
            *perplexity(row),
            *times_window(row),
        ]
        for row in metrics["by_reference"]
    ]
    scored = ["perplexity", "95 % interval"]
    compared = ["reference", "tokens", *scored, "of the window's", "95 % interval"]
    return (
        table(["method", *scored, "segments", "errors"], overall)
        + "\n\nBeyond the limit, by where a token last occurred in the text:\n\n"
        + table(["method", *compared], by_reference)
    )
