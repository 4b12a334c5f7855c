"""Measures what int8 weights save and cost: memory, speed and perplexity.

    python bench/quantized.py --text NOVEL [--model FOLDER] [--shape Llama-3.2-1B] [--out DIR]

For memory, a new process loads a checkpoint of a known shape with random weights, in float32, in
bfloat16, and as int8 with the rest in bfloat16. For perplexity and speed, a real checkpoint reads
the segments of a novel one by one; the dtypes take turns. Writes DIR/quantized.json.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import measure  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

import homer_triton as ht  # noqa: E402
from homer_triton.text.tokens import tokenize  # noqa: E402

SHAPES: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": {
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    }
}
# name: the arguments dtype and quantize of `load`.
KINDS: dict[str, tuple[str, Any]] = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "int8": ("bfloat16", "int8"),
}
SEGMENT, DECODED = 2048, 32

# Prints the resident bytes of a loaded model, and the peak while it was loaded.
LOAD = """
import sys
import homer_triton as ht
from homer_triton.evaluation import memory
if sys.argv[3] != "None":
    import torchao.quantization
before = memory.forget_peak()
quantize = None if sys.argv[3] == "None" else sys.argv[3]
model = ht.load(sys.argv[1], "cpu", sys.argv[2], quantize=quantize)
most = memory.peak()
print(memory.forget_peak() - before, most - before)
"""


def save_random(folder: Path, shape: str) -> None:
    """A checkpoint of random bfloat16 weights."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], dtype=torch.bfloat16))
    model.config.save_pretrained(folder)
    tensors = {
        name: torch.randn(p.shape).mul_(0.02).bfloat16() for name, p in model.named_parameters()
    }
    save_file(tensors, folder / "model.safetensors")


def loaded_bytes(shape: str) -> dict[str, dict[str, int]]:
    """By kind: resident bytes of the weights, and the peak while they were loaded."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        save_random(Path(folder), shape)
        for name, (dtype, quantize) in KINDS.items():
            command = [sys.executable, "-c", LOAD, folder, dtype, str(quantize)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
            resident, most = map(int, done.stdout.split())
            found[name] = {"bytes": resident, "peak_bytes": most}
            print(f"{name:9} {resident / 2**20:7,.0f} MiB, {most / 2**20:7,.0f} while loading")
    return found


@torch.no_grad()
def read(models: dict[str, ht.Llama], text: str, segments: int) -> dict[str, dict[str, float]]:
    """By kind: perplexity over a text's segments, and seconds per thousand tokens read and per new
    token after a segment.
    """
    ids = tokenize(next(iter(models.values())), text, "--text")
    losses: dict[str, list[float]] = {name: [] for name in models}
    reading: dict[str, list[float]] = {name: [] for name in models}
    decoding: dict[str, list[float]] = {name: [] for name in models}
    for index in range(segments):
        segment = ids[index * SEGMENT : (index + 1) * SEGMENT]
        for name, model in models.items():
            cache = model.new_cache(SEGMENT + DECODED)
            start = time.perf_counter()
            logits = model.forward(segment, cache, all_logits=True)
            reading[name].append((time.perf_counter() - start) / SEGMENT * 1000)
            losses[name].append(F.cross_entropy(logits[:-1], segment[1:]).item())
            start = time.perf_counter()
            for step in range(DECODED):
                model.forward(segment[step : step + 1], cache, SEGMENT + step)
            decoding[name].append((time.perf_counter() - start) / DECODED)
            print(index, name, f"{losses[name][-1]:.4f}", flush=True)
    return {
        name: {
            "perplexity": math.exp(sum(losses[name]) / segments),
            "seconds_per_1000_tokens": sorted(reading[name])[segments // 2],
            "seconds_per_new_token": sorted(decoding[name])[segments // 2],
        }
        for name in models
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="a long novel in UTF-8")
    parser.add_argument("--model", type=Path, default=Path("out/smollm2"))
    parser.add_argument("--shape", choices=SHAPES, default="Llama-3.2-1B")
    parser.add_argument("--segments", type=int, default=8, help="of 2,048 tokens")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    args = parser.parse_args()
    memory = loaded_bytes(args.shape)
    models = {
        name: ht.load(args.model, "cpu", dtype, quantize=quantize)
        for name, (dtype, quantize) in KINDS.items()
    }
    text = args.text.read_text(encoding="utf-8")
    found = read(models, text, args.segments)
    device, versions, commit, command = measure.about()
    written = {
        "shape": args.shape,
        "memory": memory,
        "model": args.model.name,
        "text": args.text.name,
        "tokens": args.segments * SEGMENT,
        "reading": found,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "device": device,
        "versions": versions,
        "commit": commit,
        "command": command,
    }
    path = args.out / "quantized.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
    for name, figures in found.items():
        print(name, {key: round(value, 4) for key, value in figures.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
