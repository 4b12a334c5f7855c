"""The cases of bench/compile.py: every op at real sizes, on tensors without memory.

Import this only where Triton compiles (`TRITON_INTERPRET=0`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch

from homer_triton import kernels
from homer_triton.kernels import attention
from homer_triton.kernels.checks import LOGITS
from homer_triton.kernels.scoring import MAX_ROWS


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
# How the cases begin whose keys are copied by tensor descriptors, and their tiles.
DESCRIBED = "described"
DESCRIBED_TILES = {
    64: attention.Tile(128, 128, 8, 3, descriptors=True),
    128: attention.Tile(128, 128, 8, 2, descriptors=True),
}
# A case's name, and its call.
Case = tuple[str, Callable[[], object]]

ROWS, KEPT, PREFIX, SUFFIX, SLOTS, LAYERS, ASKING = 2048, 1074, 100, 100, 8192, 32, 32
# Some odd, some multiples of 2, 4, 8, 16 and more; all within one power of two.
ROW_COUNTS = (
    *(1025, 1026, 1028, 1032, 1040, 1056, 1088, 1100, 1111, 1152),
    *(1234, 1280, 1333, 1500, 1536, 1601, 1777, 1904, 2000, 2047),
)


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
    """Attention with keys copied by tensor descriptors, in the largest tiles of `make tune`."""
    for dim, tile in DESCRIBED_TILES.items():
        for name, queries, prefix, rows in (
            ("full", ROWS, 0, False),
            ("prefix", ROWS, PREFIX, False),
            ("kept rows", KEPT, PREFIX, True),
        ):
            call = partial(attend, dim, queries, prefix, rows)
            yield f"{DESCRIBED} {name} D{dim}", partial(with_tile, tile, call)


def with_tile(tile: attention.Tile, call: Callable[[], object]) -> None:
    """Call attention with another tile than the table's."""
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
    q8 = (empty(ASKING, 4, m.dim), empty(all_rows, 3, m.dim).char(), empty(all_rows, 3).half())
    units, heads = indices(all_rows // 16), (0, 1, 1, 2)
    asked = (heads, floats(4), floats(ASKING, 4), units)
    yield f"int8 {name}", partial(kernels.score_units, *q8, *asked)
    yield name, partial(kernels.score_units, q8[0], k[0, :, :3], None, *asked)
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
