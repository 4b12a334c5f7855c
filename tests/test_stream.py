"""Tokens as text, piece by piece."""

import pytest
from text_tokenizers import TOKENIZERS
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from homer_triton.demo import CHECKPOINT, TEXT_CHECKPOINT
from homer_triton.text.stream import TextStream, plain_end, text_behind

TEXT = "the king told the story … 漢字の城 of the castle.\n\nthe king's story, 71432 times. " * 8


def pieces_of(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """What comes after each token, and in the end."""
    heard: list[str] = []
    pieces: list[str] = []
    stream = TextStream(tokenizer, heard.append)
    for step in (*(lambda i=i: stream.put(i) for i in ids), stream.end):
        step()
        pieces.append("".join(heard))
        heard.clear()
    return pieces


@pytest.mark.parametrize("name", [*TOKENIZERS, "demo", "text"])
def test_pieces_are_the_text_as_early_as_can_be(name: str) -> None:
    folders = {"demo": CHECKPOINT, "text": TEXT_CHECKPOINT}
    tokenizer = (
        AutoTokenizer.from_pretrained(folders[name]) if name in folders else TOKENIZERS[name]
    )
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert len(ids) > 160
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert not any("�" in piece for piece in pieces)
    assert pieces[-1] == ""
    for count in (1, 5, 70, 150):
        whole = tokenizer.decode(ids[:count], skip_special_tokens=True)
        assert "".join(pieces[:count]) == whole.rstrip("�")


def test_a_character_that_never_becomes_whole_is_told_in_the_end() -> None:
    tokenizer = TOKENIZERS["byte level"]
    ids = tokenizer("the 漢", add_special_tokens=False)["input_ids"][:-1]
    *early, last = pieces_of(tokenizer, ids)
    assert "".join(early) == "the "
    assert last.startswith("�")


def test_a_tokenizer_that_tidies_up_tells_whole_words() -> None:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    tokenizer.clean_up_tokenization_spaces = True
    ids = tokenizer("The sky is blue . The sun", add_special_tokens=False)["input_ids"]
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert pieces[0] == ""


@pytest.mark.parametrize("name", TOKENIZERS)
def test_text_goes_on_behind_other_text(name: str) -> None:
    """The space between them is there, whatever a tokenizer does with a text's first one."""
    tokenizer = TOKENIZERS[name]
    ids = tokenizer("the king told the story of the castle", add_special_tokens=False)["input_ids"]
    for count in range(1, len(ids)):
        first = tokenizer.decode(ids[:count])
        expected = tokenizer.decode(ids)[len(first) :]
        before = plain_end(tokenizer, ids[:count])
        assert text_behind(tokenizer, before, ids[count:]) == expected
        heard: list[str] = []
        stream = TextStream(tokenizer, heard.append, before)
        for token in ids[count:]:
            stream.put(token)
        stream.end()
        assert "".join(heard) == expected


def test_a_special_token_begins_a_text_anew() -> None:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    (special, *_), plain = tokenizer.all_special_ids, tokenizer("the sky")["input_ids"]
    assert plain_end(tokenizer, [*plain, special]) == []
    assert plain_end(tokenizer, [special, 90, 91]) == [90, 91]
