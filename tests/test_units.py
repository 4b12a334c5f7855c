"""Where a text is cut into units, and what they cover."""

from time import process_time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homer_triton.demo import CHECKPOINT
from homer_triton.loading import load_tokenizer
from homer_triton.text.controls import Span
from homer_triton.text.excerpts import Unit, gap_of, join
from homer_triton.text.units import LONGEST, cut_units


def by_character(text: str) -> list[Span]:
    """Each character as a token, with the white space before it."""
    spans, reached = [], 0
    for place, character in enumerate(text):
        if not character.isspace() or place == len(text) - 1:
            spans.append((reached, place + 1))
            reached = place + 1
    return spans


def units(text: str) -> list[str]:
    return [text[slice(*span)] for span in cut_units(text, by_character(text))[1]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It rained. She left! Did he know?", ["It rained.", "She left!", "Did he know?"]),
        ("It was Mr. Darcy. J. Smith came.", ["It was Mr. Darcy.", "J. Smith came."]),
        ("One.\n\nHeading\n\nTwo is here.", ["One.", "Heading", "Two is here."]),
        ("他去了北京。她留在上海的家里了！你呢，怎么样了？", None),
        ("id,name\n1,first one\n2,second one\n", ["id,name", "1,first one", "2,second one"]),
        ("if x:\n    return 1\n", ["if x:", "return 1"]),
        ("", []),
        (" \n ", [""]),
        ("3.14 is pi. 2.72 is not.", ["3.14 is pi.", "2.72 is not."]),
    ],
)
def test_sentences_lines_and_records(text: str, expected: list[str] | None) -> None:
    if expected is None:
        assert len(units(text)) == 3
    else:
        assert units(text) == expected


def test_wrapped_lines_of_prose_are_not_cut() -> None:
    text = (
        "It is a truth universally acknowledged, that a single man in possession\n"
        "of a good fortune, must be in want of a wife. However little known the\n"
        "feelings or views of such a man may be on his first entering a\n"
        "neighbourhood, this truth is so well fixed."
    )
    assert [unit.count("\n") for unit in units(text)] == [1, 2]


def test_lines_of_a_log_are_units_though_they_are_wide() -> None:
    lines = [f"2024-01-01 12:00:0{i} INFO the server has answered request {i}." for i in range(5)]
    assert units("\n".join(lines)) == lines


def test_a_long_unit_is_cut_between_words() -> None:
    text = "word " * 200
    starts, spans = cut_units(text, by_character(text))
    stops = [*starts[1:], len(by_character(text))]
    assert max(b - a for a, b in zip(starts, stops, strict=True)) <= LONGEST
    assert {word for span in spans for word in text[slice(*span)].split()} == {"word"}


@settings(max_examples=50)
@given(st.text(alphabet="ab A.!?\n,;。1", max_size=300))
def test_units_cover_every_token_once(text: str) -> None:
    spans = by_character(text)
    starts, characters = cut_units(text, spans)
    assert starts == sorted(set(starts))
    assert (starts[:1] == [0]) == bool(spans)
    assert len(starts) == len(characters)
    covered = "".join(text[slice(*span)] for span in characters)
    assert "".join(covered.split()) == "".join(text.split())


def test_excerpts_know_the_unit_of_each_token() -> None:
    tokenizer = load_tokenizer(CHECKPOINT)
    assert tokenizer is not None
    texts = ["The sky is blue. The grass is green. The sun is yellow.", "Here we go."]
    spans = [(0, 16), (17, 36), (37, 55)]
    chosen = [Unit(0, 0, spans[0]), Unit(0, 2, spans[2]), Unit(1, 3, (0, 11))]
    excerpt = join(tokenizer, texts, chosen)
    gap = gap_of(tokenizer)
    text = tokenizer.decode(excerpt.ids)
    expected = f"The sky is blue.{gap}The sun is yellow.{gap}Here we go."
    assert "".join(text.split()) == "".join(expected.split())
    assert tokenizer.unk_token_id not in excerpt.ids
    for number, said in ((0, "The sky is blue."), (2, "The sun is yellow."), (3, "Here we go.")):
        assert tokenizer.decode(excerpt.ids[excerpt.units == number]).strip() == said
    together = join(tokenizer, texts, [Unit(0, 0, spans[0]), Unit(0, 1, spans[1])])
    assert tokenizer.decode(together.ids).strip() == texts[0][:36]


@pytest.mark.parametrize(
    "text", ["ab\n" * 40_000, "." * 40_000 + " a", '!"' * 40_000, "a " * 80_000]
)
def test_any_text_is_cut_in_time_linear_in_its_length(text: str) -> None:
    begin = process_time()
    cut_units(text, by_character(text))
    assert process_time() - begin < 6
