"""The compile gate: every kernel, at real sizes, built for chips that need not be there.

    python bench/compile.py [--update]

Prints a table of registers, spills, shared memory and matrix instructions and writes it to
bench/results/compile.csv. Exits 1, leaving the file as it was, when a kernel spills, asks for more
shared memory than its chip has, lost its matrix instructions or has them serialised, lost the
asynchronous copies that feed them, is compiled anew for a number of rows, or needs clearly more
registers than the file says; `--update` accepts the latter.
"""

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

# Compiling needs the real JIT: set before triton is imported, here and in the worker processes.
os.environ["TRITON_INTERPRET"] = "0"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from homer_triton import kernels  # noqa: E402
from homer_triton.kernels import attention  # noqa: E402
from homer_triton.kernels.checks import LOGITS  # noqa: E402
from homer_triton.kernels.scoring import MAX_ROWS  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "compile.csv"
# Registers over the committed count that pass; another release of Triton counts anew.
REGISTER_SLACK = 8
# Asynchronous copies, those by tensor descriptors first.
COPIES = ("cp.async.bulk.tensor", "cp.async")
# What must use matrix instructions.
MATRIX_KERNELS = ("causal_attention", "attend_one", "totals", "votes")


@dataclass(frozen=True)
class Chip:
    """A target, the bytes of shared memory that a program can have, and its matrix instructions.

    The first of those is for large tiles, the last for short ones. descriptors: whether it copies
    by tensor descriptors.
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


@dataclass(frozen=True)
class Model:
    """The sizes of a layer."""

    hidden: int
    heads: int
    key_heads: int
    dim: int
    feed_forward: int


MODELS = {
    "Llama-2-7B": Model(4096, 32, 32, 128, 11008),
    "Llama-3.2-1B": Model(2048, 32, 8, 64, 8192),
}
COUNTED_ON = "sm_90a"
DESCRIBED = "described"
DESCRIBED_TILES = {
    64: attention.Tile(128, 128, 8, 3, descriptors=True),
    128: attention.Tile(128, 128, 8, 2, descriptors=True),
}
# What is special about a call, and the call.
Case = tuple[str, Callable[[], object]]

ROWS, KEPT, PREFIX, SUFFIX, SLOTS, LAYERS, ASKING = 2048, 1074, 100, 100, 8192, 32, 32
# Odd ones and such as 2, 4, 8, 16 and more divide, all within one power of two.
ROW_COUNTS = (
    *(1025, 1026, 1028, 1032, 1040, 1056, 1088, 1100, 1111, 1152),
    *(1234, 1280, 1333, 1500, 1536, 1601, 1777, 1904, 2000, 2047),
)


@dataclass(frozen=True)
class Built:
    """One line of the table. `spills` are bytes per thread, on AMD chips vector registers;
    serialised: whether ptxas lets no asynchronous matrix product run beside anything else;
    copies: the instruction by which memory comes into shared memory without a thread waiting.
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
    """What Triton's JIT asks of a driver before a launch, without a device behind it."""

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


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor of a shape and a type without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def indices(*shape: int) -> torch.Tensor:
    """Row, position or slot indices without memory."""
    return empty(*shape, dtype=torch.int64)


def floats(*shape: int) -> torch.Tensor:
    """float32 without memory."""
    return empty(*shape, dtype=torch.float32)


def attend(
    dim: int,
    queries: int,
    prefix: int,
    rows: bool,
    dtype: torch.dtype = torch.bfloat16,
    keys: int = ROWS,
) -> None:
    """Attention with four query heads to a key head."""
    q, k = empty(1, queries, 32, dim, dtype=dtype), empty(1, keys, 8, dim, dtype=dtype)
    prefix_k = empty(prefix, 8, dim, dtype=dtype) if prefix else None
    at = indices(1, queries) if rows else None
    kernels.causal_attention(q, k, k, prefix_k, prefix_k, at)


def attention_cases() -> Iterator[Case]:
    """Attention over full rows, kept rows, one row and no prefix; every tile of the table."""
    yield "full D128", partial(attend, 128, ROWS, 0, False)
    for dim in (64, 128):
        yield f"prefix D{dim}", partial(attend, dim, ROWS, PREFIX, False)
        yield f"kept rows D{dim}", partial(attend, dim, KEPT, PREFIX, True)
        for dtype in (torch.bfloat16, torch.float32):
            name = "" if dtype == torch.bfloat16 else " float32"
            yield f"last row{name} D{dim}", partial(attend, dim, 1, PREFIX, True, dtype)
    for dim in (16, 80, 256):
        yield f"prefix D{dim}", partial(attend, dim, ROWS, PREFIX, False)
    for dim in (64, 128, 256):
        yield f"float32 D{dim}", partial(attend, dim, ROWS, PREFIX, False, torch.float32)


def descriptor_cases() -> Iterator[Case]:
    """Attention whose keys come by tensor descriptors, with the largest tiles of `make tune`."""
    for dim, tile in DESCRIBED_TILES.items():
        for name, queries, prefix, rows in (
            ("full", ROWS, 0, False),
            ("prefix", ROWS, PREFIX, False),
            ("kept rows", KEPT, PREFIX, True),
        ):
            call = partial(attend, dim, queries, prefix, rows)
            yield f"{DESCRIBED} {name} D{dim}", partial(with_tile, tile, call)


def with_tile(tile: attention.Tile, call: Callable[[], object]) -> None:
    """A call of attention with a tile of its own."""
    with mock.patch.object(attention, "attention_tile", return_value=tile):
        call()


def model_cases(name: str, m: Model, all_rows: int = ROWS, kept_rows: int = KEPT) -> Iterator[Case]:
    """Every other op at a model's sizes."""
    x, kept = empty(1, all_rows, m.hidden), empty(1, kept_rows, m.hidden)
    q, k = empty(1, all_rows, m.heads, m.dim), empty(1, all_rows, m.key_heads, m.dim)
    at, labels, kept_at = indices(1, all_rows), indices(1, 3, all_rows), indices(1, kept_rows)
    angles, cache = floats(4096, m.dim // 2), empty(LAYERS, 2, SLOTS, m.key_heads, m.dim)
    selection = (q[:, -1], k, at, floats(all_rows), kept_rows - SUFFIX, 0, all_rows - SUFFIX)
    sides = (kept, kept, labels, labels, kept_at, kept_at)

    yield name, partial(kernels.rms_norm, x, x[0, 0], 1e-5)
    yield f"residual {name}", partial(kernels.add_rms_norm, x, x, x[0, 0], 1e-5)
    yield name, partial(kernels.silu_mul, empty(1, all_rows, 2 * m.feed_forward))
    yield name, partial(kernels.apply_rotary_, q, at, angles, angles)
    stores = (cache[0, 0], cache[0, 1], at)
    yield name, partial(kernels.rotary_and_store_, q, k, k, at, angles, angles, *stores)
    yield name, partial(kernels.score_and_select, *selection)
    asking, votes = q[:, -ASKING:], floats(1, all_rows)
    ends = (kept_rows - SUFFIX, 0, all_rows - SUFFIX)
    for logit in LOGITS:
        yield (
            f"{logit} {name}",
            partial(kernels.vote_and_select, asking, k, k[0], votes, *ends, logit, reach=(15, 15)),
        )
    weighed = {"reach": (7, 55), "weights": floats(m.heads)}
    yield (
        f"weighed softmax {name}",
        partial(kernels.vote_and_select, asking, k, k[0], votes, *ends, **weighed),
    )
    yield name, partial(kernels.score_rows, asking, k, k[0], "softmax", "sum", floats(m.heads))
    yield name, partial(kernels.prune_and_concatenate, *sides, SUFFIX)
    yield name, partial(kernels.average_affix_, cache, at[:, :SUFFIX], at[:, -SUFFIX:])
    gathered = empty(LAYERS, m.key_heads, all_rows, m.dim)
    yield name, partial(kernels.gather_cache_, cache, at[0], gathered, gathered)


def cases() -> Iterator[Case]:
    """Every op at real sizes."""
    yield from attention_cases()
    for name, model in MODELS.items():
        yield from model_cases(name, model)
    k, at = empty(1, MAX_ROWS, 32, 128), indices(1, MAX_ROWS)
    selection = (k[:, -1], k, at, floats(MAX_ROWS), MAX_ROWS // 2, 0, MAX_ROWS - SUFFIX)
    yield f"{MAX_ROWS} rows", partial(kernels.score_and_select, *selection)


def cases_of_rows(rows: int) -> Iterator[Case]:
    """Every op at a number of rows, of which about half are kept."""
    kept = rows // 2 + 37
    yield from model_cases("rows", MODELS["Llama-2-7B"], rows, kept)
    yield "all rows", partial(attend, 128, rows, PREFIX, False, keys=rows)
    yield "kept rows", partial(attend, 128, kept, PREFIX, True, keys=rows)
    yield "one row", partial(attend, 128, 1, PREFIX, True, keys=rows)
    described = partial(attend, 128, kept, PREFIX, True, keys=rows)
    yield f"{DESCRIBED} kept rows", partial(with_tile, DESCRIBED_TILES[128], described)


def resources(kernel: CompiledKernel, chip: Chip) -> tuple[int, int]:
    """(registers, spills) of a compiled kernel, read from its machine code."""

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
    """Let every launch only compile, for a chip; returns the list that what it compiles goes to."""
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
    compiled = compiling(CHIPS[chip_name])
    lines = []
    chip = CHIPS[chip_name]
    for case, call in (*cases(), *(descriptor_cases() if chip.descriptors else ())):
        compiled.clear()
        call()
        lines += [describe(name, case, chip_name, kernel) for name, kernel in compiled]
    return lines


def count_compilations(chip_name: str) -> dict[tuple[str, str], int]:
    """How often each kernel of a case is compiled over `ROW_COUNTS`. Runs in a process of its own.

    Not what a range of rows is compiled for on purpose: those are within one power of two.
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
    """The table's line for a compiled kernel."""
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
    """Whether ptxas warns that it makes wgmma wait (C7510 to C7519), which Triton does not show."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [triton.knobs.nvidia.ptxas.path, "-v", f"-arch=sm_{arch}a", file.name]
        told = subprocess.run(
            [*command, "-o", os.devnull], capture_output=True, text=True, check=True
        )
    return re.search(r"\bC751\d\b", told.stdout + told.stderr) is not None


def complaints(lines: list[Built], before: dict[tuple[str, str, str], dict[str, str]]) -> list[str]:
    """What is wrong with the table, one sentence each; `before` is the committed one."""
    found = []
    for line in lines:
        what = f"{line.kernel} ({line.case}) on {line.chip}"
        old = before.get((line.kernel, line.case, line.chip))
        if line.spills:
            found.append(f"{what} spills {line.spills}")
        if line.shared > line.shared_limit:
            found.append(f"{what} needs {line.shared} bytes of shared memory")
        # Others than whole attention have few rows.
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
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    args = parser.parse_args()
    before = {}
    if RESULTS.exists() and not args.update:
        with RESULTS.open() as file:
            before = {(r["kernel"], r["case"], r["chip"]): r for r in csv.DictReader(file)}
    with ProcessPoolExecutor(2, get_context("spawn"), max_tasks_per_child=1) as pool:
        counted = pool.submit(count_compilations, COUNTED_ON)
        lines = [line for chip in pool.map(build, args.chips) for line in chip]
        compilations = counted.result()
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
