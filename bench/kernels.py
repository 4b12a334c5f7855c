"""Times every kernel beside PyTorch on a GPU, at the shapes of Llama-2-7B and Llama-3-8B.

    python bench/kernels.py [--out DIR] [--tiny]

Each result is checked before it is timed. A wrong one is reported, and the column `checked` says
so. Calls are replayed from CUDA graphs over inputs that together exceed the cache, so neither the
host nor a warm cache is measured; `timed_by` says which calls no graph can capture. The limits
(copy bandwidth, matrix rate) are measured in the same run. Writes DIR/kernels.csv after each case.
Without a GPU, nothing is measured or written; --tiny runs everything in Triton's interpreter
(TRITON_INTERPRET=1), whose times mean nothing.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import measure  # noqa: E402
import movement  # noqa: E402
import op_cases  # noqa: E402
import torch  # noqa: E402
from device import limits  # noqa: E402
from measure import ON_GPU, Measurement, describe  # noqa: E402
from op_cases import MODELS, TINY, Case, Sizes  # noqa: E402


def cases_of(m: Sizes) -> list[Callable[[], Case]]:
    """All cases at one model's shapes; each call draws its own inputs."""
    chosen = [
        partial(case, m, batch)
        for batch in (1, m.siblings)
        for case in (op_cases.selection_case, op_cases.voting_case)
    ]
    others = (
        movement.merging_case,
        movement.averaging_case,
        movement.gathering_case,
        movement.norm_case,
        movement.add_norm_case,
        movement.activation_case,
        movement.rotary_case,
        movement.closing_case,
    )
    return [
        partial(op_cases.stored_case, m),
        partial(op_cases.all_rows_case, m),
        partial(op_cases.kept_rows_case, m),
        *(partial(op_cases.decoding_case, m, batch) for batch in (1, m.chunks)),
        *chosen,
        *(partial(case, m) for case in others),
    ]


def report(case: Case, problem: str) -> None:
    print(f"{case.op} ({case.name}): {problem}", file=sys.stderr, flush=True)


def is_right(case: Case) -> bool:
    """Check a case, and report if it is wrong."""
    try:
        case.check()
    except Exception as error:  # whatever a compiler or a driver raises; the others still run
        report(case, f"failed: {describe(error)}")
        measure.synchronize()  # raises if the device is lost; nothing else can run then
        return False
    return True


def measure_case(
    drawn: list[Case], checked: bool, limit: dict[str, float], about: tuple[str, ...]
) -> list[Measurement]:
    """Time each system of a case."""
    case = drawn[0]
    lines = []
    for system, call in case.systems.items():
        try:
            timing = measure.time_calls([copy.systems[system] for copy in drawn])
        except Exception as error:
            report(case, f"no {system}: {describe(error)}")
            measure.synchronize()
            continue
        work = case.bytes if case.limit == "copy" else case.flops
        line = Measurement(
            case.op,
            case.name,
            system,
            timing.median_ms,
            timing.low_ms,
            timing.high_ms,
            case.bytes,
            case.flops,
            case.limit,
            work / timing.median_ms / limit[case.limit],
            measure.count_launches(call) if case.counts_launches else 0,
            timing.by,
            checked,
            *about,
        )
        print(
            f"{line.op:22} {line.case:28} {system:7} {line.median_ms * 1e3:9.1f} us"
            f"  {line.fraction:6.1%} of {case.limit}  {line.launches or '':2} {timing.by}",
            flush=True,
        )
        lines.append(line)
    return lines


def limit_lines(limit: dict[str, float], about: tuple[str, ...]) -> list[Measurement]:
    """The limits as lines of the CSV, so that plots need no other file."""
    amounts = {"copy": (round(limit["copy"]), 0), "matrix": (0, round(limit["matrix"]))}
    return [
        Measurement("limit", name, "torch", 1.0, 1.0, 1.0, *of, name, 1.0, 0, "", True, *about)
        for name, of in amounts.items()
    ]


def measure_all(models: tuple[Sizes, ...], path: Path) -> int:
    """Measure every case of these models; returns how many of ours failed.

    The CSV is written after each.
    """
    about, limit = measure.about(), limits()
    print(f"copy {limit['copy'] / 1e9:.2f} TB/s, matrix {limit['matrix'] / 1e9:.0f} TFLOP/s")
    lines = limit_lines(limit, about)
    failed = 0
    for draw in (draw for m in models for draw in cases_of(m)):
        drawn = op_cases.copies(draw)
        checked = is_right(drawn[0])
        found = measure_case(drawn, checked, limit, about)
        failed += not checked or all(line.system != "triton" for line in found)
        lines += found
        measure.write_csv(path, lines)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="default: bench/results, or out/tiny with --tiny")
    parser.add_argument("--tiny", action="store_true", help="small shapes for Triton's interpreter")
    args = parser.parse_args()
    if not ON_GPU and not args.tiny:
        print("no GPU: nothing measured")
        return 0
    torch.manual_seed(0)
    out = args.out or ROOT / ("out/tiny" if args.tiny else "bench/results")
    return 1 if measure_all(TINY if args.tiny else MODELS, out / "kernels.csv") else 0


if __name__ == "__main__":
    sys.exit(main())
