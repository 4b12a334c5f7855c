"""The demo model: a small Llama that ships with the package, and the script that trains it.

`CHECKPOINT` is its folder, in Hugging Face format; the README.md there says what it was trained on
and what it is not.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).resolve().parent / "checkpoint"
# How HOMER does on a model that does not ship, from the committed results (bench/tables.py).
REAL_MODEL = Path(__file__).resolve().parent / "real_model.json"
TEXT_CHECKPOINT = Path(__file__).resolve().parent / "text_checkpoint"
