"""RULER's tasks: what every sample holds, and how much of its length it fills."""

import random
import re
import uuid
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homer_triton.evaluation.ruler import TASKS, choose_tasks
from homer_triton.evaluation.samples import Sample

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = re.compile(r"One of the special magic (number|uuid)s for (\S+) is: (\S+)\.")


def count_words(text: str) -> int:
    return len(text.split())


def count_pieces(text: str) -> int:
    """Like a tokenizer: words in pieces of four letters, and every other character alone."""
    return len(re.findall(r"[A-Za-z]{1,4}|\d|[^\sA-Za-z\d]", text))


# The most that one entry takes, in words and in pieces.
ENTRY = {
    "niah_single_1": (19, 30),
    "niah_multikey_2": (10, 30),
    "niah_multikey_3": (10, 90),
    "vt": (19, 30),
    "cwe": (6, 30),
    "fwe": (8, 24),  # a word of noise is three dots
}


def draw(name: str, room: int, seed: int, depth: float | None = None, count=count_words) -> Sample:
    return TASKS[name].draw(random.Random(seed), room, depth, count)


@pytest.mark.parametrize("name", TASKS)
@settings(deadline=None, max_examples=40)
@given(
    room=st.integers(1200, 6000),
    seed=st.integers(0, 2**32),
    in_pieces=st.booleans(),
)
def test_a_sample_fills_its_room_but_for_an_entry(name, room, seed, in_pieces):
    count = count_pieces if in_pieces else count_words
    # The full lists of common words take more room than this in pieces.
    room += 3000 if name == "cwe" and in_pieces and room > 3500 else 0
    sample = draw(name, room, seed, count=count)
    assert room - ENTRY[name][in_pieces] < sample.size(count) <= room


@pytest.mark.parametrize("name", TASKS)
def test_the_seed_draws_everything(name):
    samples = [draw(name, 1500, seed) for seed in range(8)]
    assert samples == [draw(name, 1500, seed) for seed in range(8)]
    assert len({sample.answers for sample in samples}) == 8
    assert len({sample.context for sample in samples}) == 8


@pytest.mark.parametrize("name", TASKS)
def test_the_question_is_the_same_for_any_room(name):
    short, long = draw(name, 1100, 3), draw(name, 3000, 3)
    for part in ("instruction", "prompt", "reply", "answers"):
        assert getattr(short, part) == getattr(long, part)


@pytest.mark.parametrize(
    ("name", "new_tokens", "asked"),
    [
        ("niah_single_1", 128, r"What is the special magic number for (\w+-\w+) mentioned in the "),
        ("niah_multikey_2", 128, r"What is the special magic number for (\w+-\w+) mentioned in "),
        ("niah_multikey_3", 128, r"What is the special magic uuid for ([0-9a-f-]{36}) mentioned "),
    ],
)
def test_one_needle_holds_what_is_asked_for(name, new_tokens, asked):
    assert TASKS[name].new_tokens == new_tokens
    for seed in range(20):
        sample = draw(name, 1500, seed)
        (key,) = re.match(asked, sample.prompt).groups()
        needles = NEEDLE.findall(sample.context)
        assert [value for _, other, value in needles if other == key] == [sample.answer]
        assert sample.context.count(sample.answer) == 1
        assert f"for {key} mentioned" in sample.reply
        kind = "uuid" if name == "niah_multikey_3" else "number"
        assert {noun for noun, _, _ in needles} == {kind}
        assert sample.instruction.startswith(f"A special magic {kind} is hidden")


def test_the_haystacks_are_noise_and_other_needles():
    lines = draw("niah_single_1", 1500, 0).context.split("\n")
    assert Counter(lines)[NOISE] == len(lines) - 1
    for name in ("niah_multikey_2", "niah_multikey_3"):
        lines = draw(name, 1500, 0).context.split("\n")
        assert all(NEEDLE.fullmatch(line) for line in lines)
        values = [NEEDLE.fullmatch(line)[3] for line in lines]
        assert len(set(values)) == len(values) > 100


def test_uuids_are_those_of_version_four():
    for line in draw("niah_multikey_3", 1500, 0).context.split("\n"):
        _, key, value = NEEDLE.fullmatch(line).groups()
        assert uuid.UUID(key).version == uuid.UUID(value).version == 4


@pytest.mark.parametrize("name", ["niah_single_1", "niah_multikey_2", "niah_multikey_3"])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_needle_stands_at_its_depth(name, depth):
    sample = draw(name, 3000, 1, depth)
    before, _, after = sample.context.partition(f"is: {sample.answer}.")
    share = before.count("\n") / (before.count("\n") + after.count("\n"))
    assert share == pytest.approx(depth, abs=0.01)
    assert sample.depth == depth


def test_a_depth_that_is_not_given_is_drawn():
    depths = [draw("niah_single_1", 600, seed).depth for seed in range(60)]
    assert min(depths) < 0.1
    assert max(depths) > 0.9


def test_tasks_are_chosen_by_name():
    assert [task.name for task in choose_tasks(("vt", "cwe"))] == ["vt", "cwe"]


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("vt", "qa"), "'qa' is not known; choose from niah_single_1, "),
        (("vt", "vt"), "'vt' is named twice"),
        ((), "--tasks is empty"),
    ],
)
def test_other_names_are_refused(names, reason):
    with pytest.raises(ValueError, match=reason):
        choose_tasks(names)


@pytest.mark.parametrize("name", TASKS)
def test_a_room_too_small_is_refused(name):
    with pytest.raises(ValueError, match="and there is room for 30"):
        draw(name, 30, 0)
