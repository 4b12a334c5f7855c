"""How conversations are laid out as texts, with a chat template and without."""

import pytest
from transformers import PreTrainedTokenizerFast

import homer_triton as ht
from homer_triton.chat import next_turn
from homer_triton.demo import CHECKPOINT
from homer_triton.serving.conversation import Layout, Message

TEMPLATE = (
    "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
SYSTEM, FIRST = Message("system", "Be brief."), Message("user", "How?")
REPLY, SECOND = Message("assistant", "So."), Message("user", "Why?")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(
        tokenizer_file=str(CHECKPOINT / "tokenizer.json"), eos_token="</s>"
    )
    made.chat_template = TEMPLATE
    return made


@pytest.mark.parametrize(
    ("templated", "messages", "cut"),
    [
        (False, [FIRST], ("", "", "How?")),
        (False, [FIRST, REPLY, SECOND], ("", "How?So.\n", "Why?\n")),
        (False, [SYSTEM, FIRST], ("Be brief.\n", "", "How?")),
        (True, [FIRST], ("<s>[user]", "", "How?[end][assistant]")),
        (
            True,
            [SYSTEM, FIRST, REPLY, SECOND],
            (
                "<s>[system]Be brief.[end][user]",
                "How?[end][assistant]So.[end][user]",
                "Why?[end][assistant]",
            ),
        ),
    ],
)
def test_a_conversation_is_cut_before_its_turns_and_its_last_question(
    tokenizer: PreTrainedTokenizerFast,
    templated: bool,
    messages: list[Message],
    cut: tuple[str, str, str],
) -> None:
    assert Layout(tokenizer, templated).cut(messages) == cut
    if templated:
        told = [{"role": one.role, "content": one.text} for one in messages]
        whole = tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=True)
        assert "".join(cut) == whole


@pytest.mark.parametrize("templated", [False, True])
def test_a_text_is_talked_about_as_in_homer_chat(
    tokenizer: PreTrainedTokenizerFast, templated: bool
) -> None:
    layout = Layout(tokenizer, templated)
    prefix, suffix, since = layout.about_text([FIRST, REPLY, SECOND])
    assert layout.about_text([FIRST]) == (prefix, suffix, "")
    if templated:
        assert (prefix, suffix) == ht.chat_affixes(tokenizer, "How?")
        assert since == "So." + next_turn(tokenizer, "Why?", ended=False)
    else:
        assert (prefix, suffix, since) == ("", "\nHow?", "So.\nWhy?\n")
    # What clients say is words, and what the template says is not.
    assert [suffix[slice(*span)] for span in suffix.words] == ["How?"]
    assert [since[slice(*span)] for span in since.words] == ["So.", "Why?"]


def test_instructions_stand_before_the_text_or_the_question(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    layout = Layout(tokenizer, True)
    prefix, suffix, _ = layout.about_text([SYSTEM, FIRST])
    assert prefix == "<s>[system]Be brief.[end][user]"
    assert suffix == "\nHow?[end][assistant]"
    assert layout.bare() == "<s>[user]"
    # A text that was read before has none before it.
    asked = layout.after_text([SYSTEM, FIRST, REPLY, SECOND])
    assert asked == "\nBe brief.\nHow?[end][assistant]So.[end][user]Why?[end][assistant]"
    assert layout.after_text([FIRST]) == suffix


def test_a_template_that_takes_no_instructions_is_named(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + TEMPLATE
    )
    with pytest.raises(ValueError, match=r"fails on these turns \(system, user\) \(no system"):
        Layout(tokenizer, True).about_text([SYSTEM, FIRST])
    tokenizer.chat_template = TEMPLATE
