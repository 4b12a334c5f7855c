"""`homer chat`: a conversation about a text, at the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from .answers import Answers
from .groups import with_groups
from .inputs import compose, note_long_chunks, read_text, takes_template
from .interrupts import caught
from .options import Checkpoint, NoChatTemplate, Thinking
from .output import at_terminal, note, note_kept
from .reading import read
from .settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .. import EncodedContext, HomerConfig, Llama
    from ..decoding import Decoding

HELP = """\
/load FILE       load another text and start a new conversation about it
/again QUESTION  read the text again for this question and start a new conversation
/kept            show which parts of the text were kept for the question it was read for
/help            show this help
/quit            quit (Ctrl-D does too)"""


@with_groups
def chat(
    *,
    checkpoint: Checkpoint,
    context_file: Annotated[
        str | None,
        typer.Option("--context-file", metavar="FILE", help="The long text, a UTF-8 file."),
    ] = None,
    no_chat_template: NoChatTemplate = False,
    thinking: Thinking = None,
    wanted: Answers,
    settings: Settings,
) -> None:
    """Talk about a long text in the terminal.

    The text may be many times longer than the model's context limit. It is read for your first
    question, and the tokens that matter for this question are kept. Later questions find only what
    was kept and what was said since. To read the text again for a new question, type
    /again QUESTION. /help shows all such commands. Without --context-file, you talk with the model
    alone.

    If a conversation outgrows the model's context limit, it is shortened in the same way: its last
    tokens decide which of the older ones stay. Ctrl-C stops an answer. If standard input is not a
    terminal, each of its lines is a question.

    \b
    Example:
      homer chat --model HuggingFaceTB/SmolLM2-1.7B-Instruct \\
          --context-file book.txt
    """
    config, decoding = settings.config, wanted.decoding
    if context_file == "-":
        raise ValueError("Standard input is for your questions. Give the text as a file.")
    text = None if context_file is None else read_text(context_file)
    llama, tokenizer = checkpoint.open()
    note_long_chunks(config, llama.config)
    talk = Conversation(
        llama, tokenizer, config, decoding, not no_chat_template, thinking, text=text
    )
    if at_terminal():
        note(
            "Ask a question about the text, or type /help."
            if text is not None
            else "Type a message, or /help. /load FILE loads a text to talk about."
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
    """A text, and the conversation about it.

    text: None without a text; read: the text's encoding, read for the first question; context: the
    same with all turns since then; ended: whether the last answer has its end token.
    """

    model: Llama
    tokenizer: PreTrainedTokenizerBase
    config: HomerConfig
    decoding: Decoding
    templated: bool
    thinking: bool | None = None
    text: str | None = None
    read: EncodedContext | None = field(default=None, init=False)
    context: EncodedContext | None = field(default=None, init=False)
    ended: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        """Raises `ValueError` for a chat template that cannot hold a conversation."""
        self.templated = takes_template(self.tokenizer, self.templated, self.thinking)
        if self.templated:
            self._follow("x")

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
            self.text, self.read, self.context = read_text(rest), None, None
            note(f"Loaded {len(self.text):,} characters. Ask a question about the text.")
        elif command == "/again":
            if self.text is None or not rest:
                raise ValueError("/again needs a question, and a loaded text.")
            self._begin(rest)
        elif command.startswith("/"):
            raise ValueError(f"Unknown command {command}. Type /help for the list.")
        elif self.context is None:
            self._begin(line)
        else:
            prompt = self._follow(line)
            self._answer(self._with_room(self.context, prompt), prompt, self.read)
        return True

    def _begin(self, question: str) -> None:
        """Read the text for a question, or without a text the question alone, and answer it."""
        about = question if self.text is None else self.text
        asked = [] if self.text is None else [question]
        parts = compose(
            self.tokenizer, None, None, asked, self.templated, False, thinking=self.thinking
        )
        encoded = read(self.model, about, parts, self.config)
        assert encoded is not None  # None only occurs with several ranks
        if self.text is None:
            self._answer(encoded, None, None)
            return
        note_kept(encoded)
        self._answer(encoded, None, encoded)

    def _follow(self, question: str) -> str:
        """The text that another question adds to the conversation."""
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

    def _answer(
        self, context: EncodedContext, prompt: str | None, read: EncodedContext | None
    ) -> None:
        """Stream an answer to stdout. Only a complete one becomes part of the conversation."""
        from .. import generate

        settings = {**asdict(self.decoding), "grow": True}
        say = partial(print, end="", flush=True)
        try:
            answer = generate(self.model, context, prompt, on_text=say, **settings)
        finally:
            print()
        ends = self.model.config.eos_token_ids
        self.context, self.read = answer.encoded, read
        self.ended = answer.token_ids[-1] in ends

    def _kept(self) -> str:
        """The kept parts of the text. Raises `ValueError` if no text has been read."""
        if self.read is None:
            raise ValueError("No text has been read yet. Ask a question about one first.")
        return self.read.text(self.tokenizer, source=self.text)
