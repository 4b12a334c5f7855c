"""`read`: read a text once, then ask it anything. A `Document` is what such a reading leaves."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

import torch
from torch import Tensor
from tqdm import tqdm

from .chat import chat_affixes
from .checks import check_text, whole_number
from .config import HomerConfig
from .context import EncodedContext
from .encoding import encode
from .engine.finding import MOST_ASKING, Finder, attend_again, lengths_of, rank
from .engine.reading import Chunks, ReadHeads, choose_heads, chunk_len_of, quantize, read_chunk
from .generation import decoding_of, generate
from .model.errors import shorten
from .model.llama import Llama
from .ranks import Ranks
from .storage.document_file import DocumentFile
from .storage.tensor_file import checksum_of
from .text.controls import plain_ids, words
from .text.excerpts import Excerpt, Unit, join
from .text.parts import Part, cut, extend
from .text.tokens import TokensLike, beginning, check_model, tokenize

if TYPE_CHECKING:
    from .answering import Generation

Keep = Literal["found", "all"]
# What every chunk begins with, behind what the tokenizer puts before a text.
OPENING = "The text:\n\n"
# The most tokens of a text that are read again for a question.
TEXT_LEN = 384


@dataclass(frozen=True)
class Source:
    """A place of a text.

    Attributes:
        start: Its first character, or its first token where the model has no tokenizer.
        end: The character after its last: `text[start:end]` is the place.
        votes: How much attention led to it. The places of one answer compare by it.
        name: The text's name, if it has one.
    """

    start: int
    end: int
    votes: float
    name: str | None = None


@dataclass(frozen=True)
class Text:
    """One of a document's texts.

    Attributes:
        name: Its name, or None.
        content: The text itself.
        tokens: How many tokens it has.
        units: How many units (sentences, or lines of records) it has.
    """

    name: str | None
    content: str
    tokens: int
    units: int


class Document:
    """A text, or several, that was read once and answers any question: what `read` returns.

        doc = ht.read(model, text)
        answer = doc.ask("Who tells the story?")
        print(answer.text)
        for source in answer.sources:
            print(text[source.start : source.end])

    Of each token it keeps the id and the keys of the few heads that find what a question asks for.
    A question attends to these keys, and the sentences that it attends to most are read again with
    it. Nothing is read again for another question, prefix, system prompt or chat history. A
    document does not change; `append` returns a longer one.

    Attributes:
        model: The model that read it.
        texts: Its texts, in their order.
    """

    def __init__(self, model: Llama, heads: ReadHeads, file: DocumentFile, opening: Tensor) -> None:
        self.model = model
        self._heads = heads
        self._file = file
        self._opening = opening
        content = bytes(file.tensors["text"].numpy()).decode()
        texts, reached = [], 0
        for name, characters, tokens, units in file.described["texts"]:
            own = content[reached : reached + characters]
            texts.append(Text(name, own, tokens, units))
            reached += characters
        self.texts: tuple[Text, ...] = tuple(texts)
        self._firsts = list(accumulate((text.units for text in texts), initial=0))
        chunk_end = Chunks(file.described["chunk_len"], file.described["overlap"]).end(len(opening))
        # The whole text behind a prefix, for `keep="all"`.
        self._whole: tuple[list[int], EncodedContext] | None = None
        self._finder = Finder(model, heads, file.tensors, chunk_end, self._firsts)

    def __len__(self) -> int:
        """Tokens."""
        return len(self.token_ids)

    def __repr__(self) -> str:
        return (
            f"Document({len(self)} tokens, {len(self.texts)} texts, {self.bytes_per_token:.0f} "
            "bytes a token)"
        )

    @property
    def token_ids(self) -> Tensor:
        """The ids of all texts' tokens, [N] int32."""
        return self._file.tensors["token_ids"]

    @property
    def bytes_per_token(self) -> float:
        """How much memory it takes, and how much of a disk, by token."""
        return sum(tensor.nbytes for tensor in self._file.tensors.values()) / len(self)

    def find(
        self, suffix: TokensLike, prefix: TokensLike | None = None, most: int | None = None
    ) -> tuple[Source, ...]:
        """The places that a question attends to most, best first. The text is not read again.

        Args:
            suffix: The question, text or token ids.
            prefix: What stands before the text, as in `encode`.
            most: How many places. Default: all.

        Raises:
            ValueError: The question is empty, or the file of the document is damaged.
        """
        before, after = self._prefix(prefix), self._suffix(suffix)
        most = None if most is None else whole_number("most", most, 1)
        self._file.check()
        votes, _ = self._finder.votes(before, after)
        return tuple(self._source(unit, float(votes[unit])) for unit in rank(votes)[:most])

    def encode(
        self,
        suffix: TokensLike,
        prefix: TokensLike | None = None,
        config: HomerConfig | None = None,
        keep: Keep = "found",
    ) -> EncodedContext:
        """Read what a question asks for into a short KV cache.

        The sentences that the question attends to most, and those around them, are read as one
        ordinary prompt, `prefix ‖ sentences ‖ suffix`. The best ones stand next to the question. A
        text that fits `target_len` is read whole.

        With `keep="all"`, the whole text is read as the plain model reads it. Its KV cache stays in
        memory, so the next question with the same prefix costs only its own tokens.

        Args:
            suffix: The question, and whatever else follows the text: text or token ids.
            prefix: What stands before the text, as in `encode`.
            config: `target_len` bounds the tokens of the prompt. The other settings are those of
                the merge tree and do nothing here.
            keep: "found" reads what the question asks for, "all" the whole text, which must fit the
                model's context limit.

        Returns:
            The encoding of that prompt: its `token_ids` are the prompt's. Its `sources` are the
            places that were read, best first.

        Raises:
            ValueError: The question is empty or leaves no room in `target_len`, the file of the
                document is damaged, or with `keep="all"` the text does not fit the model.
        """
        return self._prompt(self._prefix(prefix), self._suffix(suffix), config, keep)[0]

    def ask(
        self,
        question: str,
        history: Sequence[tuple[str, str]] = (),
        config: HomerConfig | None = None,
        keep: Keep = "found",
        on_text: Callable[[str], None] | None = None,
        chat_template: bool = True,
        thinking: bool | None = None,
        **decoding: Any,
    ) -> Generation:
        """Answer a question about the text.

        The question goes into the model's chat template where it has one. Otherwise it stands on a
        line of its own after the text.

        Args:
            question: The question.
            history: The questions so far and their answers, which stand between text and question.
            chat_template: Whether to use the model's chat template, if it has one.
            thinking: As in `chat_affixes`.
            config: As in `Document.encode`.
            keep: As in `Document.encode`.
            on_text: Called with each finished piece of the answer's text, for streaming.
            decoding: Any field of `Decoding`, such as `max_new_tokens=100` (64 by default) or
                `temperature=0.7`.

        Returns:
            The answer. Its `sources` are the places of the text that it was made from, best first.

        Raises:
            ValueError: As in `Document.encode` and `generate`.
        """
        before, after = self.affixes(question, history, chat_template, thinking)
        most = decoding_of(decoding).max_new_tokens
        # Earlier turns do not vote: their words would find again what they found.
        alone = self.affixes(question, (), chat_template, thinking)[1] if history else after
        encoded, excerpt = self._prompt(before, after, config, keep, most, len(alone))
        answer = generate(self.model, encoded, on_text=on_text, **decoding)
        if not answer.text.strip():
            return replace(answer, sources=encoded.sources)
        said = after.new_tensor([int(after[-1]), *answer.token_ids])
        votes = attend_again(self.model, self._heads, encoded, said, len(before), excerpt.units)
        places = sorted(votes.items(), key=lambda pair: -pair[1])
        return replace(answer, sources=tuple(self._source(*place) for place in places))

    def affixes(
        self,
        question: str,
        history: Sequence[tuple[str, str]] = (),
        chat_template: bool = True,
        thinking: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The token ids that `ask` puts before and after the text. Arguments are as there."""
        tokenizer = self.model.tokenizer
        if not isinstance(question, str) or not question.strip():
            raise ValueError("The question is empty; ask something.")
        if not all(isinstance(said, str) for turn in history for said in turn):
            raise ValueError("history holds pairs of texts, each a question and its answer.")
        if chat_template and tokenizer is not None and tokenizer.chat_template:
            prefix, suffix = chat_affixes(tokenizer, question, thinking, history)
            return self._prefix(prefix), self._suffix(suffix)
        if thinking is not None:
            raise ValueError("Only a chat template asks whether to think; leave thinking out.")
        turns = "".join(f"\n{asked}\n{answer}" for asked, answer in history)
        said = f"{turns}\n{question}\n" if turns else f"\n{question}"
        return self._prefix(None), self._suffix(words(said))

    def room(self, affix: int, config: HomerConfig | None = None, new_tokens: int = 0) -> int:
        """The most tokens of the text that are read again for a question.

        Args:
            affix: Tokens of prefix and suffix.
            config: Its `target_len` bounds them together with prefix and suffix. Default: 384.
            new_tokens: The most tokens of the answer, which must fit the model's limit, too.
                It gets at most half of it.
        """
        limit = self.model.config.context_limit
        given = None if config is None else config.target_len
        if given is not None:
            return given - affix
        return min(TEXT_LEN, limit - min(new_tokens, limit // 2) - affix)

    def append(self, more: TokensLike, name: str | None = None, progress: bool = False) -> Document:
        """Read more text.

        It costs reading the new text, and at most one chunk of the old one.

        Args:
            more: The text, or its token ids.
            name: The name of a new text. Default: the last text goes on.
            progress: Show a progress bar.

        Returns:
            The longer document. It has the keys that reading all tokens at once gives.

        Raises:
            ValueError: The text is empty, or there is a text of this name.
        """
        parts = self._parts()
        _check_name(name)
        if name is not None and name in {text.name for text in self.texts}:
            raise ValueError(f"There is a text {name!r} already; give the new one another name.")
        if name is None:
            parts[-1] = extend(self.model, parts[-1], more)
        else:
            parts.append(cut(self.model, name, more))
        self._file.check()
        chunk_len = self._file.described["chunk_len"]
        longer = _read(self.model, self._heads, parts, chunk_len, progress, None, self._file)
        assert longer is not None  # None only occurs with several ranks
        return longer

    def save(self, path: str | PathLike[str]) -> None:
        """Write the document to one file, which `load` maps into memory.

        Raises:
            ValueError: The file cannot be written.
        """
        self._file.check()
        self._file.write(Path(path))

    @classmethod
    def load(cls, path: str | PathLike[str], model: Llama) -> Document:
        """Open a file that `save`, or `read` with a path, wrote. It is not read whole.

        Args:
            path: The file.
            model: The model that read the text.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is no document, is damaged or not finished, or another model read
                it.
        """
        check_model(model)
        file = _opened(Path(path))
        described, stored = file.described, file.tensors
        if described.get("model") != model.fingerprint:
            raise ValueError(
                f"The document was read by another model ({described.get('model')}, this is "
                f"{model.fingerprint}); load that model, or read the text again."
            )
        try:
            heads = ReadHeads(
                tuple((layer, head) for layer, head in described["heads"]),
                tuple(described["weights"]),
                described["groups"],
            )
            opening = torch.tensor(described["opening"], dtype=torch.int64, device="cpu")
            tokens = sum(count for _, _, count, _ in described["texts"])
            units = sum(count for _, _, _, count in described["texts"])
            low, high = (int(bound) for bound in stored["token_ids"].aminmax())
            sound = (
                heads.fit(model)
                and stored["keys"].shape[1:] == (len(heads.key_heads), model.config.head_dim)
                and (tokens, units) == (len(stored["token_ids"]), len(stored["unit_starts"]))
                and low >= 0
                and high < model.config.vocab_size
            )
            if sound:
                return cls(model, heads, file, opening)
        except (ValueError, KeyError, TypeError, IndexError, RuntimeError):
            pass
        raise ValueError(f"{path} is damaged, or of another version; read the text again.")

    def _prefix(self, prefix: TokensLike | None) -> Tensor:
        own = beginning(self.model) if prefix is None else prefix
        return tokenize(self.model, own, "prefix", special_tokens=True)

    def _suffix(self, suffix: TokensLike) -> Tensor:
        ids = tokenize(self.model, suffix, "suffix", special_tokens=True)
        if not len(ids):
            raise ValueError("The question is empty; ask something.")
        return ids

    def _parts(self) -> list[Part]:
        """The texts as they were cut."""
        parts, token, unit = [], 0, 0
        for text in self.texts:
            tokens, units = slice(token, token + text.tokens), slice(unit, unit + text.units)
            starts = (self._file.tensors["unit_starts"][units] - token).tolist()
            spans = [
                (start, end) for start, end in self._file.tensors["unit_spans"][units].tolist()
            ]
            parts.append(
                Part(text.name, self.token_ids[tokens].long(), text.content, starts, spans)
            )
            token, unit = tokens.stop, units.stop
        return parts

    def _source(self, unit: int, votes: float) -> Source:
        start, end = self._file.tensors["unit_spans"][unit].tolist()
        return Source(start, end, votes, self.texts[self._text_of(unit)].name)

    def _text_of(self, unit: int) -> int:
        """Which text a unit is of."""
        return bisect_right(self._firsts, unit) - 1

    def _prompt(
        self,
        prefix: Tensor,
        suffix: Tensor,
        config: HomerConfig | None,
        keep: Keep,
        new_tokens: int = 0,
        last: int = MOST_ASKING,
    ) -> tuple[EncodedContext, Excerpt]:
        """The encoding that answers a question, and the part of the text in it. last: how many
        tokens at the suffix's end are the question.
        """
        if keep not in get_args(Keep):
            raise ValueError(
                f"keep={keep!r} is not known; choose one of {', '.join(get_args(Keep))}."
            )
        if keep == "all" and len(self) > 1:
            return self._read_whole(prefix, suffix, new_tokens)
        return self._read_again(prefix, suffix, config, new_tokens, last)

    @torch.no_grad()
    def _read_whole(
        self, prefix: Tensor, suffix: Tensor, new_tokens: int
    ) -> tuple[EncodedContext, Excerpt]:
        """The suffix behind the whole text, and the text; its cache stays for the next suffix."""
        model, ids, limit = self.model, self.token_ids.long(), self.model.config.context_limit
        total = len(prefix) + len(ids) + len(suffix) + min(new_tokens, limit // 2)
        if total > limit and not model.config.reaches_beyond_limit:
            raise ValueError(
                f'With keep="all", text, question and answer have {total} tokens, more than the '
                f"model's context limit of {limit}; leave keep out."
            )
        if self._whole is None or self._whole[0] != prefix.tolist():
            length = len(prefix) + len(ids)
            one = HomerConfig(max_chunk_len=length, target_len=length)
            self._whole = (prefix.tolist(), encode(model, ids[:-1], prefix, ids[-1:], one))
        whole = self._whole[1]
        cache = whole.open_cache(model, len(suffix))
        after = suffix.to(model.device)
        logits = model.forward(after, cache, len(whole), whole.next_position)
        keys, values = (half.contiguous() for half in cache.transpose(2, 3).unbind(1))
        starts = self._file.tensors["unit_starts"]
        units = torch.arange(len(starts), device="cpu")
        units = units.repeat_interleave(lengths_of(starts, len(ids)))
        return whole.grown(after, keys, values, logits), Excerpt(ids, units)

    def _read_again(
        self,
        prefix: Tensor,
        suffix: Tensor,
        config: HomerConfig | None,
        new_tokens: int,
        last: int,
    ) -> tuple[EncodedContext, Excerpt]:
        """The encoding of what a question asks for, and what was read for it."""
        affix = len(prefix) + len(suffix)
        most = self.room(affix, config, new_tokens)
        if most < 1:
            given = config is not None and config.target_len is not None
            limit = "target_len" if given else "the model's context limit"
            raise ValueError(
                f"Prefix and question have {affix} tokens and leave the text no room in {limit}; "
                f"ask something shorter{', or raise target_len' if given else ''}."
            )
        self._file.check()
        if len(self) <= most:
            votes, _ = self._finder.votes(prefix, suffix, last)
            groups = [list(range(first, stop)) for first, stop in pairwise(self._firsts)]
        else:
            found = self._finder.find(prefix, suffix, most, last)
            votes, groups = found.votes, found.groups
        excerpt = self._excerpt(groups)
        while len(excerpt.ids) > most and len(groups) > 1:
            groups = groups[1:]  # what joins them takes tokens, too: the one with the fewest votes
            excerpt = self._excerpt(groups)
        # The end of it is next to the question.
        excerpt = Excerpt(excerpt.ids[-most:], excerpt.units[-most:])
        total = affix + len(excerpt.ids)
        one = HomerConfig(max_chunk_len=total, target_len=total)
        encoded = encode(self.model, excerpt.ids, prefix, suffix, one)
        chosen = sorted((unit for group in groups for unit in group), key=lambda unit: -votes[unit])
        sources = tuple(self._source(unit, float(votes[unit])) for unit in chosen)
        return replace(encoded, sources=sources), excerpt

    def _excerpt(self, groups: Sequence[Sequence[int]]) -> Excerpt:
        """Some units to read again, in this order."""
        tokenizer, numbers = self.model.tokenizer, [unit for group in groups for unit in group]
        if tokenizer is None:
            each = [self._finder.ids_of(number) for number in numbers]
            owners = [number for number, own in zip(numbers, each, strict=True) for _ in own]
            return Excerpt.of([token for own in each for token in own], owners)
        spans = self._file.tensors["unit_spans"][numbers].tolist()
        units = [
            Unit(self._text_of(n), n, (a, b)) for n, (a, b) in zip(numbers, spans, strict=True)
        ]
        return join(tokenizer, [text.content for text in self.texts], units)


@overload
def read(
    model: Llama,
    text: TokensLike | Mapping[str, TokensLike],
    config: HomerConfig | None = None,
    progress: bool = False,
    path: str | PathLike[str] | None = None,
    ranks: None = None,
) -> Document: ...
@overload
def read(
    model: Llama,
    text: TokensLike | Mapping[str, TokensLike],
    config: HomerConfig | None = None,
    progress: bool = False,
    path: str | PathLike[str] | None = None,
    ranks: Ranks | None = None,
) -> Document | None: ...
def read(
    model: Llama,
    text: TokensLike | Mapping[str, TokensLike],
    config: HomerConfig | None = None,
    progress: bool = False,
    path: str | PathLike[str] | None = None,
    ranks: Ranks | None = None,
) -> Document | None:
    """Read a text once, to ask it any number of questions.

        doc = ht.read(model, text)
        print(doc.ask("Who tells the story?").text)
        print(doc.ask("Where does she live?").text)

    The text is read chunk by chunk, without a question, as far as the layers go that find things.
    Memory does not grow but for what is kept, some hundred bytes a token.

    Args:
        model: From `load` or `from_transformers`.
        text: The text, or its token ids, or several of either by name.
        config: `max_chunk_len` sets the tokens of a chunk: 1024 by default, or less where the
            model's context limit is short. The other settings are those of the merge tree and do
            nothing here.
        progress: Show a progress bar.
        path: A file to write the document to while it is read. A reading that was interrupted goes
            on where it stopped, if it is called again with the same arguments.
        ranks: Processes that share the chunks. Each calls this with the same arguments; the first
            one writes the file.

    Returns:
        The document. With ranks, the first rank gets it; the others get None, or a copy if
        `ranks.everywhere`.

    Raises:
        ValueError: The text is empty, the file cannot be written, or the ranks were given different
            things.
        RankError: Another rank has ended or does not answer.
    """
    check_model(model)
    config = config or HomerConfig()
    named: Mapping[str | None, TokensLike]
    named = text if isinstance(text, Mapping) else {None: text}  # type: ignore[assignment]
    for name in named:
        _check_name(name)
    parts = [cut(model, name, own) for name, own in named.items()]
    if not parts:
        raise ValueError("There is no text; give at least one.")
    chunk_len = chunk_len_of(config, model.config)
    return _read(model, choose_heads(model), parts, chunk_len, progress, path, ranks=ranks)


def checkpoint_of(path: str | PathLike[str]) -> str:
    """The checkpoint that read a document's text, as it was named or by its folder.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no document, or the model had no name.
    """
    name = _opened(Path(path)).described.get("checkpoint")
    if not name:
        raise ValueError(f"{path} does not say which model read it; name the model.")
    return str(name)


def _opened(path: Path) -> DocumentFile:
    if not path.is_file():
        raise FileNotFoundError(f"There is no document {path}.")
    try:
        return DocumentFile.open(path)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{path} is not a document, or is damaged: {shorten(error)}; read the text again."
        ) from error


def _checkpoint_name(model: Llama) -> str:
    """Where a model's checkpoint is: a folder, or a hub id."""
    name = str(getattr(model.tokenizer, "name_or_path", ""))
    return os.path.abspath(name) if name and os.path.isdir(name) else name


def _read(
    model: Llama,
    heads: ReadHeads,
    parts: Sequence[Part],
    chunk_len: int,
    progress: bool,
    path: str | PathLike[str] | None,
    known: DocumentFile | None = None,
    ranks: Ranks | None = None,
) -> Document | None:
    """Read the parts. known: an earlier reading of their beginning. None on a rank without the
    result.
    """
    opening = _opening(model)
    chunks = Chunks.fitting(model.config.context_limit, chunk_len, len(opening))
    chunk_len = chunks.length
    ids = torch.cat([part.ids for part in parts])
    firsts = accumulate((len(part.ids) for part in parts), initial=0)
    starts = [
        first + own for first, part in zip(firsts, parts, strict=False) for own in part.starts
    ]
    given = {
        "token_ids": ids.int(),
        "unit_starts": torch.tensor(starts, device="cpu"),
        "unit_spans": torch.tensor([span for part in parts for span in part.spans], device="cpu"),
        "text": torch.frombuffer(
            bytearray("".join(part.text for part in parts).encode() or b" "), dtype=torch.uint8
        ),
    }
    described = {
        "model": model.fingerprint,
        "checkpoint": _checkpoint_name(model),
        "heads": heads.heads,
        "weights": heads.weights,
        "groups": heads.groups,
        "opening": opening.tolist(),
        "overlap": chunks.overlap,
        "texts": [[p.name, len(p.text), len(p.ids), len(p.starts)] for p in parts],
    }
    if ranks is not None:
        if ranks.rank:
            path = None
        with ranks.agreeing() as facts:
            facts |= {"reading": described, "text": checksum_of("", given), "chunk": chunk_len}
    shape = (len(ids), len(heads.key_heads), model.config.head_dim)
    file = DocumentFile.create(
        described, given, shape, chunk_len, None if path is None else Path(path)
    )
    try:
        if known is not None:
            whole = len(known.tensors["token_ids"]) // chunk_len * chunk_len
            for start in range(0, whole, chunk_len):
                rows = slice(start, start + chunk_len)
                file.put(start, known.tensors["keys"][rows], known.tensors["scales"][rows])
        first = file.first_unread()
        if ranks is not None:
            first = ranks.share(first)
        rank, size = (0, 1) if ranks is None else (ranks.rank, ranks.size)
        begins = range(first // chunk_len * chunk_len, len(ids), chunk_len)
        with tqdm(
            total=len(ids),
            initial=first,
            desc="read",
            unit="token",
            disable=rank > 0 or not progress,
        ) as bar:
            for step in range(0, len(begins), size):
                own = None
                if step + rank < len(begins):
                    begin = begins[step + rank]
                    keys = read_chunk(model, heads, ids, opening, chunks, begin)
                    own = begin, *quantize(keys)
                for one in [own] if ranks is None else ranks.collect(own) or []:
                    if one is not None:
                        file.put(*one)
                        bar.update(len(one[1]))
        file.finish()
    finally:
        file.release()
    if ranks is not None and ranks.everywhere:
        described, tensors = ranks.share((file.described, file.tensors))
        file = DocumentFile(described, tensors, file.path)
    elif rank:
        return None
    return Document(model, heads, file, opening)


def _check_name(name: object) -> None:
    """Raise `ValueError` for what is no name of a text."""
    if name is not None and (not isinstance(name, str) or not name):
        raise ValueError(f"A text is named {name!r}; name it by a text, such as a file's name.")
    check_text(name or "", "a text's name")


def _opening(model: Llama) -> Tensor:
    """What stands before every chunk: what the tokenizer puts before a text, and a few words.

    Attention that finds nothing goes to a prompt's first tokens (Xiao et al. 2024). These must not
    be the text's. One token is not always enough: a single line break is not in SmolLM2.
    """
    said = [] if model.tokenizer is None else plain_ids(model.tokenizer, OPENING)
    return torch.tensor([*beginning(model), *said], dtype=torch.int64, device="cpu")
