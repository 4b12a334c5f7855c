"""Needles in given texts: where they stand, what surrounds them, and what is refused."""

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from homer_triton.evaluation.needles import Needle, draw_number, needles_in, split_sentences
from homer_triton.evaluation.samples import Sample, match_all

# Sentences of 4 to 13 words, each with a name of its own.
SENTENCES = [f"S{i} {'went on ' * (1 + i % 5)}to r{i}." for i in range(800)]
LONGEST = 13
TEXTS = [" ".join(SENTENCES[:500]), "\n".join(SENTENCES[500:])]


def count_words(text: str) -> int:
    return len(text.split())


TASK = needles_in(TEXTS, count_words)


def draw(room: int, depth: float | None, seed: int) -> Sample:
    return TASK.draw(random.Random(seed), room, depth, count_words)


def lines_around(sample: Sample) -> tuple[list[str], list[str]]:
    """The sentences before and after the needle."""
    before, needle, after = sample.context.partition("One of the special magic numbers for ")
    assert needle
    rest, end, after = after.partition(f" is: {sample.answer}.")
    assert end
    assert rest in sample.prompt
    return list(split_sentences(before)), list(split_sentences(after))


@given(
    room=st.integers(120, 3500),
    depth=st.one_of(st.none(), st.floats(0, 1)),
    seed=st.integers(0, 2**32),
)
def test_a_stretch_of_the_text_fills_the_room_but_for_a_sentence(room, depth, seed):
    sample = draw(room, depth, seed)
    assert room - LONGEST < sample.size(count_words) <= room
    before, after = lines_around(sample)
    places = [SENTENCES.index(sentence) for sentence in before + after]
    assert all(later == earlier + 1 for earlier, later in pairwise(places))


@given(room=st.integers(200, 3500), depth=st.floats(0, 1), seed=st.integers(0, 2**32))
def test_the_needle_stands_at_its_depth(room, depth, seed):
    sample = draw(room, depth, seed)
    before, after = (count_words(" ".join(lines)) for lines in lines_around(sample))
    assert abs(before - depth * (before + after)) <= LONGEST / 2
    assert sample.depth == depth


def test_a_depth_that_is_not_given_is_drawn():
    depths = [draw(300, None, seed).depth for seed in range(60)]
    assert min(depths) < 0.1
    assert max(depths) > 0.9


def test_the_seed_draws_everything():
    samples = [draw(300, 0.5, seed) for seed in range(20)]
    assert samples == [draw(300, 0.5, seed) for seed in range(20)]
    assert len({sample.answer for sample in samples}) == 20
    assert len({sample.prompt for sample in samples}) == 20
    assert len({sample.context.split()[0] for sample in samples}) > 10


def test_stretches_come_from_all_of_the_text():
    firsts = [SENTENCES.index(next(split_sentences(draw(1000, 1.0, s).context))) for s in range(80)]
    assert min(firsts) < 100
    assert max(firsts) > 600


def test_the_question_is_the_same_for_any_room():
    short, long = draw(200, 0.5, 3), draw(3000, 0.5, 3)
    assert (short.instruction, short.prompt, short.reply, short.answers) == (
        *(long.instruction, long.prompt, long.reply),
        long.answers,
    )


def test_the_words_are_those_of_ruler():
    sample = Needle("old-river", "1234567").ask("text", 0.25)
    assert Needle("old-river", "1234567").sentence == (
        "One of the special magic numbers for old-river is: 1234567."
    )
    assert sample.instruction == (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\n"
    )
    assert sample.prompt + sample.reply == (
        "What is the special magic number for old-river mentioned in the provided text? The "
        "special magic number for old-river mentioned in the provided text is"
    )
    assert match_all(" 1234567, of course.", sample) == 1
    assert match_all(" 123456", sample) == 0


def test_numbers_have_seven_digits():
    random_ = random.Random(0)
    numbers = [draw_number(random_) for _ in range(1000)]
    assert all(len(number) == 7 and number[0] != "0" for number in numbers)
    assert len(set(numbers)) > 990


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("“Stop!” he said.  “Go.” She\nwent.", ["“Stop!” he said.", "“Go.”", "She went."]),
        ("Mr. Ray met Dr. J. Poe. He bowed.", ["Mr. Ray met Dr. J. Poe.", "He bowed."]),
        ("CHAPTER I\n\nIt was late.\n \nSo be it", ["CHAPTER I", "It was late.", "So be it"]),
        ("At 3.15 p.m. it rained... then no more.", ["At 3.15 p.m. it rained... then no more."]),
        ("C'est fini. École!", ["C'est fini.", "École!"]),
        (" \n\n ", []),
    ],
)
def test_sentences_end_where_a_reader_ends_them(text, sentences):
    assert list(split_sentences(text)) == sentences


def test_texts_that_are_too_short_are_refused():
    room = sum(map(count_words, SENTENCES)) + 100
    with pytest.raises(ValueError, match=r"the texts hold 7,200 tokens and 7,\d{3} are needed"):
        draw(room, 0.5, 0)
    assert count_words(draw(room - 100, 0.5, 0).context) > room - 200
    with pytest.raises(ValueError, match="are needed; give more"):
        needles_in(TEXTS[1:], count_words).draw(random.Random(0), 4000, 0.5, count_words)


def test_a_text_without_sentences_is_refused():
    task = needles_in(["so " * 500 + ". " + "Yes. " * 9], count_words)
    with pytest.raises(ValueError, match="a sentence of the texts is longer than half of it"):
        task.draw(random.Random(1), 400, 0.5, count_words)


def test_a_room_too_small_for_the_question_is_refused():
    with pytest.raises(ValueError, match="tokens, and there is room for 40"):
        draw(40, 0.5, 0)


def test_a_depth_outside_the_text_is_refused():
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        draw(300, 1.1, 0)
