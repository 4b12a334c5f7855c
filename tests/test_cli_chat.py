"""`homer chat`: through a pseudo-terminal as people use it, and line by line."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import checkpoint, run, text

import homer_triton as ht
from homer_triton.chat import next_turn
from homer_triton.demo import CHECKPOINT

pytestmark = pytest.mark.filterwarnings("ignore:The model has no retrieval heads")

FILLER = "The grass is green. The sky is blue. " * 30
STORY = FILLER + "The pass key is 71432. Remember it. 71432 is the pass key. " + FILLER
QUESTION = "What is the pass key? The pass key is"
SETTINGS = ("--max-chunk-len", "128", "--dtype", "float32")


@pytest.fixture
def story(tmp_path: Path) -> Path:
    file = tmp_path / "story.txt"
    file.write_text(STORY)
    return file


class Terminal:
    """A `homer chat` behind a pseudo-terminal."""

    def __init__(self, model: Path, *options: object) -> None:
        self._end, inside = pty.openpty()
        words = ("chat", "--model", model, "--device", "cpu", *options)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "homer_triton", *map(str, words)],
            stdin=inside,
            stdout=inside,
            stderr=inside,
            start_new_session=True,
            env={**os.environ, "TERM": "dumb"},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(inside)
        self._heard = ""

    def type(self, line: str) -> None:
        os.write(self._end, line.encode())

    def until(self, pattern: str, seconds: float = 120.0) -> str:
        """What is shown up to a pattern, since the last call."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self._heard)):
            assert time.monotonic() < deadline, self._heard
            if select.select([self._end], [], [], 0.2)[0]:
                try:
                    self._heard += os.read(self._end, 4096).decode().replace("\r", "")
                except OSError:
                    pytest.fail(f"it ended: {self._heard}")
        shown, self._heard = self._heard[: found.end()], self._heard[found.end() :]
        return shown

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._end)


@pytest.fixture
def terminal(story: Path) -> Iterator[Terminal]:
    opened = Terminal(*(CHECKPOINT, *SETTINGS, "--context-file", story, "--max-new-tokens", 7))
    yield opened
    opened.close()


@pytest.mark.process
def test_a_conversation_at_a_terminal(terminal: Terminal, story: Path) -> None:
    begun = terminal.until("> ")
    assert re.search(r"read [\d,]+ tokens \(.* tokens/s\)", begun)
    assert "Ask a question about the text, or type /help." in begun
    terminal.type("/help\n")
    assert "/load FILE" in terminal.until("\n> ")
    terminal.type("/kept\n")
    assert "No question has been asked about a text yet." in terminal.until("\n> ")
    terminal.type(f"{QUESTION}\n")
    assert "71432" in terminal.until("\n> ")
    terminal.type("/kept\n")
    assert "71432" in terminal.until("\n> ")
    terminal.type("/load nowhere.txt\n")
    assert "nowhere.txt" in terminal.until("\n> ")
    terminal.type("/sing\n")
    assert "Unknown command /sing. Type /help for the list." in terminal.until("\n> ")
    terminal.type("The sky\n")
    terminal.until("\n> ")
    terminal.type("/quit\n")
    assert terminal.process.wait(30) == 0


@pytest.mark.process
def test_ctrl_c_ends_an_answer_and_ctrl_d_the_conversation(tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    file.write_text(text(60))
    # Without an end token, the answer is there for long enough.
    folder = checkpoint(tmp_path / "model", eos_token_id=None)
    options = ("--context-file", file, "--max-chunk-len", 64, "--max-new-tokens", 50_000)
    terminal = Terminal(folder, *options)
    try:
        terminal.until("> ")
        terminal.type("w5\n")
        terminal.until("w[0-9]+ w[0-9]+ ")
        os.kill(terminal.process.pid, signal.SIGINT)
        assert "(stopped)" in terminal.until("\n> ")
        terminal.type("/help\n")
        assert "/load FILE" in terminal.until("\n> ")
        time.sleep(2.5)  # an interrupt that nobody caught would come once more
        terminal.type("\x04")
        assert terminal.process.wait(30) == 0
    finally:
        terminal.close()


@pytest.mark.slow
def test_lines_on_standard_input_are_questions(story: Path) -> None:
    words = ("chat", "--model", CHECKPOINT, "--device", "cpu", *SETTINGS)
    options = ("--context-file", story, "--max-new-tokens", 7)
    questions = ("The grass is", QUESTION, "The sky is")
    result = run(*words, *options, stdin="\n\n".join(questions) + "\n/kept\n")
    assert result.exit_code == 0, result.stderr
    answers = result.stdout.splitlines()
    model = ht.load(CHECKPOINT, "cpu", "float32")
    document = ht.read(model, STORY, ht.HomerConfig(max_chunk_len=128))
    turns: list[tuple[str, str]] = []
    for question, said in zip(questions, answers, strict=False):
        expected = document.ask(question, turns, max_new_tokens=7)
        assert said.strip() == expected.text.strip()
        turns.append((question, expected.text))
    assert "71432" in answers[1]
    assert answers[3] == f"For: {questions[-1]}"
    assert answers[4].startswith(f"[{story}, ")


@pytest.mark.slow
def test_a_long_conversation_loses_its_first_turns(story: Path) -> None:
    words = ("chat", "--model", CHECKPOINT, "--device", "cpu", *SETTINGS)
    lines = f"{QUESTION}\n" + "The sky is blue and the grass is green\n" * 6
    result = run(*words, "--context-file", story, "--max-new-tokens", 40, stdin=lines)
    assert result.exit_code == 0, result.stderr
    assert len(result.stdout.splitlines()) >= 7
    assert "forgot the first 1 turns of the conversation" in result.stderr


@pytest.mark.slow
def test_a_document_is_opened(story: Path, tmp_path: Path) -> None:
    words = ("--model", CHECKPOINT, "--device", "cpu", "--dtype", "float32")
    file = tmp_path / "story.homer"
    assert run("read", story, "-o", file, *words).exit_code == 0
    chat = ("chat", *words, "--max-new-tokens", 7)
    result = run(*chat, "--document", file, stdin=f"{QUESTION}\n")
    assert "71432" in result.stdout
    both = run(*chat, "--document", file, "--context-file", story, stdin="x\n")
    assert both.exit_code == 2
    assert "not both" in both.stderr


@pytest.mark.slow
def test_a_long_talk_without_a_text_is_compacted() -> None:
    words = ("chat", "--model", CHECKPOINT, "--device", "cpu", *SETTINGS, "--target-len", 100)
    lines = "The sky is blue and the grass is green\n" * 8
    result = run(*words, "--max-new-tokens", 40, stdin=lines)
    assert result.exit_code == 0, result.stderr
    kept = re.findall(
        r"shortened the conversation: kept ([\d,]+) of ([\d,]+) tokens", result.stderr
    )
    assert kept
    assert all(int(left) <= 128 < int(before) for left, before in kept)


def test_talk_without_a_text_in_a_chat_template(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, chat=True)
    words = ("chat", "--model", folder, "--device", "cpu", "--max-new-tokens", 3)
    result = run(*words, stdin="w5 w6 w7\n")
    # Its template takes a single turn, which is said before a long text is read.
    assert result.exit_code == 2
    assert "The chat template does not repeat the user's text just once" in result.stderr
    result = run(*words, "--no-chat-template", stdin="w5 w6 w7\nw8\n")
    assert result.exit_code == 0, result.stderr
    assert len(result.stdout.splitlines()) == 2


def test_history_stands_between_text_and_question() -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(CHECKPOINT / "tokenizer.json"))
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    opening, suffix = ht.chat_affixes(tokenizer, "Why?", history=[("How?", "So.")])
    messages = [
        {"role": "user", "content": "A text.\nHow?"},
        {"role": "assistant", "content": "So."},
        {"role": "user", "content": "Why?"},
    ]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert opening + "A text." + suffix == whole


def test_turns_are_the_templates_own() -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(CHECKPOINT / "tokenizer.json"), eos_token="</s>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    opening, closing = ht.chat_affixes(tokenizer, "How?")
    messages = [
        {"role": "user", "content": "A text.\nHow?"},
        {"role": "assistant", "content": "So."},
        {"role": "user", "content": "Why?"},
    ]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    said = opening + "A text." + closing + "So.</s>"
    assert said + next_turn(tokenizer, "Why?", ended=True) == whole
    assert said.removesuffix("</s>") + next_turn(tokenizer, "Why?", ended=False) == whole


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--context-file", "-"), "Standard input is for your questions. Give the text as a file."),
        (("--context-file", "absent.txt"), "absent.txt"),
        (("--thinking",), "need a chat template; leave them out"),
        (("--top-k", "5"), "set temperature above 0 too"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path: Path, options: tuple[str, ...], sentence: str) -> None:
    result = run("chat", "--model", checkpoint(tmp_path), "--device", "cpu", *options, stdin="w5\n")
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert result.stdout == ""


def test_a_refused_line_ends_nothing(tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    file.write_text(text(60))
    lines = f"/again w5\n/load\n/load -\n/load {tmp_path}\n/load {file}\nw9 w10\n/quit\nw3\n"
    folder = checkpoint(tmp_path / "model")
    words = ("chat", "--model", folder, "--device", "cpu", "--max-new-tokens", 2)
    result = run(*words, "--max-chunk-len", 64, stdin=lines)
    assert result.exit_code == 0, result.stderr
    assert "Unknown command /again. Type /help for the list." in result.stderr
    assert result.stderr.count("/load needs the name of a file.") == 2
    assert len(result.stdout.splitlines()) == 1
