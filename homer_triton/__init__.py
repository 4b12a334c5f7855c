"""Read long contexts with the pretrained Llama-family model you have, without training it.

An implementation of HOMER (Hierarchical Context Merging, Song et al., ICLR 2024). A long input is
cut into chunks. The chunks run through the model, the tokens that matter least to the question are
pruned, and neighbouring chunks are merged, until one short KV cache is left:

    import homer_triton as ht

    model = ht.load("meta-llama/Llama-3.2-1B-Instruct")
    encoded = ht.encode(model, text, suffix="Who tells the story? It is told by")
    print(ht.generate(model, encoded, max_new_tokens=20).text)

An encoding answers the question that it was encoded for (the suffix). Later questions only find
what that question kept.

Names are imported on first use, so that `homer --help` does not wait for PyTorch.
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
    from .document import Document, Source, read
    from .encoding import DocumentsError, encode, encode_batch
    from .engine.graphs import Graphs
    from .engine.tree import Plan
    from .generation import AnswersError, generate, generate_batch
    from .growing import append, close_up, compact
    from .loading import from_transformers, load, with_rope
    from .model.config import ModelConfig
    from .model.llama import Llama
    from .ranks import RankError, Ranks
    from .selection import Selection

__version__ = "0.2.0.dev0"

__all__ = [
    "AnswersError",
    "Calibration",
    "Decoding",
    "Document",
    "DocumentsError",
    "EncodedContext",
    "Generation",
    "Graphs",
    "HomerConfig",
    "Llama",
    "ModelConfig",
    "Plan",
    "RankError",
    "Ranks",
    "Selection",
    "Source",
    "append",
    "calibrate",
    "chat_affixes",
    "close_up",
    "compact",
    "encode",
    "encode_batch",
    "from_transformers",
    "generate",
    "generate_batch",
    "load",
    "plan",
    "read",
    "with_rope",
]

_MODULES = {
    "calibration": ("Calibration", "calibrate"),
    "chat": ("chat_affixes",),
    "config": ("HomerConfig", "plan"),
    "context": ("EncodedContext",),
    "document": ("Document", "Source", "read"),
    "encoding": ("DocumentsError", "encode", "encode_batch"),
    "growing": ("append", "close_up", "compact"),
    "decoding": ("Decoding",),
    "answering": ("Generation",),
    "generation": ("AnswersError", "generate", "generate_batch"),
    "loading": ("from_transformers", "load", "with_rope"),
    "model.config": ("ModelConfig",),
    "model.llama": ("Llama",),
    "ranks": ("RankError", "Ranks"),
    "selection": ("Selection",),
    "engine.graphs": ("Graphs",),
    "engine.tree": ("Plan",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
