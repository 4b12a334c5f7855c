"""The bias that makes near and far tokens comparable: what a last token pays to a distance,
whatever stands there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .engine.tree import Plan, default_chunk_len
from .kernels.reference import score_rows
from .model.errors import shorten
from .model.llama import Llama
from .storage.tensor_file import FLOATS, TensorFile, save_tensors
from .text.tokens import TokensLike, tokenize

_KIND = "homer_triton.calibration"


@dataclass(frozen=True, eq=False)
class Calibration:
    """bias: [L, distances] float32, the mean score before calibration at each distance from the
    last row, by layer.

    It corrects the paper's score, the largest logit over heads. One made by `calibrate` is stamped
    with its model's fingerprint; one made from a raw tensor has no stamp and fits every model with
    as many layers. file: where it was loaded from, if it was.
    """

    bias: Tensor
    model: str | None = None
    file: Path | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.bias.ndim != 2 or not self.bias.numel() or not self.bias.is_floating_point():
            raise ValueError(
                f"A calibration is a floating-point tensor [layers, distances], not "
                f"{self.bias.dtype} "
                f"{list(self.bias.shape)}."
            )
        if not self.bias.isfinite().all():
            raise ValueError("The calibration holds NaN or infinite values.")

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whose name must end so; raises `ValueError` where that is not
        possible.
        """
        if Path(path).suffix != ".safetensors":
            raise ValueError(f"{path} must end in .safetensors: other files are read as torch's.")
        save_tensors(path, _KIND, {"model": self.model}, {"bias": self.bias})

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a file written by `save`, or a torch file that holds one [layers, distances] tensor.

        Raises `FileNotFoundError`, or `ValueError` for a file that is neither.
        """
        path = Path(path)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"There is no calibration file {path}.")
        if path.suffix != ".safetensors":
            return cls(_load_torch(path), file=path)
        try:
            file = TensorFile.open(path, _KIND, ["bias"])
            model = file.described.get("model")
            if not isinstance(model, str | None):
                raise ValueError(f"model is {model!r} instead of a fingerprint")
            file.require("bias", FLOATS, (None, None))
            return cls(file.read()["bias"], model, path)
        except ValueError as error:
            raise ValueError(
                f"{path} is not a calibration file, or is damaged: {shorten(error)}; "
                "calibrate again."
            ) from error

    def check(self, model: Llama, plan: Plan) -> None:
        """Raise `ValueError` if this calibration does not serve a model and a plan's chunks."""
        layers, distances = self.bias.shape
        if layers != model.config.num_hidden_layers:
            raise ValueError(
                f"The calibration has {layers} layers, the model {model.config.num_hidden_layers}; "
                f"calibrate this model."
            )
        if self.model is not None and self.model != model.fingerprint:
            raise ValueError(
                f"The calibration was made for another model ({self.model}, this is "
                f"{model.fingerprint}); "
                f"calibrate this model."
            )
        walks = [walk for walk in (plan, plan.narrowing()) if walk is not None and walk.prunes]
        needed = max((walk.chunk_end - walk.prefix_len for walk in walks), default=0)
        if distances < needed:
            raise ValueError(
                f"The calibration covers distances up to {distances - 1}, chunks need "
                f"{needed - 1}; calibrate with "
                f"segments of at least {needed} tokens or lower max_chunk_len."
            )


def calibrate(
    model: Llama,
    texts: Iterable[TokensLike],
    segment_len: int | None = None,
    num_segments: int = 100,
    progress: bool = False,
) -> Calibration:
    """Measure the bias on ordinary text (HOMER, section 3.3 and appendix A).

    The texts, joined, are cut into `num_segments` segments of `segment_len` tokens (the default
    length of chunks) at even spacing, each run by the plain model; `bias[layer][d]` is the mean,
    over segments, of the score at distance d from the last token. With fewer
    tokens than all segments need, segments overlap. Raises `ValueError` for texts shorter than one
    segment, and for a text in place of a list.
    """
    if isinstance(texts, str):
        raise ValueError("texts is a list of texts, not a text; give [text].")
    limit = model.config.context_limit
    length = default_chunk_len(limit) if segment_len is None else segment_len
    if not 1 < length <= limit:
        raise ValueError(f"segment_len={length} must be from 2 to the context limit, {limit}.")
    if num_segments < 1:
        raise ValueError(f"num_segments={num_segments} must be at least 1.")
    parts = [tokenize(model, text, "texts") for text in texts]
    tokens = torch.cat(parts) if parts else tokenize(model, [], "texts")
    if len(tokens) < length:
        raise ValueError(
            f"The calibration texts have {len(tokens)} tokens, a segment needs {length}; give more "
            "text or lower "
            f"segment_len."
        )
    last = len(tokens) - length
    starts = sorted({i * last // max(num_segments - 1, 1) for i in range(num_segments)})
    shape = (model.config.num_hidden_layers, length)
    total = torch.zeros(shape, dtype=torch.float32, device="cpu")
    for start in tqdm(starts, "calibrate", unit="segment", disable=not progress):
        total += _segment_scores(model, tokens[start : start + length])
    return Calibration((total / len(starts)).flip(1), model.fingerprint)


def _segment_scores(model: Llama, tokens: Tensor) -> Tensor:
    """The last row's score of every row, by layer, in the plain model: [L, T] float32 on the
    CPU.
    """
    scores: list[Tensor] = []
    model.watch(tokens, 1, lambda layer, q, k: scores.append(score_rows(q, k)[0]))
    return torch.stack(scores).cpu()


def _load_torch(path: Path) -> Tensor:
    """The single tensor in a torch file, such as the authors' published biases."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is not its own
        raise ValueError(
            f"{path} is neither a safetensors nor a torch file of one tensor."
        ) from error
    tensors: Sequence[object] = list(content.values()) if isinstance(content, dict) else [content]
    bias = tensors[0] if len(tensors) == 1 else None
    if not isinstance(bias, Tensor):
        raise ValueError(f"{path} must hold exactly one tensor [layers, distances].")
    if bias.layout != torch.strided or bias.nbytes > bias.untyped_storage().nbytes():
        # Written out, it would be as large as it claims, whatever the file's size.
        raise ValueError(f"{path} must hold a tensor with all of its numbers.")
    return bias.float()
