"""The demo model: a small Llama that ships with the package, and the script that trains it.

`CHECKPOINT` is its folder, in Hugging Face format; the README.md there says what it was trained on
and what it is not.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).resolve().parent / "checkpoint"
TEXT_CHECKPOINT = Path(__file__).resolve().parent / "text_checkpoint"
