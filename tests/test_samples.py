"""How texts are made to fill a length, and what an answer is worth."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from homer_triton.evaluation.samples import Sample, fill, match_all


def count_words(text: str) -> int:
    return len(text.split())


@given(
    entry=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    shortest=st.integers(0, 20),
    extra=st.integers(0, 5000),
    most=st.one_of(st.none(), st.integers(0, 200)),
)
def test_as_many_entries_as_fit(entry, shortest, extra, most):
    tried = []

    def build(entries: int) -> Sample:
        tried.append(entries)
        words = sum(entry[i % len(entry)] for i in range(entries)) + shortest
        return Sample("w " * words, "Where?", ("a",))

    room = shortest + 1 + extra
    sample = fill(build, room, count_words, most=most)
    entries = tried[-1]
    assert sample == build(entries)
    assert sample.size(count_words) <= room
    assert entries == most or build(entries + 1).size(count_words) > room
    assert most is None or max(tried[:-1]) <= most


def test_filling_a_long_text_takes_few_tries():
    draw = random.Random(0)
    sizes = [draw.randint(5, 15) for _ in range(60_000)]
    tries = []

    def build(entries: int) -> Sample:
        tries.append(entries)
        return Sample("w " * sum(sizes[:entries]), "", ("a",))

    fill(build, 100_000, count_words)
    assert len(tries) < 15


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="takes 4 tokens, and there is room for 3"):
        fill(lambda entries: Sample("w " * entries, "Where?", ("a",)), 3, count_words, least=3)


def test_all_that_is_read_counts():
    sample = Sample("a b c", "d e?", ("x",), instruction="f", reply=" g h i j")
    assert sample.affix_size(count_words) == 1 + 6
    assert sample.size(count_words) == 3 + 1 + 6


@pytest.mark.parametrize(
    ("generated", "share"),
    [
        ("They are ABC, DEF and GHI.", 1),
        ("abc xdefx ghi", 1),
        ("GHI GHI ABC", pytest.approx(2 / 3)),
        ("AB C", 0),
        ("", 0),
    ],
)
def test_the_share_of_answers_that_are_found(generated, share):
    assert match_all(generated, Sample("", "", ("ABC", "DEF", "GHI"))) == share
