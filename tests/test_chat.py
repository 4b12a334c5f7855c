"""What a chat template puts around a context and a question."""

import pytest
from command_line import CHAT_TEMPLATE, checkpoint
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
