"""Runs everything that needs a GPU, in less than eight minutes.

    python bench/gpu.py [--out DIR] [--rehearse]

The programme runs in stages. Every part has its own process and time limit, so one that fails or
hangs does not stop the others. The tests run in many processes at once, since compiling takes most
of their time. After every stage all logs, measurements and plots are packed into
DIR/results.tar.gz, and the outcomes into DIR/summary.json; there are no other files. Exits with 1
if a part failed, and with 2 if there is no GPU.

--rehearse runs everything at tiny sizes on the CPU, with the kernels in Triton's interpreter. Its
measurements mean nothing.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
PYTEST = [PYTHON, "-m", "pytest", "-v", "-p", "no:cacheprovider"]
COLLECTING_S = 30
# A line of a test's log. It has no outcome yet if the test hangs.
TEST = re.compile(r"^(tests/\S+?::.+?)(?: (PASSED|FAILED|ERROR|SKIPPED)\b.*)? *$", re.MULTILINE)
RUNNING: set[int] = set()  # the process groups of the parts
# If these tests fail, the measurements cannot be trusted.
VITAL = ("attention", "selection", "voting")


@dataclass(frozen=True)
class Scale:
    """The options in which the programme and its rehearsal differ.

    encodes: the options of each part that runs bench/encode.py; environment: variables for every
    part; patience: a factor for every time limit.
    """

    test_files: list[str]
    test_processes: int
    kernels: list[str]
    encodes: dict[str, list[str]]
    decode: list[str]
    layer: list[str]
    environment: dict[str, str]
    patience: int = 1


def full() -> Scale:
    """The programme for a GPU; the longest and rarest lengths come first."""
    kernel_tests = (str(path.relative_to(ROOT)) for path in ROOT.glob("tests/test_kernels_*.py"))
    others = ("attention_interface", "graphs", "ops", "products")
    half = ["--dtype", "bfloat16"]
    return Scale(
        [*sorted(kernel_tests), *(f"tests/test_{name}.py" for name in others)],
        15,
        [],
        {
            "encode-7B": [
                *("--shape", "Llama-2-7B", *half, "--lengths", "65536,262144,16384"),
                *("--plain-up-to", "65536", "--systems", "triton,triton+paper"),
            ],
            "encode-8B": [
                *("--shape", "Llama-3-8B", *half, "--lengths", "1048576,262144,65536"),
                *("--plain-up-to", "65536", "--systems", "triton,triton+paper"),
            ],
            "encode-50M": [
                *("--shape", "50M", *half, "--lengths", "65536", "--plain-up-to", "65536"),
                *("--systems", "triton,triton+graphs,triton+offload"),
            ],
        },
        [
            *("--shape", "Llama-3-8B", *half, "--rows", "800,4096", "--sequences", "1,8"),
            *("--tokens", "64", "--repeats", "2"),
        ],
        ["--shape", "Llama-2-7B", *half],
        {},
    )


def rehearsal() -> Scale:
    """The same on a CPU."""
    tiny = ["--shape", "tiny", "--dtype", "float32"]
    encode = [*tiny, "--plain-up-to", "24", "--start-method", "fork", "--systems"]
    return Scale(
        ["tests/test_kernels_activation.py"],
        2,
        ["--tiny"],
        {
            "encode-7B": [*encode, "triton,triton+paper", "--lengths", "16", "--leaf-batch", "1,2"],
            "encode-8B": [*encode, "triton", "--lengths", "24,16"],
            "encode-50M": [*encode, "triton,triton+graphs,triton+offload", "--lengths", "16"],
        },
        [
            *(*tiny, "--ops", "triton", "--rows", "8,16", "--sequences", "1,2"),
            *("--tokens", "1", "--repeats", "1"),
        ],
        [*tiny, "--ops", "triton", "--rows", "16"],
        {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        patience=10,
    )


@dataclass(frozen=True)
class Part:
    """A command that runs in the repository's root, and the seconds that it may take."""

    name: str
    command: list[str]
    limit_s: int


@dataclass(frozen=True)
class Outcome:
    """How a part ended; status: "passed", "failed" or "timed out"."""

    name: str
    status: str
    seconds: float
    command: str
    log: str


def stages(scale: Scale, out: Path, tests: list[list[str]]) -> list[list[Part]]:
    """The stages of the programme; the parts of a stage run side by side.

    The limits of all stages add up to less than eight minutes. tests: the tests of each process.
    """

    def bench(name: str, limit_s: int, *options: str, script: str = "") -> list[Part]:
        command = [PYTHON, f"bench/{script or name}.py", *options, "--out", str(out)]
        return [Part(name, command, limit_s * scale.patience)]

    def encode(name: str, limit_s: int) -> list[Part]:
        return bench(name, limit_s, *scale.encodes[name], script="encode")

    return [
        bench("device", 20),
        [Part(f"tests-{i}", [*PYTEST, *own], 80 * scale.patience) for i, own in enumerate(tests)],
        bench("kernels", 40, *scale.kernels),
        encode("encode-7B", 70),
        encode("encode-8B", 95),
        bench("decode", 60, *scale.decode),
        bench("layer", 15, *scale.layer),
        encode("encode-50M", 55),
        bench("plots", 10),
    ]


def deal_tests(scale: Scale, environment: dict[str, str]) -> list[list[str]]:
    """Deal the tests to processes, which mostly compile; a GPU's host has the cores for it.

    If the tests cannot be collected, one process gets the files, so that its log says why.
    """
    command = [*PYTEST[:3], "--collect-only", "-q", *PYTEST[4:], *scale.test_files]
    try:
        listed = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=COLLECTING_S * scale.patience,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return [scale.test_files]
    names = [line for line in listed.stdout.splitlines() if "::" in line]
    processes = min(scale.test_processes, len(names))
    return [names[i::processes] for i in range(processes)]


def end(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def stop(*_: object) -> None:
    """On SIGTERM: end the parts too; what they have done is still packed."""
    for group in list(RUNNING):
        end(group)
    sys.exit(128 + signal.SIGTERM)


def run_part(part: Part, out: Path, environment: dict[str, str]) -> Outcome:
    """Run a part to its end or its limit, with its output in a log.

    At the limit its children are ended too, since they would keep the GPU busy.
    """
    log = out / f"{part.name}.log"
    start = time.perf_counter()
    with log.open("w") as file:
        try:
            running = subprocess.Popen(
                part.command,
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        except OSError as error:
            file.write(f"{error}\n")
            return Outcome(part.name, "failed", 0.0, " ".join(part.command), log.name)
        RUNNING.add(running.pid)
        try:
            status = "passed" if running.wait(part.limit_s) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "timed out"
        finally:
            end(running.pid)
            running.wait()
            RUNNING.discard(running.pid)
    seconds = round(time.perf_counter() - start, 1)
    return Outcome(part.name, status, seconds, " ".join(part.command), log.name)


def run_stage(stage: list[Part], out: Path, environment: dict[str, str]) -> Iterator[Outcome]:
    """Run the parts side by side, and print each outcome."""
    with ThreadPoolExecutor(len(stage)) as together:
        for outcome in together.map(lambda part: run_part(part, out, environment), stage):
            print(f"{outcome.name:10} {outcome.status:10} {outcome.seconds:6.1f} s", flush=True)
            yield outcome


def count_tests(out: Path) -> dict[str, Any]:
    """How many tests passed and were skipped, and the names of all others."""
    ended: dict[str, str] = {}
    for log in sorted(out.glob("tests-*.log")):
        for name, status in TEST.findall(log.read_text(errors="replace")):
            ended[name] = status or ended.get(name, "")
    counts = {word.lower(): list(ended.values()).count(word) for word in ("PASSED", "SKIPPED")}
    bad = sorted(name for name, status in ended.items() if status not in ("PASSED", "SKIPPED"))
    return {**counts, "bad": bad}


def pack(out: Path, results: Path, outcomes: list[Outcome]) -> dict[str, Any]:
    """Write all results to an archive, and the outcomes to a summary; returns the summary.

    Each file is replaced as a whole.
    """
    device = results / "device.json"
    summary = {
        "parts": [asdict(outcome) for outcome in outcomes],
        "tests": count_tests(results),
        "device": json.loads(device.read_text()) if device.exists() else None,
    }
    temporary = out / "results.tmp"
    with tarfile.open(temporary, "w:gz") as archive:
        archive.add(results, "results")
    os.replace(temporary, out / "results.tar.gz")
    temporary.write_text(json.dumps(summary, indent=2) + "\n")
    os.replace(temporary, out / "summary.json")
    return summary


def report(summary: dict[str, Any]) -> None:
    """Print the last lines: how the tests went."""
    tests = summary["tests"]
    print(f"tests: {tests['passed']} passed, {tests['skipped']} skipped, {len(tests['bad'])} bad")
    for name in tests["bad"]:
        print(f"  {name}")
    vital = [name for name in tests["bad"] if any(word in name for word in VITAL)]
    if vital:
        print(f"DO NOT TRUST THE MEASUREMENTS: {len(vital)} tests of attention or selection failed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu")
    parser.add_argument("--rehearse", action="store_true", help="run at tiny sizes on the CPU")
    args = parser.parse_args()
    scale, out = rehearsal() if args.rehearse else full(), args.out.resolve()
    environment = {**os.environ, **scale.environment}
    probe = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    if not args.rehearse and subprocess.run([PYTHON, "-c", probe]).returncode:
        print("no GPU: PyTorch finds no CUDA device", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, stop)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder)
        for stage in stages(scale, results, deal_tests(scale, environment)):
            try:
                outcomes.extend(run_stage(stage, results, environment))
            finally:
                summary = pack(out, results, outcomes)
    report(summary)
    return int(any(outcome.status != "passed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
