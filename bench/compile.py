"""Compiles every kernel at real sizes for several chips, none of which needs to be there.

    python bench/compile.py [--update]

Prints a table of registers, spills, shared memory and matrix instructions, and writes it to
bench/results/compile.csv. Exits with 1, and leaves the file unchanged, when a kernel

- spills, or asks for more shared memory than its chip has,
- lost its matrix instructions, or the compiler serialises them,
- lost the asynchronous copies that feed them,
- is compiled again for another number of rows,
- needs clearly more registers than the file says (`--update` accepts this one).
"""

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path

# Compiling needs the real JIT: set before triton is imported.
os.environ["TRITON_INTERPRET"] = "0"
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import triton  # noqa: E402
from compile_cases import DESCRIBED, ROW_COUNTS, cases, cases_of_rows, descriptor_cases  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "compile.csv"
# Registers that a kernel may need beyond the committed count of the same release of Triton.
REGISTER_SLACK = 8
# Asynchronous copies; the ones by tensor descriptors come first.
COPIES = ("cp.async.bulk.tensor", "cp.async")
# The kernels that must use matrix instructions.
MATRIX_KERNELS = ("causal_attention", "attend_one", "totals", "votes")


@dataclass(frozen=True)
class Chip:
    """A target, the bytes of shared memory that a program can have, and its matrix instructions.

    matrix: the first instruction is for large tiles, the last for short ones; descriptors: whether
    the chip copies by tensor descriptors.
    """

    target: GPUTarget
    shared_limit: int
    matrix: tuple[str, ...]
    descriptors: bool = False


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 163 * 1024, ("mma.sync",)),
    "sm_90a": Chip(GPUTarget("cuda", 90, 32), 227 * 1024, ("wgmma", "mma.sync"), True),
    "sm_100a": Chip(GPUTarget("cuda", 100, 32), 227 * 1024, ("tcgen05.mma", "mma.sync"), True),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 64 * 1024, ("mfma",)),
}
# Compilations are counted for this chip.
COUNTED_ON = "sm_90a"


@dataclass(frozen=True)
class Built:
    """One line of the table.

    spills: bytes per thread, on AMD chips vector registers; serialised: whether ptxas makes every
    asynchronous matrix product wait; copies: the instruction that copies into shared memory while
    the threads go on.
    """

    kernel: str
    case: str
    chip: str
    registers: int
    spills: int
    shared: int
    shared_limit: int
    matrix: str
    serialised: bool
    copies: str
    triton: str


class StandInDriver:
    """What Triton's JIT asks a driver before a launch; there is no device behind it."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_benchmarker(self) -> Callable[..., float]:
        raise RuntimeError("nothing can be timed without a device")


def resources(kernel: CompiledKernel, chip: Chip) -> tuple[int, int]:
    """(registers, spills) of a compiled kernel, from its machine code."""

    def number(pattern: str, text: str) -> int:
        found = re.search(pattern + r":\s*(\d+)", text)
        if found is None:
            raise ValueError(f"{kernel.name}: no {pattern} in what the compiler reports")
        return int(found[1])

    if chip.target.backend == "hip":
        text = kernel.asm["amdgcn"]
        return number(r"\.vgpr_count", text), number(r"\.vgpr_spill_count", text)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run(
            [tool, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    return number("REG", text), number("STACK", text) + number("LOCAL", text)


Compiled = tuple[str, CompiledKernel]


def compiling(chip: Chip) -> list[Compiled]:
    """Make every launch compile only, for a chip; returns the list that collects the kernels."""
    triton.runtime.driver.set_active(StandInDriver(chip.target))
    compiled: list[Compiled] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: object, **kwargs: object) -> CompiledKernel:
        kernel = run(self, *args, **{**kwargs, "warmup": True})
        compiled.append((self.fn.__name__.strip("_").removesuffix("_kernel"), kernel))
        return kernel

    JITFunction.run = compile_only
    return compiled


def build(chip_name: str) -> list[Built]:
    """Compile every case for one chip. Runs in a process of its own."""
    chip = CHIPS[chip_name]
    compiled, lines = compiling(chip), []
    for case, call in (*cases(), *(descriptor_cases() if chip.descriptors else ())):
        compiled.clear()
        call()
        lines += [describe(name, case, chip_name, kernel) for name, kernel in compiled]
    return lines


def count_compilations(chip_name: str) -> dict[tuple[str, str], int]:
    """How often each kernel of a case is compiled over `ROW_COUNTS`. Runs in a process of its own.

    These are within one power of two: kernels are compiled on purpose for each power.
    """
    compiled = compiling(CHIPS[chip_name])
    hashes: dict[tuple[str, str], set[str]] = defaultdict(set)
    for rows in ROW_COUNTS:
        for case, call in cases_of_rows(rows):
            compiled.clear()
            call()
            for name, kernel in compiled:
                hashes[name, case].add(kernel.hash)
    return {key: len(of) for key, of in hashes.items()}


def describe(name: str, case: str, chip_name: str, kernel: CompiledKernel) -> Built:
    """The line of the table for a compiled kernel."""
    chip = CHIPS[chip_name]
    registers, spills = resources(kernel, chip)
    text = kernel.asm["ptx" if chip.target.backend == "cuda" else "amdgcn"]
    matrix = next((instruction for instruction in chip.matrix if instruction in text), "")
    return Built(
        name,
        case,
        chip_name,
        registers,
        spills,
        kernel.metadata.shared,
        chip.shared_limit,
        matrix,
        matrix == "wgmma" and is_serialised(text, chip.target.arch),
        next((instruction for instruction in COPIES if instruction in text), ""),
        triton.__version__,
    )


def is_serialised(ptx: str, arch: int) -> bool:
    """Whether ptxas warns that it makes wgmma wait (C7510 to C7519). Triton does not show that."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [triton.knobs.nvidia.ptxas.path, "-v", f"-arch=sm_{arch}a", file.name]
        told = subprocess.run(
            [*command, "-o", os.devnull], capture_output=True, text=True, check=True
        )
    return re.search(r"\bC751\d\b", told.stdout + told.stderr) is not None


def complaints(lines: list[Built], before: dict[tuple[str, str, str], dict[str, str]]) -> list[str]:
    """What is wrong with the table, a sentence for each problem; before: the committed table."""
    found = []
    for line in lines:
        what = f"{line.kernel} ({line.case}) on {line.chip}"
        old = before.get((line.kernel, line.case, line.chip))
        if line.spills:
            found.append(f"{what} spills {line.spills}")
        if line.shared > line.shared_limit:
            found.append(f"{what} needs {line.shared} bytes of shared memory")
        # All but whole attention have few rows.
        wanted = CHIPS[line.chip].matrix[0 if line.kernel == "causal_attention" else -1]
        uses_matrix = line.kernel in MATRIX_KERNELS and "float32" not in line.case
        if uses_matrix and line.matrix != wanted:
            found.append(f"{what} uses {line.matrix or 'no matrix instruction'}, not {wanted}")
        copies = COPIES[0] if line.case.startswith(DESCRIBED) else old["copies"] if old else ""
        if copies and line.copies != copies:
            found.append(f"{what} lost its asynchronous copies, {copies}")
        if line.serialised:
            found.append(f"{what} has its matrix products serialised by ptxas")
        if (
            old
            and old["triton"] == line.triton
            and line.registers > int(old["registers"]) + REGISTER_SLACK
        ):
            found.append(f"{what} needs {line.registers} registers, before {old['registers']}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--update", action="store_true", help="accept higher register counts")
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS), help="only these")
    args = parser.parse_args()
    before = {}
    if RESULTS.exists() and not args.update:
        with RESULTS.open() as file:
            before = {(r["kernel"], r["case"], r["chip"]): r for r in csv.DictReader(file)}
    with get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        counted = pool.apply_async(count_compilations, (COUNTED_ON,))
        lines = [line for chip in pool.map(build, args.chips, chunksize=1) for line in chip]
        compilations = counted.get()
    lines.sort(key=lambda line: (line.kernel, line.case, list(CHIPS).index(line.chip)))
    print(f"{'kernel':22} {'case':28} {'chip':8} {'regs':>5} {'spills':>6} {'shared':>7}  matrix")
    for line in lines:
        print(
            f"{line.kernel:22} {line.case:28} {line.chip:8} {line.registers:5} {line.spills:6}"
            f" {line.shared:7}  {line.matrix}"
        )
    wrong = complaints(lines, before)
    wrong += [
        f"{kernel} ({case}) is compiled {count} times for {len(ROW_COUNTS)} numbers of rows"
        for (kernel, case), count in compilations.items()
        if count > 1
    ]
    for sentence in wrong:
        print(f"regression: {sentence}", file=sys.stderr)
    if not wrong and set(args.chips) == set(CHIPS):
        with RESULTS.open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Built)])
            writer.writeheader()
            writer.writerows(asdict(line) for line in lines)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
