"""Everything that needs a GPU, in one command and less than eight minutes.

    python bench/gpu.py [--out DIR]

Each part runs in a process of its own with its own time limit, so that one that fails or hangs
costs only itself. DIR gets a log per part, the benchmarks' results and plots, and summary.json.
Exits 1 when a part failed, 2 where there is no GPU.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable


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


def parts(out: Path) -> list[Part]:
    """The programme; the limits sum to less than eight minutes."""
    tests = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/test_kernels_*.py"))
    tests += [
        f"tests/test_{name}.py" for name in ("attention_interface", "graphs", "ops", "products")
    ]
    # A name for each test, so that the log of one that hangs says which.
    pytest = [PYTHON, "-m", "pytest", "-v", "-p", "no:cacheprovider"]
    saved = ["--benchmark-max-time=0.3", f"--benchmark-json={out / 'micro.json'}"]
    encode = [PYTHON, "bench/encode.py", "--shape", "Llama-2-7B", "--dtype", "bfloat16"]
    encode += ["--lengths", "16384,65536", "--plain-up-to", "65536"]
    return [
        Part("device", ["nvidia-smi"], 10),
        Part("tests", [*pytest, f"--junitxml={out / 'tests.xml'}", *tests], 210),
        Part("kernels", [PYTHON, "bench/kernels.py", "--out", str(out)], 120),
        Part("encode", [*encode, "--out", str(out)], 80),
        Part("micro", [*pytest, "bench/micro.py", "--benchmark-only", *saved], 30),
        Part("plots", [PYTHON, "bench/plots.py", "--out", str(out)], 25),
    ]


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
    outcomes = []
    for part in parts(out):
        outcomes.append(run_part(part, out))
        # After every part: what is known survives even this process.
        summary = [asdict(outcome) for outcome in outcomes]
        (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        last = outcomes[-1]
        print(f"{last.name:10} {last.status:10} {last.seconds:6.1f} s  {last.log}", flush=True)
    return int(any(outcome.status != "passed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
