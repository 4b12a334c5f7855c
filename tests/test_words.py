"""Words to look for: enough of them, and each of its shape."""

import random
import re

from homer_triton.evaluation import words


def test_pairs_are_of_different_common_words() -> None:
    lists = (words._ADJECTIVES, words._NOUNS)
    assert all(len(set(one)) == len(one) for one in lists)
    assert len(lists[0]) * len(lists[1]) >= 30_000
    draw = random.Random(0)
    assert all(re.fullmatch("[a-z]+-[a-z]+", words.draw_pair(draw)) for _ in range(200))


def test_made_up_words_are_many_and_of_one_shape() -> None:
    draw = random.Random(0)
    drawn = {words.draw_made_up(draw) for _ in range(20_000)}
    assert all(re.fullmatch("(?:[b-df-hj-np-tv-z][aeiou]){3}", word) for word in drawn)
    assert len(drawn) > 18_500


def test_coded_words_are_random_letters() -> None:
    draw = random.Random(0)
    drawn = {words.draw_coded(draw) for _ in range(2000)}
    assert all(re.fullmatch("[a-z]{6}", word) for word in drawn)
    assert len(drawn) > 1990
    assert len({letter for word in drawn for letter in word}) == 26
