"""Long contexts on pre-trained Llama models without training: hierarchical context merging (HOMER,
ICLR 2024).
"""

from .calibration import Calibration, calibrate
from .config import HomerConfig, plan
from .context import EncodedContext
from .encoding import encode
from .generation import Generation, generate
from .loading import from_transformers, load
from .model.config import ModelConfig
from .model.llama import Llama
from .tree import Plan

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "EncodedContext",
    "Generation",
    "HomerConfig",
    "Llama",
    "ModelConfig",
    "Plan",
    "calibrate",
    "encode",
    "from_transformers",
    "generate",
    "load",
    "plan",
]
