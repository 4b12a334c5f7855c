"""Words to look for: enough of them, and each of its shape."""

import random
import re

import pytest

from homer_triton.evaluation import words


def test_pairs_are_of_different_common_words() -> None:
    lists = (words._ADJECTIVES, words._NOUNS)
    assert all(len(set(one)) == len(one) for one in lists)
    assert len(lists[0]) * len(lists[1]) >= 30_000
    draw = random.Random(0)
    assert all(re.fullmatch("[a-z]+-[a-z]+", words.draw_pair(draw)) for _ in range(200))


@pytest.mark.parametrize("syllables", [2, 3])
def test_made_up_words_are_of_one_shape(syllables: int) -> None:
    draw = random.Random(0)
    drawn = {words.draw_made_up(draw, syllables) for _ in range(2000)}
    shape = f"(?:[b-df-hj-np-tv-z][aeiou]){{{syllables}}}"
    assert all(re.fullmatch(shape, word) for word in drawn)
    assert len(drawn) > 1600


def test_there_are_more_words_than_asked_for() -> None:
    assert [words.syllables_for(n) for n in (74, 75, 5624, 5625, 421_875)] == [1, 2, 2, 3, 4]
    draw = random.Random(0)
    assert len({words.draw_made_up(draw, 1) for _ in range(2000)}) == 75


def test_coded_words_are_random_letters() -> None:
    draw = random.Random(0)
    drawn = {words.draw_coded(draw) for _ in range(2000)}
    assert all(re.fullmatch("[a-z]{6}", word) for word in drawn)
    assert len(drawn) > 1990
    assert len({letter for word in drawn for letter in word}) == 26
