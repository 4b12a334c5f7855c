"""The files that attempts are made on: small checkpoints, texts, and what commands make of them."""

import json
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path

import torch
from checkpoints import save_checkpoint
from command_line import CHAT_TEMPLATE
from eval_model import save_model
from text_tokenizers import byte_level

import homer_triton as ht

# A tenth of the chunks that a short limit has by default, so that short texts make trees.
CONFIG = ht.HomerConfig(max_chunk_len=48, target_len=40, layers_warmup=0)
# A run that takes no time: what is asked, and of which methods.
PASSKEY = ("--methods", "plain,homer", "--lengths", "1x", "--depths", "0.5", "--samples", "2")
SENTENCES = (
    "The grass is green.",
    "The sky is blue.",
    "The pass key is 71432. Remember it.",
    "Here we go.",
    "There and back again.",
)


def text(sentences: int) -> str:
    """So many sentences, six tokens each."""
    return " ".join(SENTENCES[index % len(SENTENCES)] for index in range(sentences))


def make_checkpoints(folder: Path) -> None:
    """Tiny Llamas: `model` with the demo's tokenizer, `chat` with a template and another RoPE,
    `shards` in several files with a tokenizer of bytes.
    """
    save_model(folder / "model", hidden_size=32, intermediate_size=48)
    save_model(
        folder / "chat",
        hidden_size=32,
        intermediate_size=48,
        rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0},
    )
    (folder / "chat" / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    tokenizer = byte_level()
    save_checkpoint(
        folder / "shards",
        "llama-3.2",
        torch.float16,
        shards=True,
        vocab_size=len(tokenizer),
        max_position_embeddings=128,
        num_hidden_layers=6,
    )
    tokenizer.save_pretrained(folder / "shards")


def make_texts(folder: Path) -> None:
    """Good texts and bad ones, and questions in QuALITY's format."""
    (folder / "text.txt").write_text(text(60))
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    question = {
        "question": "What is the grass?",
        "options": ["green", "blue and yellow", "stone", "water"],
        "gold_label": 1,
        "difficult": 1,
    }
    entry = {"article": text(20), "questions": [question, question]}
    (folder / "quality.jsonl").write_text(f"{json.dumps(entry)}\n{json.dumps(entry)}\n")


def make_encoding(folder: Path, model: str = "model") -> None:
    """`encoded.safetensors` and `bias.safetensors` of one of the checkpoints."""
    llama = ht.load(folder / model, device="cpu")
    encoded = ht.encode(llama, text(60), suffix="What is the pass key?", config=CONFIG)
    encoded.save(folder / "encoded.safetensors")
    bias = ht.calibrate(llama, [text(60)], segment_len=64, num_segments=2)
    bias.save(folder / "bias.safetensors")
    torch.save(bias.bias, folder / "bias.pt")


def add_special_files(folder: Path) -> None:
    """What is no regular file: a FIFO, a socket, and links to a file, to nowhere and to itself."""
    os.mkfifo(folder / "pipe")
    # A socket's path may be short only.
    with socket.socket(socket.AF_UNIX) as own:
        short = Path(f"/proc/self/fd/{os.open(folder, os.O_RDONLY)}")
        own.bind(str(short / "socket"))
        os.close(int(short.name))
    (folder / "link.safetensors").symlink_to("old.safetensors")
    (folder / "nowhere").symlink_to("absent")
    (folder / "loop").symlink_to("loop")


def contents(folder: Path) -> Mapping[str, bytes | str]:
    """Every file below a folder by its name: what it holds, or what it is."""
    found: dict[str, bytes | str] = {}
    for root, folders, files in os.walk(os.fsencode(folder)):
        for name in (*folders, *files):
            path = Path(os.fsdecode(os.path.join(root, name)))
            key = str(path.relative_to(folder))
            if path.is_symlink():
                found[key] = f"link to {os.readlink(path)}"
            elif path.is_file():
                found[key] = path.read_bytes()
            else:
                found[key] = f"mode {path.stat().st_mode:o}"
    return found


def copy_place(pristine: Path, folder: Path) -> None:
    """Copy the files that attempts are made on into a folder that is there."""
    shutil.copytree(pristine, folder, symlinks=True, dirs_exist_ok=True)
