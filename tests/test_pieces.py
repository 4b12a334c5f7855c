"""Which characters each token stands for: whole ones, and all of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from text_tokenizers import TOKENIZERS, byte_fallback, byte_level
from transformers import PreTrainedTokenizerBase

from homer_triton.demo.tokenizer import build_tokenizer
from homer_triton.text.pieces import locate, piece_texts

BROKEN = "\N{REPLACEMENT CHARACTER}"


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_pieces_join_to_the_text() -> None:
    tokenizer = build_tokenizer(64)
    ids = ids_of(tokenizer, "The grass is green. Here we go.")
    texts = piece_texts(tokenizer, torch.tensor(ids))
    assert texts == ["The", " grass", " is", " green", ".", " Here", " we", " go", "."]


def test_the_first_token_of_a_character_has_it() -> None:
    tokenizer = byte_level()
    ids = ids_of(tokenizer, "né 🙂!")
    assert piece_texts(tokenizer, torch.tensor(ids)) == [
        *("n", "é", "", " ", "🙂", "", "", "", "!"),
    ]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_characters_over_chained_tokens_stay_whole(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    text = "漢字の城" * 3 + BROKEN * 2
    assert "".join(piece_texts(tokenizer, torch.tensor(ids_of(tokenizer, text)))) == text


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), min_size=1))
def test_every_character_has_its_tokens(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = ids_of(tokenizer, text)
    found, spans = locate(tokenizer, ids)
    assert found == text
    assert len(spans) == len(ids)
    covered = sorted({place for start, stop in spans for place in range(start, stop)})
    assert covered == list(range(len(text)))


def test_spans_are_the_characters_that_a_token_has_a_part_of() -> None:
    tokenizer = byte_fallback()
    text, spans = locate(tokenizer, ids_of(tokenizer, "the é the"))
    assert [text[start:stop] for start, stop in spans] == ["the", " ", "é", "é", " the"]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_text_that_goes_on_is_cut_at_a_whole_character(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = ids_of(tokenizer, "the 🙂 the")
    whole = [locate(tokenizer, ids[:cut], ids[cut:])[0] for cut in range(1, len(ids))]
    assert whole == sorted(whole, key=len)
    assert all("the 🙂 the".startswith(text) for text in whole)
    assert sum(text == "the 🙂" for text in whole) == 4


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_that_no_text_has_are_broken_where_they_are_cut_only(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = ids_of(tokenizer, "the 漢字 é the 🙂")[:-1]
    text, spans = locate(tokenizer, ids)
    assert text.rstrip(BROKEN) == "the 漢字 é the "
    assert text[-1] == BROKEN
    assert len(spans) == len(ids)


def test_the_source_gives_what_a_tokenizer_forgets() -> None:
    tokenizer = build_tokenizer(64)
    source = "The pass key:\n\n  71432, and  unicorns.\n"
    ids = ids_of(tokenizer, source)
    assert "\n" not in locate(tokenizer, ids)[0]
    text, spans = locate(tokenizer, ids, source=source)
    assert text == source
    assert text[slice(*spans[4])] == "\n\n  7"
    assert locate(tokenizer, ids[:4], ids[4:], source)[0] == "The pass key:"


def test_another_source_is_refused() -> None:
    tokenizer = build_tokenizer(64)
    with pytest.raises(ValueError, match="source is not the text"):
        locate(tokenizer, ids_of(tokenizer, "The grass."), source="The sky.")


def test_nothing_is_nothing() -> None:
    for tokenizer in TOKENIZERS.values():
        assert locate(tokenizer, []) == ("", [])
