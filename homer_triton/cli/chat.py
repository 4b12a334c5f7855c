"""`homer chat`: a conversation with a text, at the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from .answers import Answers
from .groups import with_groups
from .inputs import compose, note_long_chunks, read_text, takes_template
from .interrupts import caught
from .options import Checkpoint, NoChatTemplate, OptionalContextFile, Thinking
from .output import at_terminal, note, note_kept
from .reading import read
from .settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .. import EncodedContext, HomerConfig, Llama
    from ..decoding import Decoding

HELP = """\
/load FILE       talk about another text, from the beginning
/again QUESTION  read the text once more, for this question; the conversation begins anew
/kept            what survived of the text, for the question that it was read for
/help            this
/quit            leave, as the end of input does"""


@with_groups
def chat(
    *,
    checkpoint: Checkpoint,
    context_file: OptionalContextFile = None,
    no_chat_template: NoChatTemplate = False,
    thinking: Thinking = None,
    wanted: Answers,
    settings: Settings,
) -> None:
    """Talk with a text that may be many times longer than the model's context limit.

    The text is read for the first question, which decides what is kept of it; later ones are asked
    of what was kept and of what was said, and /again reads the text once more. When a conversation
    outgrows the model's limit, its older turns are compacted as the text was. Ctrl-C ends an
    answer. A text on standard input is read line by line, as questions.

    Example: homer chat --model meta-llama/Llama-3.2-1B-Instruct --context-file book.txt
    """
    config, decoding = settings.config, wanted.decoding
    if context_file == "-":
        raise ValueError("Standard input is for your questions; give the text as a file.")
    text = None if context_file is None else read_text(context_file)
    llama, tokenizer = checkpoint.open()
    note_long_chunks(config, llama.config)
    talk = Conversation(
        llama, tokenizer, config, decoding, not no_chat_template, thinking, text=text
    )
    if at_terminal():
        note("Ask about the text. /help says what else there is.")
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
    """What is typed, or stands on standard input; Ctrl-C between two lines is as anywhere."""
    with suppress(ImportError):
        import readline  # noqa: F401  (arrow keys, where the system has it)
    sign = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(sign).strip()
        except EOFError:
            return
        except UnicodeDecodeError:
            note("homer: That is not UTF-8; type it again.")
            continue
        if line:
            yield line


@dataclass
class Conversation:
    """A text, and what has been said about it.

    text: None for talk about nothing; read: the text's encoding, as it was read for a question;
    context: the same with all turns since.
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
        """Raises `ValueError` for a chat template that does not take a conversation."""
        self.templated = takes_template(self.tokenizer, self.templated, self.thinking)
        if self.templated:
            self._follow("x")

    def hear(self, line: str) -> bool:
        """Do what a line says, or answer it; returns whether to go on. Raises `ValueError` and
        `FileNotFoundError` for what cannot be done, and leaves all as it was.
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
            note(f"{len(self.text):,} characters; ask about them.")
        elif command == "/again":
            if self.text is None or not rest:
                raise ValueError("/again needs a question, and a text that was loaded.")
            self._begin(rest)
        elif command.startswith("/"):
            raise ValueError(f"{command} is not known; /help says what is.")
        elif self.context is None:
            self._begin(line)
        else:
            prompt = self._follow(line)
            self._answer(self._with_room(self.context, prompt), prompt, self.read)
        return True

    def _begin(self, question: str) -> None:
        """Read the text for a question, or the question alone, and answer it."""
        about = question if self.text is None else self.text
        asked = [] if self.text is None else [question]
        parts = compose(
            self.tokenizer, None, None, asked, self.templated, False, thinking=self.thinking
        )
        encoded = read(self.model, about, parts, self.config)
        assert encoded is not None  # there are no ranks
        if self.text is None:
            self._answer(encoded, None, None)
            return
        note_kept(encoded)
        self._answer(encoded, None, encoded)

    def _follow(self, question: str) -> str:
        """What another question adds to the conversation."""
        from ..chat import next_turn
        from ..text.controls import words

        if self.templated:
            return next_turn(self.tokenizer, question, self.ended, self.thinking)
        return "\n" + words(question) + "\n"

    def _with_room(self, context: EncodedContext, prompt: str) -> EncodedContext:
        """The conversation, compacted where prompt and answer would outgrow the model's limit."""
        from .. import compact
        from ..text.tokens import tokenize

        new = len(tokenize(self.model, prompt, "question", special_tokens=True))
        limit = self.model.config.context_limit
        if context.next_position + new + self.decoding.max_new_tokens <= limit:
            return context
        shorter = compact(self.model, context, self.config)
        note(f"compacted the conversation: kept {len(shorter):,} of {len(context):,} rows")
        return shorter

    def _answer(
        self, context: EncodedContext, prompt: str | None, read: EncodedContext | None
    ) -> None:
        """Print an answer as it comes; only a whole one becomes part of the conversation."""
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
        """The text that survived. Raises `ValueError` before there is any."""
        if self.read is None:
            raise ValueError("No text has been read yet; ask about one first.")
        return self.read.text(self.tokenizer, source=self.text)
