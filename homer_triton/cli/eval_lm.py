"""`homer eval lm`: the tasks of EleutherAI's lm-evaluation-harness."""

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
from .help import QUESTIONS, TEXT
from .output import table
from .ranks import is_rank
from .settings import Settings

if TYPE_CHECKING:
    from ..evaluation.runs import Record

# The parts of the harness's results that are saved.
_KEPT = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better", "configs")


@dataclass(frozen=True, kw_only=True)
class LmRun(Run):
    """A run that starts over if it was stopped."""

    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="The folder for the results: config.json, predictions.jsonl and results.json.",
        ),
    ]


@with_groups(but=("devices",))
def lm(
    *,
    tasks: Annotated[
        str,
        typer.Option(
            "--tasks",
            metavar="LIST",
            help="Tasks, groups or tags of lm_eval, separated by commas.",
        ),
    ],
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="NAME",
            help="The method for requests longer than the context limit: any method of the other "
            "evaluations. Shorter requests go to the plain model.",
        ),
    ] = "homer",
    include_path: Annotated[
        Path | None,
        typer.Option(
            "--include-path",
            metavar="FOLDER",
            rich_help_panel=QUESTIONS,
            help="A folder with your own task files (YAML).",
            show_default="none",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            metavar="N",
            min=1,
            rich_help_panel=QUESTIONS,
            help="The most documents of each task.",
            show_default="all",
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            "--num-fewshot",
            metavar="N",
            min=0,
            rich_help_panel=QUESTIONS,
            help="How many examples stand before each question.",
            show_default="the task's own",
        ),
    ] = None,
    apply_chat_template: Annotated[
        bool,
        typer.Option(
            "--apply-chat-template",
            rich_help_panel=TEXT,
            help="Put the requests into the tokenizer's chat template.",
        ),
    ] = False,
    run: LmRun,
    settings: Settings,
) -> None:
    """Run tasks of EleutherAI's lm-evaluation-harness.

    Requests that fit the context limit go to the plain model. Of a longer request, the last whole
    lines (at most 128 tokens) are the suffix, and the method reads the rest. A stopped run starts
    over.

    Needs: pip install 'homer_triton[eval]'.

    \b
    Example:
      homer eval lm --model meta-llama/Llama-2-7b-hf \\
          --tasks longbench_hotpotqa --limit 50 -o runs/hotpotqa
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
    """The model's answer to a document, without the question, which is in the task's data."""
    names = ("target", "resps", "filtered_resps", *sample["metrics"])
    return _plain({name: sample[name] for name in names})


def _plain(content: Record) -> Record:
    """The content as JSON values: NumPy's numbers as numbers, unknown objects as text."""

    def convert(value: Any) -> Any:
        return value.item() if hasattr(value, "item") else str(value)

    plain: Record = json.loads(json.dumps(content, default=convert))
    return plain


def _table(results: Record) -> str:
    """A table with one line for each figure of each task."""
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
