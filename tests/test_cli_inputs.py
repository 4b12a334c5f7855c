"""From options to the library's arguments: the layout of an input, texts, RoPE parameters."""

from pathlib import Path

import pytest
from command_line import CHAT_TEMPLATE, checkpoint
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from homer_triton.cli.inputs import Parts, compose, parse_rope_scaling, read_text


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("chat")
    return AutoTokenizer.from_pretrained(checkpoint(folder, chat=True))


def test_bare_text_leaves_the_defaults_to_encode(tokenizer: PreTrainedTokenizerBase) -> None:
    parts = compose(tokenizer, None, None, [], chat=False, ask_later=False)
    assert parts == Parts(None, None, (None,))


def test_one_prompt_ends_the_suffix(tokenizer: PreTrainedTokenizerBase) -> None:
    parts = compose(tokenizer, "w3", "w4", ["w5?"], chat=False, ask_later=False)
    assert parts == Parts("<s>w3", "w4\nw5?", (None,))


def test_several_prompts_are_appended(tokenizer: PreTrainedTokenizerBase) -> None:
    parts = compose(tokenizer, None, None, ["w5?", "w6?"], chat=False, ask_later=True)
    assert parts == Parts(None, None, ("\nw5?", "\nw6?"))


def test_chat_template_goes_around_it_all(tokenizer: PreTrainedTokenizerBase) -> None:
    parts = compose(tokenizer, "w3 ", "w4", ["w5?"], chat=True, ask_later=False)
    assert parts == Parts("<s>w10 w3 ", "w4\nw5? w11 w12", (None,))


def test_chat_template_without_a_prompt_closes_the_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    parts = compose(tokenizer, None, None, [], chat=True, ask_later=False)
    assert parts == Parts("<s>w10 ", " w11 w12", (None,))


def test_chat_template_leaves_the_turn_open_for_later(tokenizer: PreTrainedTokenizerBase) -> None:
    asked = compose(tokenizer, None, None, ["w5?"], chat=True, ask_later=True)
    assert asked == Parts("<s>w10 ", None, ("\nw5? w11 w12",))
    silent = compose(tokenizer, None, None, [], chat=True, ask_later=True)
    assert silent == Parts("<s>w10 ", None, (None,))


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('system turn needed') }}",
        "w10",
        CHAT_TEMPLATE + CHAT_TEMPLATE,
    ],
)
def test_chat_template_that_takes_no_user_turn(
    tokenizer: PreTrainedTokenizerBase, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(ValueError, match="use --no-chat-template"):
        compose(tokenizer, None, None, ["w5?"], chat=True, ask_later=False)
    compose(tokenizer, None, None, ["w5?"], chat=False, ask_later=False)


def test_read_text_drops_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "bom.txt"
    file.write_bytes("\ufeffnaïve".encode())
    assert read_text(str(file)) == "naïve"


def test_parse_rope_scaling() -> None:
    assert parse_rope_scaling(None) is None
    assert parse_rope_scaling('{"rope_type": "linear", "factor": 2}') == {
        "rope_type": "linear",
        "factor": 2,
    }
