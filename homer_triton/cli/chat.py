"""`homer chat`: a conversation about a text, at the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer

from .answers import Answers
from .groups import with_groups
from .help import TEXT
from .inputs import compose, read_text, takes_template
from .interrupts import caught
from .options import Checkpoint, DocumentSettings, NoChatTemplate, Thinking
from .output import at_terminal, note, note_read, quoted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .. import Document, EncodedContext, HomerConfig, Llama, Source
    from ..decoding import Decoding

HELP = """\
/load FILE  load another text and start a new conversation about it
/kept       show which places of the text were read for the last question
/help       show this help
/quit       quit (Ctrl-D does too)"""


@with_groups
def chat(
    *,
    checkpoint: Checkpoint,
    context_file: Annotated[
        str | None,
        typer.Option("--context-file", metavar="FILE", help="The long text, a UTF-8 file."),
    ] = None,
    document: Annotated[
        Path | None,
        typer.Option(
            "--document",
            metavar="FILE",
            rich_help_panel=TEXT,
            help="A document that `homer read` wrote with this model, instead of --context-file.",
        ),
    ] = None,
    no_chat_template: NoChatTemplate = False,
    thinking: Thinking = None,
    wanted: Answers,
    reading: DocumentSettings,
) -> None:
    """Talk about a long text in the terminal.

    The text may be many times longer than the model's context limit. It is read once. Each of your
    questions then finds its own places in it, whatever you asked before. /kept shows them. /help
    shows all such commands. Without a text, you talk with the model alone.

    Ctrl-C stops an answer. If a conversation outgrows the model's context limit, it loses its first
    turns. If standard input is not a terminal, each of its lines is a question.

    \b
    Example:
      homer chat --model HuggingFaceTB/SmolLM2-1.7B-Instruct \\
          --context-file book.txt
    """
    from .. import Document

    if context_file == "-":
        raise ValueError("Standard input is for your questions. Give the text as a file.")
    if None not in (context_file, document):
        raise ValueError("Give --context-file or --document, not both.")
    decoding, config = wanted.decoding, reading.config
    text = None if context_file is None else read_text(context_file)
    llama, tokenizer = checkpoint.open()
    talk = Conversation(llama, tokenizer, config, decoding, not no_chat_template, thinking)
    if document is not None:
        talk.document = Document.load(document, llama)
    elif text is not None:
        talk.load(str(context_file), text)
    if at_terminal():
        note(
            "Type a message, or /help. /load FILE loads a text to talk about."
            if talk.document is None
            else "Ask a question about the text, or type /help."
        )
    for line in _lines():
        try:
            if not talk.hear(line):
                break
        except (ValueError, FileNotFoundError, OSError) as error:
            note(f"homer: {' '.join(str(error).split())}")
        except KeyboardInterrupt:
            caught()
            note("(stopped)")


def _lines() -> Iterator[str]:
    """The lines that are typed, or piped to standard input, without the empty ones."""
    with suppress(ImportError):
        import readline  # noqa: F401  (arrow keys, where the system has it)
    sign = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(sign).strip()
        except EOFError:
            return
        except UnicodeDecodeError:
            note("homer: This line is not UTF-8. Type it again.")
            continue
        if line:
            yield line


@dataclass
class Conversation:
    """A conversation, about a document or with the model alone.

    turns: the questions about the document and their answers; sources: the places that were read
    for the last one, best first; context: the conversation without a document; ended: whether its
    last answer has its end token.
    """

    model: Llama
    tokenizer: PreTrainedTokenizerBase
    config: HomerConfig
    decoding: Decoding
    templated: bool
    thinking: bool | None = None
    document: Document | None = field(default=None, init=False)
    turns: list[tuple[str, str]] = field(default_factory=list, init=False)
    sources: tuple[Source, ...] = field(default=(), init=False)
    context: EncodedContext | None = field(default=None, init=False)
    ended: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        """Raises `ValueError` for a chat template that cannot hold a conversation."""
        self.templated = takes_template(self.tokenizer, self.templated, self.thinking)
        if self.templated:
            self._follow("x")

    def load(self, name: str, text: str) -> None:
        """Read a text, and begin a new conversation about it."""
        from .. import read

        start = perf_counter()
        document = read(self.model, {name: text}, self.config, progress=at_terminal())
        note_read(len(document), perf_counter() - start)
        self.document, self.turns, self.sources, self.context = document, [], (), None

    def hear(self, line: str) -> bool:
        """Run the command in a line, or answer the line. Returns whether the conversation goes on.

        Raises `ValueError` and `FileNotFoundError` if that is not possible; the conversation is
        then as it was.
        """
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if command == "/quit":
            return False
        if command == "/help":
            print(HELP)
        elif command == "/kept":
            print(self._kept())
        elif command == "/load":
            if rest in ("", "-"):  # questions come from standard input
                raise ValueError("/load needs the name of a file.")
            self.load(rest, read_text(rest))
        elif command.startswith("/"):
            raise ValueError(f"Unknown command {command}. Type /help for the list.")
        elif self.document is not None:
            self._ask(self.document, line)
        else:
            self._talk(line)
        return True

    def _ask(self, document: Document, question: str) -> None:
        """Answer a question about the document. Only a complete answer is remembered."""
        turns = self._fitting(document, question)
        say = partial(print, end="", flush=True)
        try:
            answer = document.ask(
                question,
                turns,
                self.config,
                on_text=say,
                chat_template=self.templated,
                thinking=self.thinking,
                **asdict(self.decoding),
            )
        finally:
            print()
        self.turns, self.sources = [*turns, (question, answer.text)], answer.sources

    def _fitting(self, document: Document, question: str) -> list[tuple[str, str]]:
        """The last turns that leave room for what is read again and for the answer."""
        from ..document import TEXT_LEN

        turns, limit = self.turns, self.model.config.context_limit
        new = self.decoding.max_new_tokens
        while turns:
            affixes = document.affixes(question, turns, self.templated, self.thinking)
            room = document.room(sum(map(len, affixes)), self.config, new)
            if room >= min(TEXT_LEN, self.config.target_len or limit, limit) // 4:
                break
            turns = turns[1:]
        if len(turns) < len(self.turns):
            note(f"forgot the first {len(self.turns) - len(turns)} turns of the conversation")
        return turns

    def _kept(self) -> str:
        """The places that were read for the last question. Raises `ValueError` without one."""
        if self.document is None or not self.turns:
            raise ValueError("No question has been asked about a text yet. Ask one first.")
        texts = {text.name: text.content for text in self.document.texts}
        lines = [f"For: {self.turns[-1][0]}"]
        for source in self.sources:
            place = texts[source.name][source.start : source.end]
            lines.append(quoted(source.name, source.start, place))
        return "\n".join(lines)

    def _talk(self, line: str) -> None:
        """Answer a message without a text. Only a complete answer is remembered."""
        from .. import encode, generate

        prompt: str | None = None
        if self.context is None:
            parts = compose(
                self.tokenizer, None, None, [], self.templated, False, thinking=self.thinking
            )
            context = encode(self.model, line, parts.prefix, parts.suffix, self.config)
        else:
            prompt = self._follow(line)
            context = self._with_room(self.context, prompt)
        settings = {**asdict(self.decoding), "grow": True}
        say = partial(print, end="", flush=True)
        try:
            answer = generate(self.model, context, prompt, on_text=say, **settings)
        finally:
            print()
        self.context = answer.encoded
        self.ended = answer.token_ids[-1] in self.model.end_tokens

    def _follow(self, question: str) -> str:
        """The text that another message adds to the conversation."""
        from ..chat import next_turn
        from ..text.controls import words

        if self.templated:
            return next_turn(self.tokenizer, question, self.ended, self.thinking)
        return "\n" + words(question) + "\n"

    def _with_room(self, context: EncodedContext, prompt: str) -> EncodedContext:
        """The conversation, compacted if prompt and answer would not fit the context limit."""
        from .. import compact
        from ..text.tokens import tokenize

        new = len(tokenize(self.model, prompt, "question", special_tokens=True))
        limit = self.model.config.context_limit
        if context.next_position + new + self.decoding.max_new_tokens <= limit:
            return context
        shorter = compact(self.model, context, self.config)
        note(f"shortened the conversation: kept {len(shorter):,} of {len(context):,} tokens")
        return shorter
