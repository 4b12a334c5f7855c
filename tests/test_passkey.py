import pytest
from hypothesis import given
from hypothesis import strategies as st

from homer_triton.evaluation.passkey import FILLER, QUESTION, find_answer, make_sample


def count_words(text: str) -> int:
    return len(text.split())


def count_characters(text: str) -> int:
    return len(text)


SHORTEST = {count_words: 21, count_characters: 95}


@given(
    count_tokens=st.sampled_from([count_words, count_characters]),
    extra=st.integers(0, 3000),
    depth=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_a_sample_fills_its_length_less_one_sentence_at_most(count_tokens, extra, depth, seed):
    length = SHORTEST[count_tokens] + extra
    sample = make_sample(length, depth, seed, count_tokens)
    size = count_tokens(sample.context) + count_tokens(sample.prompt)
    longest_sentence = max(count_tokens(f" {sentence}") for sentence in FILLER)
    assert length - longest_sentence < size <= length


@given(seed=st.integers(0, 2**32), depth=st.floats(0, 1))
def test_the_key_stands_at_its_depth_and_nowhere_else(seed, depth):
    sample = make_sample(2000, depth, seed, count_words)
    before, sentences, after = sample.context.partition(
        f"The pass key is {sample.answer}. Remember it. {sample.answer} is the pass key."
    )
    assert sentences
    assert len(sample.answer) == 5
    assert not any(character.isdigit() for character in before + after)
    filler = count_words(before) + count_words(after)
    assert count_words(before) / filler == pytest.approx(depth, abs=0.005)
    assert sample.prompt == QUESTION
    assert sample.depth == depth


def test_the_seed_draws_the_key_and_the_first_sentence():
    samples = [make_sample(200, 1.0, seed, count_words) for seed in range(20)]
    assert samples == [make_sample(200, 1.0, seed, count_words) for seed in range(20)]
    assert len({sample.answer for sample in samples}) == 20
    assert len({sample.context.partition(".")[0] for sample in samples}) == len(FILLER)


@pytest.mark.parametrize("depth", [-0.01, 1.01, float("nan")])
def test_a_depth_outside_the_text_is_refused(depth):
    with pytest.raises(ValueError, match=f"depth is {depth}"):
        make_sample(200, depth, 0, count_words)


def test_a_length_without_room_for_the_key_is_refused():
    with pytest.raises(ValueError, match=r"length is 20; .* take 21 tokens"):
        make_sample(20, 0.5, 0, count_words)


@pytest.mark.parametrize(
    ("generated", "answer"),
    [
        ("71432.", "71432"),
        (" is 71432. 71432 is", "71432"),
        ("7 1 4 3 2. Remember", "71432"),
        ("71432 5", "71432"),
        ("7 1  2", "71"),
        ("key7", "7"),
        ("12 34", "12"),
        ("The grass is green.", None),
        ("", None),
    ],
)
def test_the_first_run_of_digits_is_the_answer(generated, answer):
    assert find_answer(generated) == answer
