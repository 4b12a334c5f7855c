"""`homer eval lm`: the tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .eval_options import Run, split_list
from .eval_runs import open_folder, report
from .groups import with_groups
from .output import table
from .ranks import is_rank
from .settings import Settings

if TYPE_CHECKING:
    from ..evaluation.runs import Record

# What is kept of all that the harness returns.
_KEPT = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better", "configs")


@dataclass(frozen=True, kw_only=True)
class LmRun(Run):
    """A run that begins anew."""

    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="Where the run goes: config.json, predictions.jsonl and results.json.",
        ),
    ]


@with_groups(but=("devices",))
def lm(
    *,
    tasks: Annotated[
        str,
        typer.Option("--tasks", metavar="LIST", help="Names of tasks, groups or tags of lm_eval."),
    ],
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="NAME",
            help="What reads requests that are longer than the context limit: any of the methods "
            "of the other evaluations. Shorter ones are the plain model's.",
        ),
    ] = "homer",
    include_path: Annotated[
        Path | None,
        typer.Option(
            "--include-path",
            metavar="FOLDER",
            help="Task files (YAML) of your own.",
            show_default="none",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            metavar="N",
            min=1,
            help="Take no more documents of each task.",
            show_default="all",
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            "--num-fewshot",
            metavar="N",
            min=0,
            help="Examples before each question.",
            show_default="the task's own",
        ),
    ] = None,
    apply_chat_template: Annotated[
        bool,
        typer.Option(
            "--apply-chat-template", help="Put the requests into the tokenizer's chat template."
        ),
    ] = False,
    run: LmRun,
    settings: Settings,
) -> None:
    """Run tasks of EleutherAI's lm-evaluation-harness (the `eval` extra).

    Requests that fit the context limit go through the plain model. Of longer ones, the last whole
    lines (at most 128 tokens) are the suffix, and the method reads the rest. A run that was stopped
    begins anew.

    Example: homer eval lm --model meta-llama/Llama-2-7b-hf --tasks longbench_hotpotqa --limit 50 -o
    runs/hotpotqa
    """
    from ..evaluation.environment import describe_environment
    from ..extras import require
    from ..storage.files import write_atomically

    config = settings.config
    if is_rank():
        raise ValueError("`homer eval lm` runs as one process; start it without torchrun.")
    require("lm_eval", "`homer eval lm`")
    from ..evaluation.lm import HomerLM, evaluate_tasks, open_tasks

    names = split_list(tasks)
    known = open_tasks(names, include_path)
    with run.open() as opened:
        tokenizer = opened.tokenizer
        if apply_chat_template and not tokenizer.chat_template:
            raise ValueError("The tokenizer has no chat template; leave --apply-chat-template out.")
        harness = HomerLM(opened.model, method, config, apply_chat_template)
        described = {
            "task": "lm",
            "method": method,
            "tasks": names,
            "include_path": None if include_path is None else str(include_path),
            "limit": limit,
            "num_fewshot": num_fewshot,
            "chat_template": apply_chat_template,
        }
        folder = open_folder(run, opened, settings, described)
        found = evaluate_tasks(harness, names, known, limit, num_fewshot, apply_chat_template)
        for task, samples in found["samples"].items():
            for sample in samples:
                cell = {"id": f"{task}/{sample['doc_id']}/{sample['filter']}", "task": task}
                folder.complete(cell, partial(_outcome, sample))
        results = {name: found[name] for name in _KEPT if name in found}
        versions = {"lm_eval": found["lm_eval_version"]}
        results["environment"] = {**describe_environment(opened.model.device), **versions}
        results = _plain(results)
        text = json.dumps(results, ensure_ascii=False, indent=2) + "\n"
        path = folder.path / "results.json"
        write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))
        report(folder, {"results": results["results"]}, _table(results["results"]), run.as_json)


def _outcome(sample: Record) -> Record:
    """What the model answered to a document; what it was asked is in the data."""
    names = ("target", "resps", "filtered_resps", *sample["metrics"])
    return _plain({name: sample[name] for name in names})


def _plain(content: Record) -> Record:
    """The same as JSON holds it: NumPy's numbers as numbers, anything else by its name."""

    def convert(value: Any) -> Any:
        return value.item() if hasattr(value, "item") else str(value)

    plain: Record = json.loads(json.dumps(content, default=convert))
    return plain


def _table(results: Record) -> str:
    """A line for each figure of each task."""
    rows = []
    for task, figures in results.items():
        for name, value in figures.items():
            metric, _, chosen = name.partition(",")
            if chosen and not metric.endswith("_stderr"):
                error = figures.get(f"{metric}_stderr,{chosen}")
                rows.append([task, metric, chosen, _number(value), _number(error)])
    return table(["task", "metric", "filter", "value", "standard error"], rows)


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float | int) else "none"
