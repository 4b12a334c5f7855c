"""Compares time and memory of `encode` with the published code of HOMER's authors, on a CPU.

    git clone https://github.com/alinlab/HOMER
    python -m venv theirs && theirs/bin/pip install torch==2.13.0 transformers==4.42.4 'numpy<2'
    python bench/authors.py --checkout HOMER --python theirs/bin/python [--out DIR]

Both get the same random weights, tokens and settings (the 50M shape of bench/encode.py, float32,
no calibration). Each runs in its own Python, since their code needs an old transformers. Both must
give the same logits in this run. The processes take turns for the times; memory is measured in a
new process for each length. Writes DIR/authors-50M-float32.csv.

Their attention is flash-attn's, which does not run on a CPU. PyTorch's attention takes its place,
which is causal and exact too. Their code fails without a bias file, so it gets one with zeros.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
MEMORY = ROOT / "homer_triton" / "evaluation" / "memory.py"
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

SHAPE, CHUNK, WARMUP, AFFIX = "50M", 512, 6, 16
OURS, THEIRS = "homer_triton", "authors"
# The length of their bias file: more than any distance within a chunk.
DISTANCES = 8 * CHUNK


@dataclass(frozen=True)
class Line:
    """One system at one length.

    seconds, low, high: the median, fastest and slowest round; peak_bytes: the process's peak memory
    above the weights; source: a hash of the authors' chunk.py and patch_llama.py.
    """

    system: str
    tokens: int
    leaf_batch: int
    seconds: float
    low: float
    high: float
    peak_bytes: int
    logit_difference: float
    source: str
    device: str
    versions: str
    commit: str
    command: str


def ours(leaf_batch: int) -> Callable[[Tensor], Tensor]:
    """Return a function from token ids [n] to the last logits [V]."""
    from random_models import random_llama

    import homer_triton as ht

    model = random_llama(SHAPE, "float32", "torch")
    config = ht.HomerConfig.paper(
        max_chunk_len=CHUNK, target_len=CHUNK, layers_warmup=WARMUP, leaf_batch=leaf_batch
    )
    return lambda ids: ht.encode(model, ids[AFFIX:-AFFIX], ids[:AFFIX], ids[-AFFIX:], config).logits


def theirs(folder: Path, checkout: Path) -> Callable[[Tensor], Tensor]:
    """The same with the authors' code; this runs in a Python without homer_triton."""
    import torch.nn.functional as F
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaFlashAttention2

    def attend(
        layer: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any, dropout: float = 0.0, **__: Any
    ) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    sizes = json.loads((folder / "sizes.json").read_text())
    config = LlamaConfig(**sizes, tie_word_embeddings=False, attn_implementation="sdpa")
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(load_file(folder / "weights.safetensors"))
    LlamaFlashAttention2._flash_attention_forward = attend
    for layer in model.model.layers:
        layer.self_attn.__class__ = LlamaFlashAttention2
    sys.path.insert(0, str(checkout / "src"))
    from homer.patch_llama import patch

    bias = folder / "zeros.pt"
    torch.save(torch.zeros(sizes["num_hidden_layers"], DISTANCES), bias)
    patch(
        model,
        max_chunk_len=CHUNK,
        target_len=CHUNK,
        layers_warmup=WARMUP,
        bias_path=str(bias),
    )

    def read(ids: Tensor) -> Tensor:
        parts = (ids[None, :AFFIX], ids[None, AFFIX:-AFFIX], ids[None, -AFFIX:])
        with torch.inference_mode():
            return model.create_homer_prefix(*parts)["logits"][0, -1]

    return read


def load_memory() -> ModuleType:
    """Load the module by its path: the authors' Python cannot import the package around it."""
    found = spec_from_file_location("memory", MEMORY)
    assert found is not None
    assert found.loader is not None
    module = module_from_spec(found)
    found.loader.exec_module(module)
    return module


def serve(arguments: argparse.Namespace) -> None:
    """Read numbers of tokens from standard input, and answer each with a line of JSON."""
    folder, memory = arguments.serve, load_memory()
    words = json.loads((folder / "sizes.json").read_text())["vocab_size"]
    if arguments.system == OURS:
        read = ours(arguments.leaf_batch)
    else:
        read = theirs(folder, arguments.checkout)
    read(torch.arange(1024) % words)  # not counted: libraries set themselves up
    for line in sys.stdin:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(words, (int(line),), generator=generator)
        before, start = memory.forget_peak(), time.perf_counter()
        logits = read(ids)
        seconds = time.perf_counter() - start
        answer = {"seconds": seconds, "peak": memory.peak() - before, "logits": logits.tolist()}
        print(json.dumps(answer), flush=True)


class Worker:
    """A process that serves one system."""

    def __init__(self, system: str, folder: Path, arguments: argparse.Namespace) -> None:
        python = sys.executable if system == OURS else str(arguments.python)
        command = [python, str(Path(__file__).resolve()), "--serve", str(folder)]
        command += ["--system", system, "--checkout", str(arguments.checkout.resolve())]
        command += ["--leaf-batch", str(arguments.leaf_batch)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def read(self, tokens: int) -> dict[str, Any]:
        """The seconds, the peak in bytes and the logits of reading this many tokens."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(tokens, file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a system ended without an answer; its message is above")
        return json.loads(line)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def save_model(folder: Path) -> None:
    """Save the weights and sizes for the authors' Python."""
    from random_models import SHAPES, as_transformers, random_llama

    model = as_transformers(random_llama(SHAPE, "float32", "torch"))
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "weights.safetensors")
    (folder / "sizes.json").write_text(json.dumps(SHAPES[SHAPE].sizes))


def compare(folder: Path, arguments: argparse.Namespace) -> list[Line]:
    """Measure both systems at every length. Raises `ArithmeticError` if their logits differ."""
    import measure

    lengths = [int(length) for length in arguments.lengths.split(",")]
    systems = (OURS, THEIRS)
    seconds: dict[tuple[str, int], list[float]] = {}
    logits: dict[tuple[str, int], Tensor] = {}
    with Worker(OURS, folder, arguments) as first, Worker(THEIRS, folder, arguments) as second:
        workers = dict(zip(systems, (first, second), strict=True))
        for tokens in lengths:
            for turn in range(arguments.rounds):
                for system in systems if turn % 2 == 0 else systems[::-1]:
                    answer = workers[system].read(tokens)
                    seconds.setdefault((system, tokens), []).append(answer["seconds"])
                    logits[system, tokens] = torch.tensor(answer["logits"])
                    print(f"{tokens:8} {system:13} {answer['seconds']:8.2f} s", flush=True)
    files = (arguments.checkout / "src" / "homer" / name for name in ("chunk.py", "patch_llama.py"))
    hashed = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    lines = []
    for tokens in lengths:
        difference = (logits[OURS, tokens] - logits[THEIRS, tokens]).abs().max().item()
        if not difference <= 1e-4:
            raise ArithmeticError(f"at {tokens} tokens the logits differ by {difference:.1e}")
        for system in systems:
            with Worker(system, folder, arguments) as worker:
                peak = worker.read(tokens)["peak"]
            print(f"{tokens:8} {system:13} {peak / 2**20:8.0f} MiB", flush=True)
            taken = sorted(seconds[system, tokens])
            lines.append(
                Line(
                    system,
                    tokens,
                    arguments.leaf_batch if system == OURS else 1,
                    taken[len(taken) // 2],
                    taken[0],
                    taken[-1],
                    peak,
                    difference,
                    "" if system == OURS else hashed,
                    *measure.about(),
                )
            )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--checkout", type=Path, required=True, help="a clone of github.com/alinlab/HOMER"
    )
    parser.add_argument("--python", type=Path, help="the Python that has what their code needs")
    parser.add_argument("--lengths", default="4096,16384,32768", help="tokens of the texts")
    parser.add_argument("--leaf-batch", type=int, default=4, help="leaves that we run at once")
    parser.add_argument("--rounds", type=int, default=3, help="repeats of each measurement")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--system", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        serve(arguments)
        return 0
    if arguments.python is None:
        parser.error("--python is missing")
    import measure

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder)
        lines = compare(folder, arguments)
    measure.write_csv(arguments.out / f"authors-{SHAPE}-float32.csv", lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
