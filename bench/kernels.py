"""Every kernel against PyTorch on the same GPU, at the shapes of Llama-2-7B and Llama-3-8B.

    python bench/kernels.py [--out DIR]

Each result is checked before it is timed, and a kernel whose result is wrong gets no line. The
limits (copy bandwidth, matrix rate) are measured in the same run. Writes DIR/kernels.csv anew after
each case. Without a GPU nothing is measured and nothing written.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import measure  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from cases import MODELS, Case, attention_cases, nbytes, random, selection_cases  # noqa: E402
from measure import Measurement  # noqa: E402
from movement import closing_case, movement_cases  # noqa: E402


def cases(model: str) -> Iterator[Case]:
    """Everything at one model's shapes."""
    yield from attention_cases(model)
    yield from selection_cases(model)
    yield from movement_cases(model)
    yield closing_case(model)


def limits() -> dict[str, float]:
    """Copy bandwidth in bytes, and matrix rate in FLOPs, per millisecond."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    # By events: in a graph it would be another kind of copy, and slower.
    copy = (
        2
        * nbytes(source)
        / triton.testing.do_bench(lambda: target.copy_(source), return_mode="median")
    )
    a, b = random(8192, 8192), random(8192, 8192)
    matrix = 2 * 8192**3 / measure.time_ms(lambda: a @ b)[0]
    return {"copy": copy, "matrix": matrix}


def measure_case(case: Case, limit: dict[str, float], about: tuple[str, ...]) -> list[Measurement]:
    """Check a case, then time each system that there is."""
    case.check()
    lines = []
    for system, call in case.systems.items():
        try:
            call()
        except RuntimeError as error:
            print(f"{case.op} ({case.name}): no {system}: {str(error).splitlines()[0]}")
            continue
        median, low, high = measure.time_ms(call)
        work = case.bytes if case.limit == "copy" else case.flops
        launches = measure.count_launches(call) if case.counts_launches else 0
        fraction = work / median / limit[case.limit]
        line = Measurement(
            case.op,
            case.name,
            system,
            median,
            low,
            high,
            case.bytes,
            case.flops,
            case.limit,
            fraction,
            launches,
            *about,
        )
        print(
            f"{line.op:22} {line.case:28} {system:7} {median * 1e3:9.1f} us"
            f"  {fraction:6.1%} of {case.limit}  {launches or ''}",
            flush=True,
        )
        lines.append(line)
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: nothing measured")
        return 0
    torch.manual_seed(0)
    about = measure.about()
    limit = limits()
    print(f"copy {limit['copy'] / 1e9:.2f} TB/s, matrix {limit['matrix'] / 1e9:.0f} TFLOP/s")
    # The limits are lines of their own, so that plots need no other file.
    lines = [
        Measurement("limit", name, "torch", 1.0, 1.0, 1.0, *amounts, name, 1.0, 0, *about)
        for name, amounts in {
            "copy": (round(limit["copy"]), 0),
            "matrix": (0, round(limit["matrix"])),
        }.items()
    ]
    failed = 0
    for case in (case for model in MODELS for case in cases(model)):
        try:
            lines += measure_case(case, limit, about)
        except Exception as error:  # what a compiler or a driver raises must not cost the others
            failed += 1
            reason = f"{type(error).__name__}: {error}"
            print(f"{case.op} ({case.name}) failed: {reason}", file=sys.stderr, flush=True)
            torch.cuda.synchronize()  # raises where the device is lost, and the rest with it
        measure.write_csv(args.out / "kernels.csv", lines)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
