"""Matrix products with what follows them, for all devices: no Triton here.

    linear: x Wᵀ + bias + residual        add_linear_: rows += x Wᵀ
    gated_linear: silu(x Wgᵀ) * (x Wuᵀ)

On a GPU they are cuBLAS's. On a CPU they are oneDNN's, which adds, multiplies and activates while a
tile of the output is still in the cache, and which, unlike MKL, is as fast on every maker's chips.
Few rows are multiplied as `few_rows` says: there, reading the matrix should be all the work.
Where a CPU has no instructions for half precision, its products are many times slower than those of
float32: many rows are multiplied in float32 there, a block of the matrix at a time.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from inspect import unwrap
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from .checks import check_linear, checked_by

# PyTorch's compiler calls these same ops for frozen models on a CPU.
_ONEDNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
# x [..., I], a matrix [O, I] and a bias [O] or None -> [..., O].
Multiply = Callable[[Tensor, Tensor, Tensor | None], Tensor]
_HALVES = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}

# oneDNN compiles a kernel for every new number of rows, and both it and PyTorch keep a thousand of
# them, some hundred kilobytes each: a process that reads texts of every length would never stop
# growing. A tree needs some dozens, which a next one of its shape finds again. Both read this when
# they compile the first one; what somebody has set stays.
KERNELS_KEPT = 64
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, str(KERNELS_KEPT))

# Multiply-adds from which oneDNN pays, the compiling included.
LEAST_WORK = 2**26
# Rows of x from which widening pays: below, reading a matrix takes the time, and half is read.
LEAST_WIDE_ROWS = 8
# Rows of x whose products are faster the other way round, as measured with PyTorch 2.13 on Intel's
# chips.
TURNED_ROWS = {torch.float32: range(6, 16), torch.bfloat16: range(1, 33)}
# On others', where MKL reads a float32 matrix for one row at a quarter of the memory's speed, but
# not where it has several products to take at once: rows whose float32 products are faster as those
# of so many parts of a matrix, and the most rows that stand as columns there. In bfloat16, other
# ways than `F.linear` are slower there.
PARTED_ROWS, PARTS, MOST_COLUMNS = range(1, 33), 16, 5
# Rows of x, and elements of a matrix, that are widened at a time: what a processor's caches hold.
WIDE_ROWS = 512
WIDE_ELEMENTS = 2**21


@checked_by(check_linear)
def linear(
    x: Tensor,
    weights: tuple[Tensor, ...],
    residual: Tensor | None = None,
    biases: tuple[Tensor, ...] = (),
) -> Tensor:
    """Multiply x with matrices: `x Wᵀ + bias`, the outputs side by side, plus a residual.

    Args:
        x: [..., I].
        weights: Each [O, I].
        residual: [..., sum of O], or None.
        biases: One [O] for each of the weights, or none.

    Returns:
        [..., sum of O].

    Raises:
        ValueError: The arguments do not fit together.
    """
    if widens(x, weights):
        joined = _in_float32(x, [(weight,) for weight in weights], _linear)
        if biases:
            joined += torch.cat(biases)
        return joined if residual is None else joined.add_(residual)
    fused = fuses(x, weights)
    own = biases or (None,) * len(weights)
    if len(weights) == 1 and residual is not None and fused:
        return _ONEDNN.binary(x, residual, weights[0], own[0], "add")
    multiply = _plain if fused else few_rows(x, weights)
    outputs = [multiply(x, weight, bias) for weight, bias in zip(weights, own, strict=True)]
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
    return joined if residual is None else joined + residual


_linear = unwrap(linear)


@checked_by(lambda rows, x, weight: check_linear(x, (weight,), rows, ()))
def add_linear_(rows: Tensor, x: Tensor, weight: Tensor) -> None:
    """Add `x Wᵀ` to rows, in place.

    Args:
        rows: [R, O].
        x: [R, I].
        weight: [O, I].

    Raises:
        ValueError: The arguments do not fit together.
    """
    if x.device.type == "cpu" or not _are_plain((weight,)):
        rows += _linear(x, (weight,))
    else:
        _multiply_into_(rows, x, weight)


@checked_by(check_linear)
def gated_linear(x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    """The first half of Llama's MLP: `silu(x Wgᵀ) * (x Wuᵀ)` (Shazeer 2020, SwiGLU).

    Args:
        x: [..., I].
        weights: One [2F, I] with the gate in the first half, or gate and up, each [F, I].

    Returns:
        [..., F].

    Raises:
        ValueError: The arguments do not fit together.
    """
    if widens(x, weights):
        return _in_float32(x, [_gate_and_up(weights)], gated_linear)
    if fuses(x, weights):
        gate, up = _gate_and_up(weights)
        return _ONEDNN.binary(x, _ONEDNN(x, gate, None, "swish", [], ""), up, None, "mul")
    gate, up = _linear(x, weights).chunk(2, dim=-1)
    return F.silu(gate) * up


def _gate_and_up(weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return weights if len(weights) == 2 else weights[0].chunk(2)


def fuses(x: Tensor, weights: tuple[Tensor, ...]) -> bool:
    """Whether oneDNN takes the products of x [..., I] with matrices [O, I]: large ones, on an x86
    CPU, outside autograd, in a dtype that the chip's instructions know.
    """
    return (
        x.device.type == "cpu"
        and _is_x86()
        and _ONEDNN is not None
        and bool(torch.backends.mkldnn.enabled)
        and x.numel() * sum(len(weight) for weight in weights) >= max(LEAST_WORK, 1)
        and _are_plain(weights)
        and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and has_instructions(x.dtype)))
        and not _is_recorded(x, weights)
    )


def few_rows(x: Tensor, weights: tuple[Tensor, ...]) -> Multiply:
    """How x [..., I] is multiplied with each matrix [O, I] where no kernel of oneDNN is worth its
    compiling: `F.linear`, but where another way reads a matrix faster. That is so for few rows, as
    in decoding, on an x86 CPU, outside autograd.
    """
    is_plain = _are_plain(weights) and not _is_recorded(x, weights)
    if x.device.type != "cpu" or not _is_x86() or not is_plain:
        return F.linear
    rows = x.shape[:-1].numel()
    if not _is_intels():
        return _in_parts if x.dtype == torch.float32 and rows in PARTED_ROWS else F.linear
    turned = has_instructions(x.dtype) and rows in TURNED_ROWS.get(x.dtype, ())
    return _turned if turned else F.linear


def widens(x: Tensor, weights: tuple[Tensor, ...]) -> bool:
    """Whether the products of x [..., I] with matrices [O, I] are taken in float32: those of many
    rows in half precision, on an x86 CPU without the instructions for it, outside autograd.
    """
    return (
        x.dtype in _HALVES
        and x.device.type == "cpu"
        and _is_x86()
        and x.shape[:-1].numel() >= LEAST_WIDE_ROWS
        and not has_instructions(x.dtype)
        and _are_plain(weights)
        and not _is_recorded(x, weights)
    )


def _in_float32(
    x: Tensor,
    groups: Sequence[tuple[Tensor, ...]],
    multiply: Callable[[Tensor, tuple[Tensor, ...]], Tensor],
) -> Tensor:
    """`multiply` of x and each group's matrices, the outputs side by side: computed in float32, for
    some rows of x and of the matrices at a time, and rounded once.
    """
    rows = x.reshape(-1, x.shape[-1])
    out = x.new_empty(len(rows), sum(len(group[0]) for group in groups))
    first = 0
    for group in groups:
        for blocks in zip(*map(_wide_blocks, group), strict=True):
            last = first + len(blocks[0])
            for start in range(0, len(rows), WIDE_ROWS):
                part = slice(start, start + WIDE_ROWS)
                out[part, first:last] = multiply(rows[part].float(), blocks)
            first = last
    return out.view(*x.shape[:-1], -1)


def _wide_blocks(weight: Tensor) -> Iterator[Tensor]:
    """A matrix's rows in float32, some at a time, all in the same memory."""
    rows = max(WIDE_ELEMENTS // weight.shape[1], 1)
    memory = weight.new_empty(min(rows, len(weight)), weight.shape[1], dtype=torch.float32)
    for part in weight.split(rows):
        yield memory[: len(part)].copy_(part)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _ONEDNN(x, weight, bias, "none", [], "")


def _turned(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, as a matrix times columns."""
    columns = x.reshape(-1, x.shape[-1]).T
    one = columns.shape[1] == 1
    out = torch.mv(weight, columns[:, 0]) if one else (weight @ columns).T.contiguous()
    out = out.view(*x.shape[:-1], -1)
    return out if bias is None else out.add_(bias)


def _in_parts(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, as a batch of products with parts of the matrix."""
    rows = x.reshape(-1, x.shape[-1])
    parts = weight.unflatten(0, (math.gcd(len(weight), PARTS), -1))
    if len(rows) <= MOST_COLUMNS:
        out = torch.bmm(parts, rows.T.expand(len(parts), -1, -1)).flatten(0, 1).T.contiguous()
    else:
        out = torch.bmm(rows.expand(len(parts), -1, -1), parts.mT).transpose(0, 1).contiguous()
    out = out.view(*x.shape[:-1], len(weight))
    return out if bias is None else out.add_(bias)


def _multiply_into_(rows: Tensor, x: Tensor, weight: Tensor) -> None:
    """Add x Wᵀ to rows within the product, in one pass."""
    rows.addmm_(x, weight.t())


@cache
def _is_x86() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith("AVX")


@cache
def _is_intels() -> bool:
    """Whether the CPU is Intel's, or of a maker that PyTorch does not tell."""
    tell: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    return "Intel" in tell().get("cpu_name", "Intel")


@cache
def has_instructions(dtype: torch.dtype) -> bool:
    """Whether the CPU has instructions for products in a dtype; for those in half precision, that
    oneDNN uses them too.
    """
    if dtype not in _HALVES:
        return True
    ask = getattr(torch.ops.mkldnn, _HALVES[dtype], None)
    return ask is not None and bool(ask())


def _are_plain(weights: tuple[Tensor, ...]) -> bool:
    """Whether matrices are ordinary tensors; those of a subclass, such as quantised ones, bring
    products of their own, which `F.linear` finds.
    """
    return all(type(weight) in (Tensor, Parameter) for weight in weights)


def _is_recorded(x: Tensor, weights: tuple[Tensor, ...]) -> bool:
    """Whether autograd follows a product."""
    return torch.is_grad_enabled() and any(a.requires_grad for a in (x, *weights))
