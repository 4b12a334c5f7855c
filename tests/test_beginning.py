"""What a text begins with: what the tokenizer puts before it, and nothing else."""

from pathlib import Path

import pytest
import torch
from checkpoints import random_model
from command_line import checkpoint
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaTokenizerFast, PreTrainedTokenizerFast, Qwen2TokenizerFast

import homer_triton as ht
from homer_triton.demo import CHECKPOINT
from homer_triton.text.controls import opening_ids

WORDS = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "text": 4, "b": 5}


def tokenizer_of(template: str | None) -> PreTrainedTokenizerFast:
    """Words, with a template post-processor; it has a beginning-of-sequence token all the same."""
    words = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template is not None:
        words.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def model_with(tokenizer: PreTrainedTokenizerFast | None) -> ht.Llama:
    return ht.from_transformers(random_model(), tokenizer=tokenizer, ops="torch")


@pytest.mark.parametrize(
    ("template", "before"),
    [
        (None, []),
        ("$A", []),
        ("<s> $A", [1]),
        ("<s> $A </s>", [1]),
        ("$A </s>", []),
        ("<s> </s> $A", [1, 2]),
    ],
)
def test_it_is_what_the_tokenizer_puts_before_a_text(
    template: str | None, before: list[int]
) -> None:
    model = model_with(tokenizer_of(template))
    encoded = ht.encode(model, "a text b a text", suffix="b")
    assert encoded.token_ids.tolist() == [*before, 3, 4, 5, 3, 4, 5]


def byte_pairs(kind: type[PreTrainedTokenizerFast], **settings: bool) -> PreTrainedTokenizerFast:
    letters = {x: i for i, x in enumerate(["<unk>", "<s>", "</s>", *"\u2581\u0120atex"])}
    return kind(vocab=letters, merges=[], unk_token="<unk>", bos_token="<s>", **settings)


@pytest.mark.parametrize(
    ("kind", "settings", "adds"),
    [
        (LlamaTokenizerFast, {"add_bos_token": True}, True),
        (LlamaTokenizerFast, {"add_bos_token": False}, False),
        (LlamaTokenizerFast, {"add_bos_token": True, "add_eos_token": True}, True),
        (Qwen2TokenizerFast, {}, False),
    ],
    ids=["llama", "llama-without", "llama-and-end", "qwen2"],
)
def test_transformers_own_classes(
    kind: type[PreTrainedTokenizerFast], settings: dict[str, bool], adds: bool
) -> None:
    tokenizer = byte_pairs(kind, **settings)
    assert opening_ids(tokenizer) == ([tokenizer.bos_token_id] if adds else [])


def test_without_a_tokenizer_the_config_says_it() -> None:
    model = model_with(None)
    encoded = ht.encode(model, [5, 6, 7], suffix=[8])
    assert encoded.token_ids.tolist() == [model.config.bos_token_id, 5, 6, 7, 8]


def test_a_prefix_on_the_command_line_begins_with_it(tmp_path: Path) -> None:
    from homer_triton.cli.inputs import compose

    adding = ht.load(checkpoint(tmp_path), "cpu").tokenizer
    for tokenizer, before in ((adding, "<s>Read."), (tokenizer_of(None), "Read.")):
        parts = compose(tokenizer, "Read.", None, [], chat=False, ask_later=False)
        assert parts.prefix == before


def test_the_shipped_model_reads_what_its_tokenizer_makes_of_a_text() -> None:
    model = ht.load(CHECKPOINT, "cpu", ops="torch")
    encoded = ht.encode(model, "The grass is green.", suffix=" The sky is")
    assert model.tokenizer is not None
    whole = model.tokenizer("The grass is green. The sky is").input_ids
    assert torch.equal(encoded.token_ids, torch.tensor(whole))
