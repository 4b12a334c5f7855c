"""What a chat template puts around a context and a question."""

from pathlib import Path

import pytest
from command_line import CHAT_TEMPLATE, checkpoint, run, text
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import homer_triton as ht


@pytest.fixture
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("chat")
    return AutoTokenizer.from_pretrained(checkpoint(folder, chat=True))


def test_together_they_are_the_templates_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    prefix, suffix = ht.chat_affixes(tokenizer, "w5?")
    turn = tokenizer.apply_chat_template(
        [{"role": "user", "content": "w3 w4\nw5?"}], tokenize=False, add_generation_prompt=True
    )
    assert prefix + "w3 w4" + suffix == turn
    assert prefix.startswith("<s>")


def test_without_a_question_nothing_is_added(tokenizer: PreTrainedTokenizerBase) -> None:
    assert ht.chat_affixes(tokenizer) == ("<s>w10 ", " w11 w12")


# As Qwen3's does: a thought that is empty stands before the answer.
THINKING = (
    CHAT_TEMPLATE
    + "{% if enable_thinking is defined and enable_thinking is false %} w13{% endif %}"
)


def test_a_template_that_asks_is_told_whether_to_think(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = THINKING
    endings = {switch: ht.chat_affixes(tokenizer, thinking=switch)[1] for switch in (None, True)}
    assert set(endings.values()) == {" w11 w12"}
    assert ht.chat_affixes(tokenizer, "w5?", thinking=False)[1] == "\nw5? w11 w12 w13"
    tokenizer.chat_template = CHAT_TEMPLATE
    with pytest.raises(ValueError, match="does not ask whether to think"):
        ht.chat_affixes(tokenizer, thinking=False)


def test_thinking_is_an_option(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, chat=True)
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    file = tmp_path / "context.txt"
    file.write_text(text(40))
    words = (
        "encode",
        "--model",
        folder,
        "--context-file",
        file,
        "--prompt",
        "w5",
        "--device",
        "cpu",
    )
    for switch, template, rows in (("--no-thinking", THINKING, 46), ("--thinking", THINKING, 45)):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        output = tmp_path / f"{switch}.safetensors"
        result = run(*words, switch, "-o", output, "--max-chunk-len", 64, "--target-len", 64)
        assert result.exit_code == 0, result.stderr
        assert len(ht.EncodedContext.load(output)) == rows
    result = run(*words, "--thinking", "--no-chat-template", "-o", tmp_path / "x")
    assert result.exit_code == 2
    assert "--thinking and --no-thinking need a chat template" in result.stderr


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('system turn needed') }}", "fails on a user turn .system turn needed"),
        ("{{ 1 // 0 }}", "fails on a user turn"),
        ("{{ messages[0].content.nothing() }}", "fails on a user turn"),
        ("{% for %}", "fails on a user turn"),
        ("{% for x in range(10 ** 9) %}a{% endfor %}", "fails on a user turn"),
        ("w10", "does not repeat the user's text just once"),
        (CHAT_TEMPLATE + CHAT_TEMPLATE, "does not repeat the user's text just once"),
    ],
)
def test_a_template_that_takes_no_user_turn_is_refused(
    tokenizer: PreTrainedTokenizerBase, template: str | None, sentence: str
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=sentence):
        ht.chat_affixes(tokenizer, "w5?")
