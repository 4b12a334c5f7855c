"""Common and frequent words: how often each of them stands in its text."""

import math
import random
import re
from collections import Counter

import pytest

from homer_triton.evaluation.aggregation import draw_common_words, draw_frequent_words
from homer_triton.evaluation.samples import Sample, match_all

INSTRUCTION = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)


def count_words(text: str) -> int:
    return len(text.split())


def common(room: int, seed: int) -> Sample:
    return draw_common_words(random.Random(seed), room, None, count_words)


def frequent(room: int, seed: int) -> Sample:
    return draw_frequent_words(random.Random(seed), room, None, count_words)


def entries(numbered: str) -> list[str]:
    found = re.findall(r"(\d+)\. (\w+)", numbered)
    assert [int(number) for number, _ in found] == list(range(1, len(found) + 1))
    return [word for _, word in found]


@pytest.mark.parametrize(
    ("room", "counts", "example_counts"),
    [(700, (6, 1), (3, 1, 10)), (3583, (6, 1), (3, 1, 10)), (3584, (30, 3), (10, 3, 30))],
)
@pytest.mark.parametrize("seed", range(5))
def test_ten_words_are_common_and_the_others_are_not(room, counts, example_counts, seed):
    sample = common(room, seed)
    _, example, nothing = sample.instruction.split(INSTRUCTION)
    assert not nothing
    words = Counter(entries(sample.context))
    assert {word for word, times in words.items() if times == counts[0]} == set(sample.answers)
    assert len(set(sample.answers)) == 10
    assert set(words.values()) == set(counts)
    shown, answer = example.split(f"\n{sample.prompt}{sample.reply} ")
    theirs = Counter(entries(shown))
    often, seldom, others = example_counts
    assert {word for word, times in theirs.items() if times == often} == set(entries(answer))
    assert Counter(theirs.values()) == {often: 10, seldom: others}
    assert not theirs.keys() & words.keys()


def test_the_list_is_shuffled():
    sample = common(3584, 0)
    words = entries(sample.context)
    places = [i / len(words) for i, word in enumerate(words) if word in sample.answers]
    assert sum(places) / len(places) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(("room", "letters"), [(3584, 4), (8000, 6)])
def test_no_word_stands_in_another(room, letters):
    sample = common(room, 0)
    words = entries(sample.context)
    assert {len(word) for word in words} == {letters}


def test_common_words_are_scored_one_by_one():
    sample = common(700, 1)
    numbered = " ".join(f"{i}. {word}" for i, word in enumerate(sample.answers, 1))
    assert match_all(numbered, sample) == 1
    assert match_all(" ".join(sample.answers[3:]), sample) == pytest.approx(0.7)


@pytest.mark.parametrize("room", [130, 900, 6000])
@pytest.mark.parametrize("seed", range(5))
def test_coded_words_are_as_frequent_as_zeta_says(room, seed):
    sample = frequent(room, seed)
    words = Counter(sample.context.split())
    ranked = words.most_common()
    assert ranked[0][0] == "..."
    assert {word for word, _ in ranked[1:4]} == set(sample.answers)
    assert tuple(sorted(sample.answers, key=words.__getitem__, reverse=True)) == sample.answers
    assert words[sample.answers[2]] > ranked[4][1]
    total = room - count_words(sample.instruction + sample.prompt + sample.reply)
    share = 6 / math.pi**2
    for rank, (_, times) in enumerate(ranked[:6], 1):
        # What rounding down leaves out makes the whole a little longer.
        assert times == pytest.approx(total * share / rank**2, rel=0.15, abs=1)
    assert all(re.fullmatch("[a-z]{6}", word) for word in words if word != "...")


def test_frequent_words_are_shuffled():
    sample = frequent(3000, 0)
    places = [i for i, word in enumerate(sample.context.split()) if word == sample.answers[0]]
    assert sum(places) / len(places) == pytest.approx(1500, abs=200)


def test_frequent_words_are_scored_one_by_one():
    sample = frequent(900, 1)
    assert match_all(" ".join(sample.answers), sample) == 1
    assert match_all(f"... {sample.answers[0]}", sample) == pytest.approx(1 / 3)
