"""Long contexts on pre-trained Llama models without training: hierarchical context merging (HOMER,
ICLR 2024).

Names are imported when they are first used, so that `homer --help` need not wait for PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .answering import Generation
    from .calibration import Calibration, calibrate
    from .chat import chat_affixes
    from .config import HomerConfig, plan
    from .context import EncodedContext
    from .decoding import Decoding
    from .encoding import DocumentsError, encode, encode_batch
    from .engine.graphs import drop_graphs
    from .engine.tree import Plan
    from .generation import generate, generate_batch
    from .growing import append, close_up, compact
    from .loading import from_transformers, load, with_rope
    from .model.config import ModelConfig
    from .model.llama import Llama
    from .ranks import RankError, Ranks
    from .selection import Selection

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "Decoding",
    "DocumentsError",
    "EncodedContext",
    "Generation",
    "HomerConfig",
    "Llama",
    "ModelConfig",
    "Plan",
    "RankError",
    "Ranks",
    "Selection",
    "append",
    "calibrate",
    "chat_affixes",
    "close_up",
    "compact",
    "drop_graphs",
    "encode",
    "encode_batch",
    "from_transformers",
    "generate",
    "generate_batch",
    "load",
    "plan",
    "with_rope",
]

_MODULES = {
    "calibration": ("Calibration", "calibrate"),
    "chat": ("chat_affixes",),
    "config": ("HomerConfig", "plan"),
    "context": ("EncodedContext",),
    "encoding": ("DocumentsError", "encode", "encode_batch"),
    "growing": ("append", "close_up", "compact"),
    "decoding": ("Decoding",),
    "answering": ("Generation",),
    "generation": ("generate", "generate_batch"),
    "loading": ("from_transformers", "load", "with_rope"),
    "model.config": ("ModelConfig",),
    "model.llama": ("Llama",),
    "ranks": ("RankError", "Ranks"),
    "selection": ("Selection",),
    "engine.graphs": ("drop_graphs",),
    "engine.tree": ("Plan",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
