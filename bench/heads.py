"""Measures how well the votes of a model's heads find an answer.

    python bench/heads.py --text NOVEL … [--model FOLDER] [--samples N] [--out FILE]

One chunk of each text runs through the model, followed by its question. Then each way of joining
the heads' votes ranks the tokens of the chunk. The rank of an answer is the share of tokens with
more votes in their neighbourhood than the answer's worst token has; 0 is best. An answer counts as
kept if its rank is less than the share of a text that is kept: 0.023, for 384 of 16,384 tokens.
`bench/tables.py` makes a table of the results.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import homer_triton as ht
from homer_triton.cli.eval_runs import layout_of
from homer_triton.engine.retrieval import retrieval_heads
from homer_triton.evaluation.environment import describe_environment
from homer_triton.evaluation.needles import needles_in
from homer_triton.evaluation.questions import Cell, draw_sample
from homer_triton.evaluation.ruler import choose_tasks
from homer_triton.evaluation.samples import Sample, Task
from homer_triton.kernels.reference import spread
from homer_triton.selection import MOST_ROWS, VOTES
from homer_triton.storage.files import write_atomically
from homer_triton.text.tokens import split_input

OUT = Path(__file__).resolve().parent / "results" / "real" / "heads.json"
RULER = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt")
# 384 tokens of 16,384.
KEPT = 384 / 16384


def joins(model: ht.Llama) -> dict[str, Tensor]:
    """Ways of joining the heads, as weights [L, HQ]."""
    c = model.config
    layers = torch.arange(c.num_hidden_layers)[:, None].expand(-1, c.num_attention_heads)
    tree = 4 * c.num_hidden_layers // 5
    ways = {
        "all heads, every layer": layers >= 0,
        "all heads, layers of the tree": layers < tree,
        "all heads, upper half of those": (layers < tree) & (layers >= c.num_hidden_layers // 2),
        "all heads, the tree's last layer": layers == tree - 1,
        "all heads, the last layer": layers == c.num_hidden_layers - 1,
    }
    heads = retrieval_heads(model)
    if heads is not None:
        ways["retrieval heads"] = (heads.cpu() > 0) & (layers < tree)
    return {name: chosen.float() for name, chosen in ways.items()}


def votes(
    model: ht.Llama, parts: tuple[Tensor, Tensor, Tensor], weights: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The votes that each way of joining gives the context's tokens, [C].

    parts: token ids of prefix, context and suffix.
    """
    prefix, context, suffix = map(len, parts)
    given = {name: torch.zeros(prefix + context + suffix) for name in weights}
    for layer, q, k in model.queries_and_keys(torch.cat(parts), min(MOST_ROWS, suffix)):
        for name, by_layer in weights.items():
            if by_layer[layer].any():
                own = model.ops.score_rows(q, k, None, "softmax", "sum", by_layer[layer])
                given[name] += own[0]
    return {name: own[prefix : prefix + context] for name, own in given.items()}


def places(tokenizer: PreTrainedTokenizerBase, tokens: Tensor, sample: Sample) -> Iterator[slice]:
    """The answers' places among the tokens of a context; for a variable, its first assignment."""
    ends, text = [], ""
    for token in tokens.tolist():
        text += tokenizer.decode([token])
        ends.append(len(text))
    for answer in sample.answers:
        start = text.find(f"VAR {answer} =") if f"VAR {answer} =" in text else text.rfind(answer)
        if start >= 0:
            stop = text.index(answer, start) + len(answer)
            yield slice(
                next(i for i, end in enumerate(ends) if end > start),
                next(i for i, end in enumerate(ends) if end >= stop) + 1,
            )


def rank(own: Tensor, place: slice) -> float:
    """The share of tokens with more votes in their neighbourhood than the answer's worst token."""
    best = spread(own[None], VOTES.reach(len(own)))[0]
    return float((best > best[place].min()).float().mean())


def measure(
    model: ht.Llama, tasks: list[Task], samples: int, length: int, seed: int
) -> Iterator[dict[str, object]]:
    """Yield a line for each task and way of joining."""
    assert model.tokenizer is not None
    layout, weights = layout_of(model.tokenizer, False), joins(model)
    for task in tasks:
        ranks: dict[str, list[float]] = {name: [] for name in weights}
        for number in range(samples):
            depth = (number + 0.5) / samples if task.name == "needles" else None
            sample = draw_sample(model, Cell(task, length, depth, number), seed, layout)
            affixes = layout(sample.prompt, sample.instruction, sample.reply)
            parts = split_input(model, sample.context, *affixes, 0)
            given = votes(model, parts, weights)
            for place in places(model.tokenizer, parts[1], sample):
                for name, own in given.items():
                    ranks[name].append(rank(own, place))
        for name, found in ranks.items():
            yield {
                "task": task.name,
                "heads": name,
                "answers": len(found),
                "mean_rank": round(sum(found) / len(found), 4),
                "kept": round(sum(one < KEPT for one in found) / len(found), 3),
            }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("out/smollm2"))
    parser.add_argument("--text", action="append", required=True, help="a novel; repeat it")
    parser.add_argument("--samples", type=int, default=10, help="texts of each task")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a chunk")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    model = ht.load(args.model, device="cpu", dtype="bfloat16", ops="torch")
    count: Callable[[str], int] = lambda text: len(model.tokenizer.tokenize(text))  # noqa: E731
    novels = [Path(name).read_text(encoding="utf-8") for name in args.text]
    tasks = [needles_in(novels, count), *choose_tasks(RULER)]
    lines = list(measure(model, tasks, args.samples, args.length, args.seed))
    heads = retrieval_heads(model)
    found = {
        "environment": {**describe_environment("cpu"), "model": str(args.model)},
        "length": args.length,
        "retrieval_heads": [] if heads is None else heads.nonzero().tolist(),
        "heads": model.config.num_hidden_layers * model.config.num_attention_heads,
        "lines": lines,
    }
    text = json.dumps(found, indent=1) + "\n"
    write_atomically(args.out, lambda file: file.write_text(text, encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
