"""Calibration of the paper's score: what a last token's attention owes to distance alone.

Near tokens get larger scores than far ones, whatever they are. Subtracting the mean score at each
distance makes them comparable.
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
    """The mean score at each distance, to subtract from the paper's scores.

    The paper scores a token by the largest attention logit over heads that the chunk's last token
    gives it. Use a calibration with the paper's selection: `HomerConfig.paper(calibration=...)`.

    One made by `calibrate` belongs to its model. One made from a raw tensor has no fingerprint, and
    any model with as many layers accepts it.

    Attributes:
        bias: [L, distances], floating point: for each layer, the mean score at each distance from
            the last token.
        model: The fingerprint of the model it was measured on, or None.
        file: The file it was loaded from, or None.

    Raises:
        ValueError: `bias` is of another shape or type, or holds NaN or infinity.
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
        """Write the calibration to a safetensors file; its name must end in ".safetensors".

        Raises:
            ValueError: The name ends otherwise, or the file cannot be written.
        """
        if Path(path).suffix != ".safetensors":
            raise ValueError(f"{path} must end in .safetensors: other files are read as torch's.")
        save_tensors(path, _KIND, {"model": self.model}, {"bias": self.bias})

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a file written by `save`, or a torch file with one tensor [layers, distances].

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is neither, or is damaged.
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
        """Raise `ValueError` if this calibration does not fit a model and a plan.

        It must have the model's layers and fingerprint, and cover all distances in the plan's
        chunks.
        """
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
    """Measure a model's calibration on ordinary text (HOMER, section 3.3 and appendix A).

        bias = ht.calibrate(model, [text])
        config = ht.HomerConfig.paper(calibration=bias)

    The texts are joined and cut into segments at even spacing. The plain model reads each segment.
    `bias[layer][d]` is the mean, over segments, of the score at distance d from the last token: the
    largest attention logit over heads.

    Args:
        model: From `load` or `from_transformers`.
        texts: A list of texts, or of lists of token ids.
        segment_len: Tokens in a segment, from 2 to the model's context limit. Default: the default
            length of a chunk. In an encoding, a chunk's context and suffix must not be longer than
            this.
        num_segments: How many segments to read. They overlap if the texts are short.
        progress: Show a progress bar.

    Returns:
        The calibration, with a bias [L, segment_len].

    Raises:
        ValueError: The texts are shorter than one segment, a number is out of range, or `texts` is
            a text instead of a list.
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
    """Each token's score by the last one, in the plain model: [L, T] float32 on the CPU."""
    with model.own_dtype():
        scores = [score_rows(q, k)[0] for _, q, k in model.queries_and_keys(tokens, 1)]
    return torch.stack(scores).cpu()


def _load_torch(path: Path) -> Tensor:
    """The single tensor in a torch file, such as the paper's authors' published biases."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds of error for other files
        raise ValueError(
            f"{path} is neither a safetensors nor a torch file of one tensor."
        ) from error
    tensors: Sequence[object] = list(content.values()) if isinstance(content, dict) else [content]
    bias = tensors[0] if len(tensors) == 1 else None
    if not isinstance(bias, Tensor):
        raise ValueError(f"{path} must hold exactly one tensor [layers, distances].")
    if bias.layout != torch.strided or bias.nbytes > bias.untyped_storage().nbytes():
        # A small file may claim a huge tensor, which copying would allocate.
        raise ValueError(f"{path} must hold a tensor with all of its numbers.")
    return bias.float()
