"""Everything that needs a GPU, in one command and less than eight minutes.

    python bench/gpu.py [--out DIR]

Each part runs in a process of its own with its own time limit, so that one that fails or hangs
costs only itself; the tests in a dozen at once, since compiling takes their time. DIR gets a log
per part, the benchmarks' results and plots, and summary.json. Exits 1 when a part failed, 2 where
there is no GPU.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
COLLECTING_S = 15


@dataclass(frozen=True)
class Part:
    """A command, run from the repository's root, and the seconds that it may take."""

    name: str
    command: list[str]
    limit_s: int


@dataclass(frozen=True)
class Outcome:
    """How a part ended; status is "passed", "failed" or "timed out"."""

    name: str
    status: str
    seconds: float
    command: str
    log: str


def stages(out: Path, tests: list[list[str]]) -> list[list[Part]]:
    """The programme, stage after stage, the parts of a stage side by side; the stages' limits sum
    to less than eight minutes. tests: those of each process.
    """
    # A name for each test, so that the log of one that hangs says which.
    pytest = [PYTHON, "-m", "pytest", "-v", "-p", "no:cacheprovider"]
    saved = ["--benchmark-max-time=0.3", f"--benchmark-json={out / 'micro.json'}"]
    kernels = [PYTHON, "bench/kernels.py", "--out", str(out)]
    plots = [PYTHON, "bench/plots.py", "--out", str(out)]
    return [
        [Part("device", ["nvidia-smi"], 5)],
        [
            Part(f"tests-{i}", [*pytest, f"--junitxml={out / f'tests-{i}.xml'}", *own], 130)
            for i, own in enumerate(tests)
        ],
        [Part("kernels", kernels, 100)],
        [Part("encode-7B", encode(out, "Llama-2-7B", "16384,65536,262144", 65536), 60)],
        [Part("encode-8B", encode(out, "Llama-3-8B", "65536,262144,1048576", 262144), 90)],
        [Part("offload", encode(out, "Llama-2-7B", "65536", 0, "--offload"), 20)],
        [Part("graphs", encode(out, "50M", "65536", 0, "--cuda-graphs"), 15)],
        [Part("no-graphs", encode(out, "50M", "65536", 65536), 15)],
        [Part("micro", [*pytest, "bench/micro.py", "--benchmark-only", *saved], 15)],
        [Part("plots", plots, 10)],
    ]


def encode(out: Path, shape: str, lengths: str, plain_up_to: int, *options: str) -> list[str]:
    """A run of bench/encode.py in bfloat16."""
    sizes = ["--lengths", lengths, "--plain-up-to", str(plain_up_to), "--systems", "triton"]
    command = [PYTHON, "bench/encode.py", "--shape", shape, "--dtype", "bfloat16", *sizes]
    return [*command, *options, "--out", str(out)]


def deal_tests(processes: int = 12) -> list[list[str]]:
    """The tests that a GPU is for, dealt to processes, which mostly compile: a GPU's host has the
    cores for it. Files alone where they cannot be collected, so that a log says why.
    """
    files = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/test_kernels_*.py"))
    files += [
        f"tests/test_{name}.py" for name in ("attention_interface", "graphs", "ops", "products")
    ]
    command = [PYTHON, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    try:
        listed = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=COLLECTING_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return [files]
    names = [line for line in listed.stdout.splitlines() if "::" in line]
    return [names[i::processes] for i in range(min(processes, len(names)))]


def run_part(part: Part, out: Path) -> Outcome:
    """Run a part to its end or its limit, its output in a log. At the limit its own children go
    too, which would hold on to the GPU.
    """
    log = out / f"{part.name}.log"
    start = time.perf_counter()
    with log.open("w") as file:
        try:
            running = subprocess.Popen(
                part.command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True
            )
        except OSError as error:
            file.write(f"{error}\n")
            return Outcome(part.name, "failed", 0.0, " ".join(part.command), log.name)
        try:
            status = "passed" if running.wait(part.limit_s) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "timed out"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
            running.wait()
    seconds = round(time.perf_counter() - start, 1)
    return Outcome(part.name, status, seconds, " ".join(part.command), log.name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu")
    out = parser.parse_args().out.resolve()
    probe = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    if subprocess.run([PYTHON, "-c", probe]).returncode:
        print("no GPU: PyTorch finds no CUDA device", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for stage in stages(out, deal_tests()):
        with ThreadPoolExecutor(len(stage)) as together:
            for outcome in together.map(run_part, stage, [out] * len(stage)):
                outcomes.append(outcome)
                # After every part: what is known survives even this process.
                summary = [asdict(known) for known in outcomes]
                (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
                took = f"{outcome.status:10} {outcome.seconds:6.1f} s"
                print(f"{outcome.name:10} {took}  {outcome.log}", flush=True)
    return int(any(outcome.status != "passed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
