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
from .engine.rank_scheduler import RankScheduler
from .engine.scheduler import Scheduler
from .engine.tree import Node, Plan
from .model.llama import Llama
from .ranks import Ranks
from .storage.tensor_file import checksum_of
from .text.tokens import TokensLike, check_model, split_input

Parts = tuple[Tensor, Tensor, Tensor]


class DocumentsError(ValueError):
    """Some documents of a batch failed; `encoded` has the others, None for each of these."""

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
) -> EncodedContext | None:
    """Merge a long input into a cache of at most `config.target_len` rows (HOMER, Song et al., ICLR
    2024).

    context, prefix, suffix: text or token ids (a list or a 1-D tensor). The prefix, left out, is
    the tokenizer's beginning-of-sequence token; one that is given takes its place, so that a text
    begins with "<s>" or whatever the model's is. The suffix, left out, is the context's own end.
    `chat_affixes` makes both for a model that chats.
    progress: show a bar over the tree's nodes, or call a function with each finished one.
    scheduler: another walk of the tree, for experiments on the method.
    special_tokens: let control tokens that the context spells, such as those that end a chat's
    turn, be control tokens. Left out, it is read as nothing but text; in prefix and suffix they
    always count, but for the question that `chat_affixes` was given.
    ranks: processes that share the input, each of which calls this with the same arguments: every
    one walks subtrees of its own. The first one gets the result, the others None or, if the ranks
    say so, a copy.

    Raises `ValueError` for inputs and settings that do not fit the model or each other, for a
    calibration made for something else, for a model whose weights yield NaN, and for ranks that
    were given different things; `RankError` where another rank is gone.
    """
    if ranks is None:
        suffixes = None if suffix is None else [suffix]
        (encoded,) = encode_batch(
            model, [context], prefix, suffixes, config, progress, 1, scheduler, special_tokens
        )
        return encoded
    check_model(model)
    if scheduler is not Scheduler:
        raise ValueError("Ranks have a walk of their own; leave scheduler out.")
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
) -> list[EncodedContext] | None:
    """`encode` of several documents, in their order; each as if it were alone, to rounding.

    Documents of equal lengths share a tree and run side by side, at most `batch_size` of them;
    others run one after another. suffixes: one for each context. The other arguments are
    `encode`'s, and so is what is raised.
    ranks: processes among which whole documents are dealt out by what they cost; each of them calls
    this with the same arguments, and gets what `encode` says. A document that fails on its rank
    ends no other: `DocumentsError` names it where all are there.
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
        done = encode_alike(model, tree, parts, config, _shown(progress, ranks), scheduler)
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
        except Exception as error:  # the other documents are none the worse
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
    """Documents of equal lengths, as many as run side by side, each with their plan."""
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
    """What shows the progress: of ranks, only the first has a bar."""
    return progress if callable(progress) or ranks is None or not ranks.rank else False


def _deal(
    model: Llama, batches: list[tuple[Plan, list[int]]], ranks: Ranks
) -> list[tuple[Plan, list[int]]]:
    """This rank's batches: the dearest first, each to the rank that has the least to do so far."""
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
    """The first rank's encoding, on the others too where they want it."""
    if not ranks.everywhere:
        return encoded
    given = ranks.share(None if encoded is None else encoded.to("cpu"))
    if isinstance(given, ValueError):
        raise given
    return encoded or given.to(model.device)
