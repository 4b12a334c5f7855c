"""`encode` and `encode_batch`: from long inputs to short KV caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor

from .checks import whole_number
from .config import HomerConfig
from .context import EncodedContext
from .engine.documents import encode_alike, fit_plan
from .engine.graphs import Graphs
from .engine.rank_scheduler import RankScheduler
from .engine.scheduler import Scheduler
from .engine.tree import Node, Plan
from .model.llama import Llama
from .ranks import Ranks
from .storage.tensor_file import checksum_of
from .text.tokens import TokensLike, check_model, split_input

Parts = tuple[Tensor, Tensor, Tensor]


class DocumentsError(ValueError):
    """Some documents of a batch that several ranks shared have failed.

    Attributes:
        encoded: The results in the order of the documents; None for those that failed.
    """

    def __init__(self, message: str, encoded: list[EncodedContext | None]) -> None:
        super().__init__(message)
        self.encoded = encoded


@overload
def encode(
    model: Llama,
    context: TokensLike,
    prefix: TokensLike | None = None,
    suffix: TokensLike | None = None,
    config: HomerConfig | None = None,
    progress: bool | Callable[[Node], None] = False,
    scheduler: Callable[..., Scheduler] = Scheduler,
    special_tokens: bool = False,
    ranks: None = None,
    graphs: Graphs | None = None,
) -> EncodedContext: ...
@overload
def encode(
    model: Llama,
    context: TokensLike,
    prefix: TokensLike | None = None,
    suffix: TokensLike | None = None,
    config: HomerConfig | None = None,
    progress: bool | Callable[[Node], None] = False,
    scheduler: Callable[..., Scheduler] = Scheduler,
    special_tokens: bool = False,
    ranks: Ranks | None = None,
    graphs: Graphs | None = None,
) -> EncodedContext | None: ...
@torch.no_grad()
def encode(
    model: Llama,
    context: TokensLike,
    prefix: TokensLike | None = None,
    suffix: TokensLike | None = None,
    config: HomerConfig | None = None,
    progress: bool | Callable[[Node], None] = False,
    scheduler: Callable[..., Scheduler] = Scheduler,
    special_tokens: bool = False,
    ranks: Ranks | None = None,
    graphs: Graphs | None = None,
) -> EncodedContext | None:
    """Read a long input into a short KV cache (HOMER, Song et al., ICLR 2024).

    The input is `prefix ‖ context ‖ suffix`: a short start, the long text, and an end, usually the
    question. The context is cut into chunks short enough for the model; each also holds the prefix
    and the suffix. The chunks run through the model, lose the tokens that the suffix attends to
    least, and are merged in pairs, until at most `config.target_len` tokens are left. By default
    these are read once more, as one ordinary prompt.

    Put the question into the suffix: the encoding answers that question, and later ones only find
    what it kept.

        encoded = ht.encode(model, text, suffix="What is the pass key? The pass key is")
        print(ht.generate(model, encoded, max_new_tokens=6).text)

    For a chat model, `chat_affixes` makes prefix and suffix.

    Args:
        model: From `load` or `from_transformers`.
        context: The long text, or its token ids (a list or a 1-D tensor).
        prefix: What the input starts with, text or token ids. Default: what the
            tokenizer puts before a text: "<s>" for Llama and Mistral, nothing for Qwen and SmolLM2
            (without a tokenizer, the config's beginning-of-sequence token). A prefix that you give
            replaces it, so begin it with "<s>" for a model that needs one.
        suffix: What the input ends with, text or token ids; usually the question. Default: the
            context's own end, 100 tokens of it or an eighth of a chunk if that is less.
        config: The settings; the defaults of `HomerConfig` if left out.
        progress: True shows a progress bar. A function is called with each chunk (a `Node` of the
            merge tree) when it is finished.
        scheduler: Another class to walk the tree, for experiments on the method.
        special_tokens: Whether special tokens that the context spells, such as the one that ends a
            chat turn, count as special tokens. Default: no, they are read as plain text. In prefix
            and suffix they always count, except in the question that `chat_affixes` was given.
        ranks: Processes that share the work on this input. Each calls this with the same arguments
            and runs its own subtrees.
        graphs: Where captured CUDA graphs stay for the next input of the same lengths. Needs a
            model on a CUDA device; not with ranks.

    Returns:
        The encoding. With ranks, the first rank gets it; the others get None, or a copy if
        `ranks.everywhere`.

    Raises:
        ValueError: The input or the settings do not fit the model or each other, the calibration
            was made for something else, the model's logits are not finite, or the ranks were given
            different things.
        RankError: Another rank has ended or does not answer.
    """
    if ranks is None:
        suffixes = None if suffix is None else [suffix]
        (encoded,) = encode_batch(
            model,
            [context],
            prefix,
            suffixes,
            config,
            progress,
            1,
            scheduler,
            special_tokens,
            graphs=graphs,
        )
        return encoded
    check_model(model)
    if scheduler is not Scheduler or graphs is not None:
        raise ValueError("Ranks have a walk of their own; leave scheduler and graphs out.")
    config = config or HomerConfig()
    with ranks.agreeing() as facts:
        parts = split_input(
            model, context, prefix, suffix, config.chunk_len(model.config), special_tokens
        )
        tree, _ = fit_plan(model, parts, config, 1, ranks.size)
        facts |= _facts(model, config, [parts], [tree])
    walk = partial(RankScheduler, ranks=ranks)
    try:
        done = encode_alike(model, tree, [parts], config, _shown(progress, ranks), walk)
    except ValueError as error:
        if ranks.everywhere:
            ranks.share(error)
        raise
    return _hand_out(ranks, model, None if done is None else done[0])


@overload
def encode_batch(
    model: Llama,
    contexts: Sequence[TokensLike],
    prefix: TokensLike | None = None,
    suffixes: Sequence[TokensLike] | None = None,
    config: HomerConfig | None = None,
    progress: bool | Callable[[Node], None] = False,
    batch_size: int = 8,
    scheduler: Callable[..., Scheduler] = Scheduler,
    special_tokens: bool = False,
    ranks: None = None,
    graphs: Graphs | None = None,
) -> list[EncodedContext]: ...
@overload
def encode_batch(
    model: Llama,
    contexts: Sequence[TokensLike],
    prefix: TokensLike | None = None,
    suffixes: Sequence[TokensLike] | None = None,
    config: HomerConfig | None = None,
    progress: bool | Callable[[Node], None] = False,
    batch_size: int = 8,
    scheduler: Callable[..., Scheduler] = Scheduler,
    special_tokens: bool = False,
    ranks: Ranks | None = None,
    graphs: Graphs | None = None,
) -> list[EncodedContext] | None: ...
@torch.no_grad()
def encode_batch(
    model: Llama,
    contexts: Sequence[TokensLike],
    prefix: TokensLike | None = None,
    suffixes: Sequence[TokensLike] | None = None,
    config: HomerConfig | None = None,
    progress: bool | Callable[[Node], None] = False,
    batch_size: int = 8,
    scheduler: Callable[..., Scheduler] = Scheduler,
    special_tokens: bool = False,
    ranks: Ranks | None = None,
    graphs: Graphs | None = None,
) -> list[EncodedContext] | None:
    """Encode several documents in one call; each as `encode` would alone, up to rounding.

    Documents of equal lengths share a merge tree and run side by side. The others run one after
    another.

        encoded = ht.encode_batch(model, texts, suffixes=questions)

    Args:
        model: As in `encode`, like the other arguments that are not listed here.
        contexts: The documents, each a text or token ids.
        prefix: One prefix for all of them.
        suffixes: A suffix for each document. Default: each one's own end.
        batch_size: The most documents that run side by side; fewer if a memory budget requires it.
        ranks: Processes to share the documents. Each calls this with the same arguments and encodes
            whole documents, dealt out so that all have about equal work.

    Returns:
        The encodings, in the order of the documents. With ranks, the first rank gets them; the
        others get None, or copies if `ranks.everywhere`.

    Raises:
        ValueError: As in `encode`; also if there are not as many suffixes as contexts.
        DocumentsError: With ranks only, wherever results are returned: some documents failed. The
            others are in its `encoded`.
        RankError: Another rank has ended or does not answer.
    """
    check_model(model)
    if isinstance(contexts, str) or isinstance(suffixes, str):
        raise ValueError("contexts and suffixes are lists, an entry for each document, not texts.")
    if suffixes is not None and len(suffixes) != len(contexts):
        raise ValueError(f"There are {len(contexts)} contexts but {len(suffixes)} suffixes.")
    batch_size = whole_number("batch_size", batch_size, 1)
    config = config or HomerConfig()
    chunk_len = config.chunk_len(model.config)
    ends: list[TokensLike | None]
    ends = [None] * len(contexts) if suffixes is None else list(suffixes)

    def lay_out() -> tuple[list[Parts], list[tuple[Plan, list[int]]]]:
        inputs = [
            split_input(model, context, prefix, end, chunk_len, special_tokens)
            for context, end in zip(contexts, ends, strict=True)
        ]
        return inputs, _batches(model, inputs, config, batch_size)

    def run(tree: Plan, batch: list[int]) -> list[EncodedContext]:
        parts = [inputs[index] for index in batch]
        done = encode_alike(model, tree, parts, config, _shown(progress, ranks), scheduler, graphs)
        assert done is not None
        return done

    encoded: dict[int, EncodedContext] = {}
    if ranks is None:
        inputs, batches = lay_out()
        for tree, batch in batches:
            encoded |= zip(batch, run(tree, batch), strict=True)
        return [encoded[index] for index in range(len(inputs))]
    with ranks.agreeing() as facts:
        inputs, batches = lay_out()
        facts |= _facts(model, config, inputs, [tree for tree, _ in batches])
    failed: dict[int, str] = {}
    for tree, batch in _deal(model, batches, ranks):
        try:
            encoded |= zip(batch, run(tree, batch), strict=True)
        except Exception as error:  # does not stop the other documents
            failed |= dict.fromkeys(batch, f"{type(error).__name__}: {error}")
    given = ranks.collect(({i: one.to("cpu") for i, one in encoded.items()}, failed))
    if given is not None:
        encoded, failed = {}, {}
        for rank, (theirs, wrong) in enumerate(given):
            encoded |= theirs
            failed |= {index: f"on rank {rank}: {what}" for index, what in wrong.items()}
    documents = [encoded.get(index) for index in range(len(inputs))]
    if ranks.everywhere:
        documents, failed = ranks.share((documents, failed))
    elif given is None:
        return None
    if failed:
        told = (f"Document {index} failed {what}" for index, what in sorted(failed.items()))
        raise DocumentsError("; ".join(told), documents)
    return [one.to(model.device) for one in documents if one is not None]


def _batches(
    model: Llama, inputs: list[Parts], config: HomerConfig, batch_size: int
) -> list[tuple[Plan, list[int]]]:
    """Groups of documents of equal lengths that run side by side, each with its plan."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, (_, context, suffix) in enumerate(inputs):
        groups.setdefault((len(context), len(suffix)), []).append(index)
    batches = []
    for group in groups.values():
        while group:
            tree, documents = fit_plan(model, inputs[group[0]], config, min(batch_size, len(group)))
            batches.append((tree, group[:documents]))
            group = group[documents:]
    return batches


def _shown(
    progress: bool | Callable[[Node], None], ranks: Ranks | None
) -> bool | Callable[[Node], None]:
    """What shows the progress. Of several ranks, only the first has a bar."""
    return progress if callable(progress) or ranks is None or not ranks.rank else False


def _deal(
    model: Llama, batches: list[tuple[Plan, list[int]]], ranks: Ranks
) -> list[tuple[Plan, list[int]]]:
    """This rank's share of the batches.

    The most expensive come first, each to the rank that has the least work so far.
    """
    work = [0] * ranks.size
    own = []
    costs = [tree.flops(model.config) * len(batch) for tree, batch in batches]
    for index in sorted(range(len(batches)), key=lambda i: -costs[i]):
        rank = work.index(min(work))
        work[rank] += costs[index]
        if rank == ranks.rank:
            own.append(batches[index])
    return own


def _facts(
    model: Llama, config: HomerConfig, inputs: list[Parts], trees: list[Plan]
) -> dict[str, Any]:
    """What must be the same on all ranks."""
    from . import __version__

    bias = None if config.calibration is None else config.calibration.bias
    tokens = {f"{i}.{j}": part for i, parts in enumerate(inputs) for j, part in enumerate(parts)}
    return {
        "version": __version__,
        "model": (model.fingerprint, str(model.dtype)),
        "settings": ([tree.to_dict() for tree in trees], str(config.selected_by)),
        "calibration": None if bias is None else checksum_of("", {"bias": bias}),
        "text": checksum_of("", tokens),
    }


def _hand_out(ranks: Ranks, model: Llama, encoded: EncodedContext | None) -> EncodedContext | None:
    """The first rank's encoding, and copies of it for the other ranks if they want them."""
    if not ranks.everywhere:
        return encoded
    given = ranks.share(None if encoded is None else encoded.to("cpu"))
    if isinstance(given, ValueError):
        raise given
    return encoded or given.to(model.device)
