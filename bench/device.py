"""Describes this machine, and measures its limits: copy bandwidth and matrix rate.

    python bench/device.py [--out DIR]

Writes DIR/device.json.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import torch  # noqa: E402
from measure import ON_GPU, time_calls  # noqa: E402
from op_cases import DEVICE, nbytes, random  # noqa: E402

from homer_triton.evaluation.environment import describe_environment  # noqa: E402

COPIED, WIDTH = (2**30, 8192) if ON_GPU else (2**20, 128)


def limits() -> dict[str, float]:
    """Copy bandwidth in bytes per millisecond, and matrix rate in FLOPs per millisecond."""
    source = torch.zeros(COPIED // 4, dtype=torch.int32, device=DEVICE)
    target = torch.empty_like(source)
    # A kernel copies: in a CUDA graph, `copy_` uses another engine, two thirds as fast on an H200.
    copying = time_calls([lambda: torch.bitwise_not(source, out=target)])
    a, b = random(WIDTH, WIDTH), random(WIDTH, WIDTH)
    multiplying = time_calls([lambda: a @ b])
    return {
        "copy": 2 * nbytes(source) / copying.median_ms,
        "matrix": 2 * WIDTH**3 / multiplying.median_ms,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "out")
    out = parser.parse_args().out
    found = describe_environment(DEVICE)
    if ON_GPU:
        properties = torch.cuda.get_device_properties(0)
        found["memory_bytes"] = properties.total_memory
        found["l2_bytes"] = properties.L2_cache_size
    limit = limits()
    found["copy_tb_per_s"] = round(limit["copy"] / 1e9, 3)
    found["matrix_tflop_per_s"] = round(limit["matrix"] / 1e9, 1)
    text = json.dumps(found, indent=2)
    print(text)
    out.mkdir(parents=True, exist_ok=True)
    (out / "device.json").write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
