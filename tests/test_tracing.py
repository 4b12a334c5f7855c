"""Variable tracking: the chain, its example, and the noise around them."""

import random
import re

import pytest

from homer_triton.evaluation.passkey import FILLER
from homer_triton.evaluation.samples import Sample, match_all
from homer_triton.evaluation.tracing import draw_trace

INSTRUCTION = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
)
STATEMENT = re.compile(r"VAR ([A-Z]+) = (?:VAR )?(\w+)")


def draw(room: int, seed: int) -> Sample:
    return draw_trace(random.Random(seed), room, None, lambda text: len(text.split()))


@pytest.mark.parametrize("seed", range(20))
def test_five_variables_have_the_value_one_from_another(seed):
    sample = draw(800, seed)
    _, example, nothing = sample.instruction.split(INSTRUCTION)
    assert not nothing
    text = sample.context
    value = re.search(r"the value (\d{5}) in the text above", sample.prompt)[1]
    statements = STATEMENT.findall(text)
    names = [name for name, _ in statements]
    assert [source for _, source in statements] == [value, *names[:-1]]
    assert sample.answers == tuple(names)
    assert len(set(names)) == 5
    assert all(len(name) == 5 for name in names)
    for name in names:
        assert len(re.findall(rf"\b{name}\b", sample.context)) == (1 if name == names[-1] else 2)
        assert name not in example
    assert value not in example
    assert sample.depth is None


def test_the_rest_is_noise():
    text = draw(800, 0).context
    without = re.sub(r"VAR [A-Z]+ = \w+( [A-Z]{5})?", "", text)
    lines = [" ".join(line.split()) for line in without.split("\n")]
    assert set(lines) == {" ".join(FILLER)}
    assert len(lines) > 20


def test_statements_stand_anywhere_and_each_before_a_line_of_its_own():
    first, last = [], []
    for seed in range(60):
        lines = draw(800, seed).context.split("\n")
        places = [i for i, line in enumerate(lines) if "VAR" in line]
        assert len(places) == 5
        first.append(places[0] / (len(lines) - 1))
        last.append(places[-1] / (len(lines) - 1))
    assert min(first) == 0
    assert max(last) == 1
    assert max(first) > 0.3
    assert min(last) < 0.7


def test_the_example_is_a_shorter_text_with_its_answer():
    sample = draw(800, 4)
    _, example, _ = sample.instruction.split(INSTRUCTION)
    statements = STATEMENT.findall(example)[:5]
    names = [name for name, _ in statements]
    assert all(len(name) == 3 for name in names)
    value = statements[0][1]
    assert example.endswith(
        f"in the text above. Answer: According to the chain(s) of variable assignment in the text "
        f"above, 5 variables are assigned the value {value}, they are: {' '.join(names)}\n\n"
    )
    assert example.count(FILLER[0]) == 10
    assert sample.reply.endswith("they are:")


def test_an_answer_is_worth_the_share_of_variables_in_it():
    sample = draw(800, 0)
    assert match_all(", ".join(sample.answers).lower(), sample) == 1
    assert match_all(" ".join(sample.answers[:2]), sample) == pytest.approx(0.4)
    assert match_all("VAR", sample) == 0
