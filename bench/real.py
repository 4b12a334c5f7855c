"""Evaluates HOMER and other methods on a real pretrained model, far beyond its limit.

    python bench/real.py --text NOVEL … [--model FOLDER] [--out FOLDER] [--hours H] [NAME …]

Runs the evaluations below one after another, the most telling ones first. Each is a `homer eval` in
its own process, and writes a run folder. You can stop it at any moment: the next call goes on from
there, and asks only the new questions if their numbers were raised. `--share 0.2` asks a fifth of
the questions, `--hours` starts no run after that time, `--list` only prints the commands.
`bench/tables.py` makes the tables of bench/README.md from the folders. `bench/smollm2.py` makes the
checkpoint. Without a GPU, everything takes about eight hours on two cores.
"""

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# A relative path, so that the command that a run records is short.
RESULTS = Path(os.path.relpath(ROOT / "bench" / "results" / "real"))
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
HOMER = [
    *(sys.executable, "-c"),
    "import sys; from homer_triton.cli import main; sys.argv[0] = 'homer'; main()",
]
# The model answers better without its chat template, with every method. The defaults were tuned on
# seed 0.
COMMON = ["--no-chat-template", "--dtype", "bfloat16", "--seed", "1"]
WHOLE = ("pi", "ntk", "yarn")
# The paper's method, with the chunk and target length that it recommends: half of the limit.
PAPER = ["--selection", "paper", "--recompute", "none"]
PAPER += ["--max-chunk-len", "4096", "--target-len", "4096"]
# The finished cache is as long as a window: the 3,000 tokens right before a segment, and tokens
# chosen from the rest. Since the suffix is so long, chunks take the whole limit.
PERPLEXITY = ["--max-length", "8x", "--segments", "4", "--dtype", "bfloat16"]
PERPLEXITY += ["--suffix-len", "3000", "--target-len", "4096", "--max-chunk-len", "8192"]


@dataclass(frozen=True)
class Run:
    """`homer eval TASK`, and its arguments without model, texts, samples and folder.

    samples: how many questions at each length (and at each depth, if the task has depths); texts:
    whether it reads the novels; calibrated: whether it needs the paper's bias.
    """

    name: str
    task: str
    samples: dict[str, int]
    arguments: list[str]
    texts: bool = False
    calibrated: bool = False

    def command(self, model: Path, texts: list[str], out: Path, share: float) -> list[str]:
        """The arguments of `homer`; share: the part of the questions to ask."""
        command = ["eval", self.task, *self.arguments]
        if self.samples:
            numbers = {n: max(1, round(share * count)) for n, count in self.samples.items()}
            command += ["--lengths", ",".join(numbers)]
            command += ["--samples", ",".join(f"{n}:{count}" for n, count in numbers.items())]
        if self.texts:
            command += [part for text in texts for part in ("--text", text)]
        return [*command, "--model", str(model), "-o", str(out / self.name)]


def ask(task: str, method: str, samples: dict[str, int], name: str = "", *more: str) -> Run:
    """A method's questions of a task, in their own folder, since methods differ in cost."""
    arguments = ["--methods", method, *COMMON, *more]
    folder = f"{task}-{name or method}"
    return Run(folder, task, samples, arguments, task == "needles", "paper" in more)


FEW = {"2x": 4, "4x": 2}
# On chips without instructions for bfloat16, float32 is faster.
FLOAT32 = ("--dtype", "float32")
# RULER's needles among needles that look the same.
ALIKE = "niah_multikey_2,niah_multikey_3"
RUNS = (
    ask("needles", "homer", {"1x": 4, "2x": 12, "4x": 6, "8x": 3}),
    ask("passkey", "homer", {"1x": 4, "2x": 12, "4x": 6, "8x": 3}),
    *(ask(task, "plain", {"1x": 4}) for task in ("needles", "passkey")),
    ask("needles", "read", {"1x": 2, "2x": 4, "4x": 2}, "", *FLOAT32),
    ask("passkey", "read", {"1x": 2, "2x": 4, "4x": 2}, "", *FLOAT32),
    ask("ruler", "read", {"2x": 30}, "", *FLOAT32),
    ask("ruler", "read", {"4x": 20}, "read-alike", *FLOAT32, "--tasks", ALIKE),
    ask("ruler", "read", {"1024": 20, "2048": 20, "4096": 20}, "read-short", *FLOAT32),
    # Short texts too: they show what the model can do at all.
    ask("ruler", "plain", {"1024": 20, "2048": 20, "4096": 20}),
    ask("ruler", "homer", {"2x": 60, "4x": 30, "8x": 12}),
    *(ask(task, "retrieval", FEW) for task in ("needles", "passkey")),
    ask("ruler", "retrieval", {"2x": 60, "4x": 30}),
    *(ask(task, "sequential", FEW) for task in ("needles", "passkey")),
    ask("ruler", "sequential", {"2x": 20, "4x": 8}),
    *(ask(task, "window", FEW) for task in ("needles", "passkey")),
    ask("ruler", "window", {"2x": 20, "4x": 8}),
    *(ask(task, "homer", FEW, "paper", *PAPER) for task in ("needles", "passkey")),
    ask("ruler", "homer", {"2x": 20}, "paper", *PAPER),
    Run("perplexity", "perplexity", {}, ["--methods", "window,homer", *PERPLEXITY], texts=True),
    Run("ablation", "ablation", {"2x": 1}, COMMON, texts=True),
    ask("needles", "appended", FEW),
    *(ask(task, "independent", FEW) for task in ("needles", "passkey")),
    ask("ruler", "independent", {"2x": 20}),
    *(ask(task, m, {"2x": 4}) for m in WHOLE for task in ("needles", "passkey")),
    *(ask("ruler", m, {"2x": 20}) for m in WHOLE),
)


def calibrate(model: Path, texts: list[str], out: Path) -> None:
    """Measure the paper's bias for its chunks once, on the novels."""
    bias = out / "calibration.safetensors"
    if not bias.is_file():
        command = ["calibrate", "--model", str(model), "--segment-len", "4096"]
        command += ["--num-segments", "20", "--dtype", "bfloat16", "-o", str(bias)]
        for text in texts:
            command += ["--text", text]
        subprocess.run([*HOMER, *command], env=ENVIRONMENT, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these runs; default: all")
    parser.add_argument("--model", type=Path, default=Path("out/smollm2"))
    parser.add_argument("--text", action="append", default=[], help="a novel in UTF-8; repeat it")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--hours", type=float, help="start no run after this many hours")
    parser.add_argument("--share", type=float, default=1.0, help="of the questions; raise it later")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    args = parser.parse_args()
    known = {run.name: run for run in RUNS}
    for wrong in (name for name in args.names if name not in known):
        print(f"The run {wrong!r} is not known; choose from {', '.join(known)}.", file=sys.stderr)
        return 2
    runs = [known[name] for name in args.names] or list(RUNS)
    missing = [file for file in args.text if not Path(file).is_file()]
    if not args.list and not (args.model / "config.json").is_file():
        print(f"{args.model} is no checkpoint; `make real` makes it there.", file=sys.stderr)
        return 2
    if missing or (any(run.texts or run.calibrated for run in runs) and not args.text):
        what = f"There is no file {missing[0]}" if missing else "No text is named"
        print(f"{what}; give a long novel with --text FILE, several for more.", file=sys.stderr)
        return 2
    begun, failed = time.monotonic(), False
    args.out.mkdir(parents=True, exist_ok=True)
    for run in runs:
        if args.hours is not None and time.monotonic() - begun > 3600 * args.hours:
            print(f"{run.name} and what follows is left for the next time.")
            break
        command = run.command(args.model, args.text, args.out, args.share)
        if run.calibrated:
            command += ["--calibration", str(args.out / "calibration.safetensors")]
        print("homer", *command, flush=True)
        if args.list:
            continue
        if run.calibrated:
            calibrate(args.model, args.text, args.out)
        failed |= subprocess.run([*HOMER, *command], env=ENVIRONMENT).returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
