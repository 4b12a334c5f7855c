"""How the method does on a real pretrained model, far past its limit, beside other ways.

    python bench/real.py --text NOVEL … [--model FOLDER] [--out FOLDER] [--hours H] [NAME …]

Runs the evaluations below one after another, each `homer eval` in a process of its own, and writes
a run folder for each; the most telling come first. Stopped at any moment, it goes on where it was
when it is started again, and a run whose numbers of questions were raised since only asks the new
ones. `--hours` ends it between two runs, `--list` prints the commands alone. `bench/tables.py`
makes the tables of bench/README.md from the folders. The checkpoint is the one that
`bench/smollm2.py` makes; without a GPU all of it takes about eight hours on two cores.
"""

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "real"
HOMER = [
    *(sys.executable, "-c"),
    "import sys; from homer_triton.cli import main; sys.argv[0] = 'homer'; main()",
]
# The model answers better without its chat template, by every method.
COMMON = ["--no-chat-template", "--dtype", "bfloat16"]
SHORT = "window,retrieval,sequential,independent"
WHOLE = "plain,pi,ntk,yarn"
# The paper's method with the chunk and the target that it recommends: half of the limit.
PAPER = ["--selection", "paper", "--recompute", "none"]
PAPER += ["--max-chunk-len", "4096", "--target-len", "4096"]


@dataclass(frozen=True)
class Run:
    """An evaluation: its folder's name, and `homer eval`'s arguments but model, texts and folder.

    texts: whether it reads the novels; calibrated: whether it needs the paper's bias.
    """

    name: str
    arguments: list[str]
    texts: bool = False
    calibrated: bool = False


def ask(task: str, group: str, methods: str, samples: str, *settings: str) -> Run:
    """Questions of a task, so many at each length: "2x:12,4x:6"; at each depth, where there are
    some.
    """
    lengths = ",".join(entry.split(":")[0] for entry in samples.split(","))
    arguments = [task, "--methods", methods, "--lengths", lengths, "--samples", samples]
    arguments += [*COMMON, *settings]
    calibrated = "paper" in settings
    return Run(f"{task}-{group}", arguments, task == "needles", calibrated)


PERPLEXITY = ["perplexity", "--max-length", "8x", "--segments", "4", "--dtype", "bfloat16"]
RUNS = (
    ask("needles", "homer", "homer", "2x:12,4x:6,8x:3"),
    ask("passkey", "homer", "homer", "2x:12,4x:6,8x:3"),
    ask("ruler", "plain", "plain", "2048:20,4096:20"),
    ask("ruler", "homer", "homer", "2x:60,4x:30,8x:12"),
    ask("ruler", "short", SHORT, "2x:20,4x:12"),
    ask("needles", "short", SHORT, "2x:4,4x:3"),
    ask("passkey", "short", SHORT, "2x:4,4x:3"),
    Run("perplexity", [*PERPLEXITY, "--methods", "window,homer"], texts=True),
    ask("needles", "paper", "homer", "2x:4,4x:2", *PAPER),
    ask("passkey", "paper", "homer", "2x:4,4x:2", *PAPER),
    ask("ruler", "paper", "homer", "2x:10", *PAPER),
    Run(
        "ablation",
        ["ablation", "--lengths", "2x", "--samples", "2", *COMMON],
    ),
    ask("needles", "whole", WHOLE, "2x:4"),
    ask("passkey", "whole", WHOLE, "2x:4"),
    ask("ruler", "whole", WHOLE, "2x:8"),
)


def calibrate(model: Path, texts: list[str], out: Path) -> Path:
    """The paper's bias for its chunks, measured once on the novels."""
    bias = out / "calibration.safetensors"
    if not bias.is_file():
        command = ["calibrate", "--model", str(model), "--segment-len", "4096"]
        command += ["--num-segments", "20", "--dtype", "bfloat16", "-o", str(bias)]
        for text in texts:
            command += ["--text", text]
        subprocess.run([*HOMER, *command], cwd=ROOT, check=True)
    return bias


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these runs; default: all")
    parser.add_argument("--model", type=Path, default=Path("out/smollm2"))
    parser.add_argument("--text", action="append", default=[], help="a novel in UTF-8; repeat it")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--hours", type=float, help="begin no run after so many hours")
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
        command = ["eval", *run.arguments, "--model", str(args.model)]
        command += ["-o", str(args.out / run.name)]
        if run.texts:
            command += [part for text in args.text for part in ("--text", text)]
        print("homer", *command, flush=True)
        if args.list:
            continue
        if run.calibrated:
            command += ["--calibration", str(calibrate(args.model, args.text, args.out))]
        failed |= subprocess.run([*HOMER, *command], cwd=ROOT).returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
