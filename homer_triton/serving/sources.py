"""From what a client sends to what the engine takes: token ids, and where an encoding is kept."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from hashlib import blake2b
from threading import Lock

import torch
from torch import Tensor

from ..chat import asks_whether_to_think
from ..checks import check_text
from ..config import HomerConfig
from ..context import EncodedContext
from ..model.llama import Llama
from ..storage.tensor_file import checksum_of
from ..text.controls import Affix, words
from ..text.pieces import piece_texts
from ..text.tokens import beginning, split_input, tokenize
from .conversation import Layout, Message
from .jobs import Reading
from .memory import Memory
from .store import Store


@dataclass(frozen=True)
class Source:
    """What a request goes on from.

    start: an encoding, or the text to make one of; prompt: token ids [n] to append to it; document:
    the id of the text that it is of, if it is one's; key: what its encoding is known by there.
    """

    start: EncodedContext | Reading
    prompt: Tensor
    document: str | None = None
    key: str | None = None

    @property
    def tokens(self) -> int:
        """How many tokens the client's text has, the document included."""
        if isinstance(self.start, EncodedContext):
            return len(self.start.token_ids) + len(self.prompt)
        parts = self.start.prefix, self.start.context, self.start.suffix, self.prompt
        return sum(map(len, parts))


class Sources:
    """Lays requests out for a model. All of this may take a while, and any thread may do it.

    config: how texts are read that outgrow the model's limit; templated, thinking: as `Layout`
    takes them.
    """

    def __init__(
        self,
        model: Llama,
        config: HomerConfig,
        templated: bool,
        thinking: bool | None,
        store: Store,
        memory: Memory,
    ) -> None:
        # A tokenizer has states: the engine's thread has the model's own to itself.
        self._model = Llama(model.config, model.weights, model.ops, deepcopy(model.tokenizer))
        assert self._model.tokenizer is not None
        self._config, self._store, self._memory = config, store, memory
        self._speller, self._spelling = deepcopy(model.tokenizer), Lock()
        self._layout = Layout(self._model.tokenizer, templated, thinking)
        self._chunk_len = config.chunk_len(model.config)
        bias = None if config.calibration is None else {"bias": config.calibration.bias}
        settings = repr(replace(config, calibration=None)), str(model.dtype), templated, thinking
        self._settings = repr((settings, bias and checksum_of("", bias)))

    def check(self) -> None:
        """Raise `ValueError` for a chat template that does not take a conversation."""
        self._layout.about_text([Message(role, "x") for role in ("user", "assistant", "user")])

    def new_document(self, document: str, text: str, suffix: str | None) -> Source:
        """A document that is read for no question, or for what the suffix says."""
        prefix = self._layout.bare()
        key = self._own_key(document, suffix)
        after = None if suffix is None else "\n" + words(suffix)
        return Source(self._reading(prefix, text, after), _ids([]), key=key)

    def chat(
        self,
        messages: Sequence[Message],
        new: int,
        document: str | None = None,
        reuse: bool = False,
        thinking: bool | None = None,
    ) -> Source:
        """A conversation, about a document or about nothing.

        new: the most tokens of the answer; reuse: ask what the document was read to in the
        beginning, and not what it is read to for the first question; thinking: as `Layout` takes
        it. Raises `ValueError` for what cannot be laid out, and as `Store.text` does.
        """
        for message in messages:
            check_text(message.text, "A message")
        # As elsewhere, what a template does not ask for has no effect.
        layout = self._layout
        if thinking is not None and layout.templated and asks_whether_to_think(layout.tokenizer):
            layout = replace(layout, thinking=thinking)
        if document is None:
            return self._conversation(layout, messages, new)
        if reuse:
            return self._own(document, layout.after_text(messages))
        prefix, suffix, since = layout.about_text(messages)
        return self._about(document, prefix, suffix, since)

    def completion(
        self,
        prompt: str | Sequence[int],
        new: int,
        document: str | None = None,
        reuse: bool = False,
        special_tokens: bool = False,
    ) -> Source:
        """A text to go on with, or a question about a document, without a chat template.

        Raises as `chat` does.
        """
        if document is None:
            ids = tokenize(self._model, prompt, "prompt", special_tokens)
            if isinstance(prompt, str):
                ids = torch.cat([_ids(beginning(self._model)), ids])
            return Source(self._plain(ids, new) or self._merged(ids), _ids([]))
        if not isinstance(prompt, str):
            raise ValueError("A document is asked in text, not in token ids.")
        check_text(prompt, "prompt")
        asked = "\n" + (Affix(prompt) if special_tokens else words(prompt))
        if reuse:
            return self._own(document, asked)
        return self._about(document, Affix(""), asked, Affix(""))

    def find(self, document: str, key: str) -> EncodedContext | None:
        """A document's encoding, on whatever device, if it was made before. Raises as `Store.load`
        does.
        """
        encoded = self._memory.get(key)
        if encoded is not None:
            self._store.touch(document, key)
            return encoded
        return self._store.load(document, key)

    def spell(self, token_ids: Sequence[int] | Tensor, text: str = "") -> list[str]:
        """Each token's text, as `piece_texts` gives it; text: what they read as together, with the
        space in front that a tokenizer of Llama 2's kind drops.
        """
        assert self._speller is not None
        with self._spelling:
            spelt = piece_texts(self._speller, torch.as_tensor(token_ids))
        if spelt and text.startswith(" ") and not spelt[0].startswith(" "):
            spelt[0] = f" {spelt[0]}"
        return spelt

    def _conversation(self, layout: Layout, messages: Sequence[Message], new: int) -> Source:
        """A conversation about nothing: as it is, if it fits the model's limit."""
        head, middle, last = layout.cut(messages)
        ids = torch.cat([self._first(layout, ""), self._read(head + middle + last)])
        plain = self._plain(ids, new)
        if plain is not None:
            return Source(plain, _ids([]))
        # Instructions stay as they are, unless they are a text themselves; the last question says
        # what is kept of all the rest, and its end does where it is that which is long.
        most = self._chunk_len // 4
        prefix, asked = self._first(layout, head), self._read(last)
        rest = [self._read(middle)]
        if len(prefix) > most:
            rest, prefix = [prefix, *rest], _ids([])
        if len(asked) > most:
            asking = len(self._read(last[len(messages[-1].text) :]))
            asking = min(asking + min(100, self._chunk_len // 8), len(asked) - 1)
            rest, asked = [*rest, asked[:-asking]], asked[-asking:]
        return Source(Reading(prefix, torch.cat(rest), asked, self._config, False), _ids([]))

    def _plain(self, ids: Tensor, new: int) -> Reading | None:
        """A prompt as the model reads it whole; None where it and its answer outgrow the limit."""
        if len(ids) < 2:
            raise ValueError("The prompt is a single token at most; say more.")
        if len(ids) + new > self._model.config.context_limit:
            return None
        whole = HomerConfig(max_chunk_len=len(ids), target_len=len(ids))
        is_short = len(ids) <= self._chunk_len
        return Reading(_ids([]), ids[:-1], ids[-1:], whole, is_short)

    def _merged(self, ids: Tensor) -> Reading:
        """A long prompt, of which is kept what its end attends to."""
        start = len(beginning(self._model))
        prefix, rest = ids[:start], ids[start:]
        parts = split_input(self._model, rest, prefix, None, self._chunk_len)
        return Reading(*parts, self._config, False)

    def _own(self, document: str, prompt: Affix) -> Source:
        """A question to what was kept of a document when it came."""
        suffix = self._store.get(document).suffix
        key = self._own_key(document, suffix)
        found = self.find(document, key)
        start = found or self.new_document(document, self._store.text(document), suffix).start
        return Source(start, self._read(prompt), document, key)

    def _about(self, document: str, prefix: Affix, suffix: Affix, since: Affix) -> Source:
        """A conversation about a document, which is read for its first question."""
        key = self._key(document, prefix, suffix)
        start = self.find(document, key) or self._reading(
            prefix, self._store.text(document), suffix
        )
        return Source(start, self._read(since), document, key)

    def _reading(self, prefix: Affix, text: str, suffix: Affix | None) -> Reading:
        before = self._first(self._layout, prefix)
        parts = split_input(self._model, text, before, suffix, self._chunk_len)
        is_short = sum(map(len, parts)) <= self._chunk_len
        return Reading(*parts, self._config, is_short)

    def _first(self, layout: Layout, prefix: str) -> Tensor:
        """What a text begins with: the template brings the beginning of sequence along itself."""
        start = [] if layout.templated else beginning(self._model)
        return torch.cat([_ids(start), self._read(prefix)])

    def _read(self, text: str) -> Tensor:
        return tokenize(self._model, text, "The text", special_tokens=True)

    def _own_key(self, document: str, suffix: str | None) -> str:
        after = None if suffix is None else "\n" + words(suffix)
        return self._key(document, self._layout.bare(), after)

    def _key(self, document: str, prefix: Affix, suffix: Affix | None) -> str:
        """What an encoding is known by: the text, what stands around it, and how it is read."""
        around = [(str(x), x.words) for x in (prefix, suffix) if x is not None]
        facts = repr((document, around, suffix is None, self._settings))
        return blake2b(facts.encode(), digest_size=12).hexdigest()


def _ids(ids: Sequence[int]) -> Tensor:
    return torch.tensor(ids, dtype=torch.int64)
