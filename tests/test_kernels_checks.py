"""Arguments that do not fit together: one sentence that names the argument and its value."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import DEVICE
from torch import Tensor

from homer_triton import kernels

B, T, HQ, HKV, D, E = 2, 12, 4, 2, 16, 24


def floats(*shape: int) -> Tensor:
    return torch.zeros(shape, device=DEVICE)


def rows(*shape: int) -> Tensor:
    return torch.arange(shape[-1], device=DEVICE).expand(shape)


def good(op: str) -> dict[str, Any]:
    """Arguments that an op takes."""
    q, k = floats(B, T, HQ, D), floats(B, T, HKV, D)
    rotation = {"positions": rows(B, T), "cos": floats(T, D // 2), "sin": floats(T, D // 2)}
    cache = floats(3, 2, 2 * B * T, HKV, D)
    return {
        "rms_norm": {"x": floats(B, T, E), "weight": floats(E), "eps": 1e-5},
        "add_rms_norm": {
            "x": floats(B, T, E),
            "residual": floats(B, T, E),
            "weight": floats(E),
            "eps": 1e-5,
        },
        "silu_mul": {"gate_up": floats(B, T, E)},
        "linear": {
            "x": floats(B, T, E),
            "weights": (floats(5, E), floats(6, E)),
            "residual": floats(B, T, 11),
        },
        "add_linear_": {"rows": floats(T, 5), "x": floats(T, E), "weight": floats(5, E)},
        "gated_linear": {"x": floats(B, T, E), "weights": (floats(10, E),)},
        "apply_rotary_": {"x": q, **rotation},
        "rotary_and_store_": {
            "q": q,
            "k": k,
            "v": floats(B, T, HKV, D),
            **rotation,
            "keys": cache[0, 0],
            "values": cache[0, 1],
            "slots": torch.arange(B * T, device=DEVICE).view(B, T),
        },
        "causal_attention": {
            "q": q,
            "k": k,
            "v": k,
            "prefix_k": floats(5, HKV, D),
            "prefix_v": floats(5, HKV, D),
            "query_rows": rows(B, T),
        },
        "score_rows": {
            "q": q[:, -3:],
            "k": k,
            "prefix_k": k[0],
            "logit": "softmax",
            "weights": floats(HQ),
        },
        "score_units": {
            "q": q[0, -3:],
            "keys": torch.ones(20, HKV, D, dtype=torch.int8, device=DEVICE),
            "scales": floats(20, HKV),
            "key_heads": (0,) * HQ,
            "weights": floats(HQ),
            "before": floats(3, HQ),
            "starts": rows(1, 4)[0],
        },
        "vote_and_select": {
            "q": q[:, -3:],
            "k": k,
            "prefix_k": k[0],
            "votes": floats(B, T),
            "keep": 3,
            "first_row": 1,
            "last_row": 9,
            "heads": "max",
            "reach": (1, 2),
            "weights": floats(HQ),
        },
        "score_and_select": {
            "q_last": q[:, -1],
            "k": k,
            "positions": rows(B, T),
            "bias": floats(T),
            "keep": 3,
            "first_row": 1,
            "last_row": 9,
        },
        "prune_and_concatenate": {
            "left": floats(B, 6, E),
            "right": floats(B, 7, E),
            "left_labels": rows(B, 3, T),
            "right_labels": rows(B, 3, T) + T,
            "left_kept": rows(B, 6),
            "right_kept": rows(B, 7),
            "suffix": 2,
        },
        "average_affix_": {
            "cache": cache,
            "left_slots": torch.arange(2 * B, device=DEVICE).view(B, 2),
            "right_slots": torch.arange(2 * B, 4 * B, device=DEVICE).view(B, 2),
        },
        "gather_cache_": {
            "cache": cache,
            "slots": rows(5),
            "keys": floats(3, HKV, 5, D),
            "values": floats(3, HKV, 5, D),
        },
    }[op]


@pytest.mark.slow
@pytest.mark.parametrize("op", kernels.__all__)
def test_every_op_takes_its_good_arguments(op):
    getattr(kernels, op)(**good(op))


def spread(x: Tensor) -> Tensor:
    """x with every other element of memory skipped in the last dimension."""
    return x.repeat_interleave(2, dim=-1)[..., ::2]


BAD: list[tuple[str, str, Callable[[Any], Any], str]] = [
    ("rms_norm", "weight", lambda x: x[1:], r"the shape of weight is \(23,\): it must be \(24,\)"),
    ("rms_norm", "weight", Tensor.half, "the dtype of weight is torch.float16"),
    ("rms_norm", "x", spread, "the last stride of x is 2: it must be 1"),
    ("rms_norm", "x", Tensor.long, "the dtype of x is torch.int64: it must be a floating-point"),
    ("rms_norm", "x", Tensor.double, "the dtype of weight is torch.float32"),
    ("rms_norm", "weight", lambda x: x.to("meta"), "the device of weight is meta: .* x's"),
    ("add_rms_norm", "residual", lambda x: x[:1], "the shape of residual is"),
    ("silu_mul", "gate_up", lambda x: x[..., 1:], "the last dimension of gate_up is 23"),
    ("linear", "x", lambda x: x[..., 1:], r"the shape of weights\[0\] is \(5, 24\)"),
    ("linear", "residual", lambda x: x[..., 1:], "the shape of residual is"),
    ("linear", "weights", lambda x: (x[0], x[1].half()), r"the dtype of weights\[1\] is"),
    ("add_linear_", "rows", lambda x: x[:1], "the shape of residual is"),
    ("gated_linear", "weights", lambda x: (x[0][:, 1:],), r"the shape of weights\[0\] is \(10, 23"),
    ("apply_rotary_", "x", lambda x: x[..., 1:], "the head dim of x is 15: it must be even"),
    ("apply_rotary_", "positions", Tensor.int, "the dtype of positions is torch.int32"),
    ("apply_rotary_", "cos", Tensor.half, "the dtype of cos is torch.float16"),
    ("apply_rotary_", "sin", lambda x: x[:, 1:], r"the shape of sin is \(12, 7\)"),
    ("rotary_and_store_", "v", lambda x: x[:, 1:], r"the shape of v is \(2, 11, 2, 16\)"),
    ("rotary_and_store_", "q", lambda x: x[:, 1:], r"the shape of q is \(2, 11, 4, 16\)"),
    ("rotary_and_store_", "keys", Tensor.half, "the dtype of keys is torch.float16"),
    ("rotary_and_store_", "values", lambda x: x[:, 1:], "the shape of values is"),
    ("rotary_and_store_", "slots", lambda x: x[:, 1:], r"the shape of slots is \(2, 11\)"),
    ("causal_attention", "k", lambda x: x[:, :0], "the shape of k is .* without empty dim"),
    ("causal_attention", "q", lambda x: x[:, :, :3], "q's heads is 3: it must be a multiple of 2"),
    ("causal_attention", "q", lambda x: x[:1], "the batch of q is 1: it must be k's, 2"),
    ("causal_attention", "q", lambda x: x[..., 1:], "the head dim of q is 15: it must be k's"),
    ("causal_attention", "v", Tensor.half, "the dtype of v is torch.float16: .* torch.float32"),
    ("causal_attention", "prefix_v", lambda x: None, "prefix_v is None"),
    ("causal_attention", "prefix_v", lambda x: x[1:], r"the shape of prefix_v is \(4, 2, 16\)"),
    ("causal_attention", "query_rows", lambda x: x[:, 1:], "the shape of query_rows is"),
    ("score_rows", "logit", lambda x: "mean", "logit is 'mean': it must be one of logit, log_so"),
    ("score_rows", "q", lambda x: x[:, :, :3], "q's heads is 3"),
    ("score_rows", "q", lambda x: x[:1], "the batch of q is 1: it must be k's"),
    ("score_rows", "prefix_k", lambda x: x[..., 1:], r"the shape of prefix_k is \(12, 2, 15\)"),
    ("score_units", "q", lambda x: x[0], r"the shape of q is"),
    ("score_units", "keys", Tensor.half, "the dtype of keys is torch.float16: it must be int8"),
    ("score_units", "keys", lambda x: x[..., 1:], "the shape of keys"),
    ("score_units", "scales", lambda x: x[1:], r"the shape of scales is \(19, "),
    ("score_units", "scales", lambda x: None, "the dtype of keys is torch.int8: it must be q's"),
    ("score_units", "key_heads", lambda x: x[1:], "the number of key_heads"),
    ("score_units", "key_heads", lambda x: (*x[1:], 9), "key_heads is"),
    ("score_units", "weights", Tensor.half, "the dtype of weights is torch.float16"),
    ("score_units", "before", lambda x: x[1:], "the shape of before"),
    ("score_units", "starts", lambda x: x[:0], "the length of starts is 0"),
    ("vote_and_select", "heads", lambda x: "mean", "heads is 'mean': it must be one of max, sum"),
    ("score_rows", "weights", lambda x: x[1:], r"the shape of weights is \(3,\): it must be"),
    ("vote_and_select", "weights", Tensor.half, "the dtype of weights is torch.float16"),
    ("vote_and_select", "reach", lambda x: (-1, 2), r"reach is \(-1, 2\): it must be rows before"),
    ("vote_and_select", "votes", lambda x: x[:, 1:], r"the shape of votes is \(2, 11\)"),
    ("vote_and_select", "votes", Tensor.half, "the dtype of votes is torch.float16"),
    ("vote_and_select", "keep", lambda x: 9, r"keep is 9: it must be in \[0, 8\]"),
    ("vote_and_select", "q", lambda x: x.repeat(1, 5, 1, 1), "the number of asking rows is 15"),
    ("score_and_select", "keep", lambda x: 9, r"keep is 9: it must be in \[0, 8\]"),
    ("score_and_select", "keep", lambda x: -1, r"keep is -1: it must be in \[0, 8\]"),
    ("score_and_select", "last_row", lambda x: 13, "last_row is 13"),
    ("score_and_select", "first_row", lambda x: 10, "first_row is 10"),
    ("score_and_select", "bias", lambda x: x[:0], "the length of bias is 0"),
    ("score_and_select", "bias", Tensor.half, "the dtype of bias is torch.float16"),
    ("prune_and_concatenate", "suffix", lambda x: 7, r"suffix is 7: it must be in \[0, 6\]"),
    ("prune_and_concatenate", "right", lambda x: x[..., 1:], "the shape of right is"),
    ("prune_and_concatenate", "left_kept", lambda x: x[:, 1:], "the shape of left_kept is"),
    ("prune_and_concatenate", "right_labels", lambda x: x[:, 1:], "the shape of right_labels is"),
    ("average_affix_", "cache", lambda x: x[:, :1], "the second dimension of cache is 1"),
    ("average_affix_", "right_slots", lambda x: x[:, 1:], "the shape of right_slots is"),
    ("average_affix_", "left_slots", Tensor.float, "the dtype of left_slots is torch.float32"),
    ("gather_cache_", "cache", lambda x: x[..., 1:], "the head stride of cache is 16"),
    ("gather_cache_", "slots", Tensor.float, "the dtype of slots is torch.float32"),
    ("gather_cache_", "values", lambda x: x[1:], "the shape of values is"),
    ("gather_cache_", "keys", Tensor.half, "the dtype of keys is torch.float16"),
    ("gather_cache_", "keys", lambda x: x.repeat(1, 1, 2, 1)[:, :, ::2], "the strides of keys"),
]


# What only data tells is compared on the CPU alone: a launcher never waits for a GPU.
if DEVICE == "cpu":
    BAD += [
        ("score_and_select", "bias", lambda x: x[2:], "the length of bias is 10: .* distance, 10"),
        ("score_and_select", "positions", lambda x: x.flip(1), "the smallest distance .* is -10"),
    ]


@pytest.mark.parametrize(("op", "argument", "spoil", "message"), BAD)
def test_bad_arguments_are_refused(op, argument, spoil, message):
    arguments = good(op)
    arguments[argument] = spoil(arguments[argument])
    with pytest.raises(ValueError, match=message):
        getattr(kernels, op)(**arguments)


def test_without_rows_the_queries_are_the_chunk():
    arguments = good("causal_attention") | {"query_rows": None}
    arguments["q"] = arguments["q"][:, 1:]
    with pytest.raises(ValueError, match="the number of rows of q is 11: it must be k's, 12"):
        kernels.causal_attention(**arguments)


def test_kernels_refuse_dtypes_they_are_not_compiled_for():
    with pytest.raises(ValueError, match=r"the dtype is torch.float64: it must be float16, bfloat"):
        kernels.silu_mul(torch.zeros(3, 4, dtype=torch.float64, device=DEVICE))


WITHOUT_THE_INTERPRETER = """
from homer_triton import kernels
from test_kernels_checks import good

for op in kernels.__all__:
    try:
        getattr(kernels, op)(**good(op))
        print(op, "runs")
    except ValueError as error:
        print(op, error)
"""


@pytest.mark.slow
@pytest.mark.skipif(DEVICE != "cpu", reason="there is a GPU")
def test_without_a_gpu_and_the_interpreter_every_kernel_says_what_runs() -> None:
    here = Path(__file__).resolve().parent
    paths = os.pathsep.join([str(here), str(here.parent)])
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_INTERPRETER],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    sentence = "the device is cpu: it must be a GPU for Triton; kernels.reference runs on any."
    expected = dict.fromkeys(kernels.__all__, sentence)
    expected["linear"] = expected["add_linear_"] = "runs"
    assert dict(line.split(" ", 1) for line in done.stdout.splitlines()) == expected
