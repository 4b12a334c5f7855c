"""How a question finds units: the votes against their definition, and what is chosen by them."""

import math

import pytest
import torch
from checkpoints import random_model
from torch import Tensor

import homer_triton as ht
from homer_triton.engine import finding
from homer_triton.engine.finding import Finder
from homer_triton.engine.reading import Chunks, ReadHeads, quantize, read_chunk

STARTS = torch.tensor([0, 4, 8, 12, 16])
IDS = torch.tensor([5, 6, 7, 8, 9, 6, 7, 10, 20, 21, 22, 23, 30, 31, 32, 33, 40, 41, 42, 43])


class Told(Finder):
    """A finder that is told the attention of each asking token to each unit."""

    told: list[Tensor]

    def _attention(self, prefix: Tensor, suffix: Tensor, asking: Tensor) -> Tensor:
        attention = self.told.pop(0) if self.told else torch.zeros(len(asking), len(STARTS))
        return attention[: len(asking)].expand(len(asking), -1)


def finder(*told: Tensor, ids: Tensor = IDS, firsts: tuple[int, ...] = (0,)) -> Told:
    model = ht.from_transformers(random_model(), ops="torch")
    stored = {"token_ids": ids.int(), "unit_starts": STARTS}
    own = Told(model, ReadHeads(((0, 0),), (1.0,), 2), stored, 50, firsts)
    own.told = list(told)
    return own


NONE = torch.tensor([], dtype=torch.int64)


def test_votes_are_attention_by_rarity_and_words() -> None:
    attention = torch.tensor([[0.1, 0.4, 0.0, 0.0, 0.2], [0.0, 0.3, 0.1, 0.0, 0.0]])
    votes, attended = finder(attention).votes(NONE, torch.tensor([6, 99]))
    rarity = math.log1p(5 / 3)  # two of five units have the token 6
    expected = (rarity * attention[0] + attention[1]) / 2
    torch.testing.assert_close(attended, expected)
    word = torch.zeros(5)
    word[:2] = rarity * finding.WORD_VOTE / 2  # all units are of equal length
    torch.testing.assert_close(votes, expected + word)


def test_what_stands_before_a_question_does_not_vote() -> None:
    attention = torch.tensor([[0.1, 0.4, 0.0, 0.0, 0.2]])
    alone, _ = finder(attention).votes(NONE, torch.tensor([6]))
    behind, _ = finder(attention).votes(NONE, torch.tensor([20, 21, 22, 6]), last=1)
    torch.testing.assert_close(behind, alone)
    assert finder(attention).votes(NONE, torch.tensor([20, 21, 22, 6]))[0][2] > alone[2]


def test_units_with_enough_attention_are_found_best_last() -> None:
    attention = torch.tensor([[0.5, 0.0, 0.0, 0.0, 1.0]])
    found = finder(attention).find(NONE, torch.tensor([99]), most=8)
    assert found.groups == [[0], [4]]
    assert finder(attention).find(NONE, torch.tensor([99]), most=7).groups == [[4]]
    weak = torch.tensor([[0.4, 0.0, 0.0, 0.0, 1.0]])
    assert finder(weak).find(NONE, torch.tensor([99]), most=4).groups == [[4]]


def test_the_best_unit_is_found_even_if_it_is_too_long() -> None:
    attention = torch.tensor([[0.0, 0.0, 1.0, 0.0, 0.0]])
    assert finder(attention).find(NONE, torch.tensor([99]), most=1).groups == [[2]]


def test_units_around_come_along_within_a_text_and_unless_they_are_alike() -> None:
    attention = torch.tensor([[0.0, 0.0, 1.0, 0.0, 0.0]])
    question = torch.tensor([99])
    assert finder(attention).find(NONE, question, most=20).groups == [[1, 2, 3]]
    assert finder(attention, firsts=(0, 2)).find(NONE, question, most=20).groups == [[2, 3]]
    alike = IDS.clone()
    alike[4:8] = alike[8:12]
    assert finder(attention, ids=alike).find(NONE, question, most=20).groups == [[2, 3]]
    first = torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0]])
    # Half of the next unit's tokens are in this one.
    assert finder(first).find(NONE, question, most=20).groups == [[0]]


def test_what_was_found_leads_on_and_stands_before_it() -> None:
    question = torch.tensor([99])
    first = torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0]])
    second = torch.tensor([[0.9, 0.0, 0.0, 0.0, 0.9]])
    third = torch.tensor([[0.0, 0.0, 0.9, 0.0, 0.9]])
    found = finder(first, second, third).find(NONE, question, most=12)
    assert found.groups == [[2], [4], [0]]
    assert finder(first, second, third).find(NONE, question, most=8).groups == [[4], [0]]
    weak = second * 0.1
    assert finder(first, weak).find(NONE, question, most=8).groups == [[0]]


def test_the_words_of_the_question_lead_nowhere() -> None:
    first = torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0]])
    second = torch.tensor([[0.0, 0.0, 0.0, 0.0, 9.0]])
    all_asked = IDS[:4]
    found = finder(first, second).find(NONE, all_asked, most=8)
    assert found.groups == [[0]]


@pytest.mark.parametrize("prefix", [[], [1], list(range(3, 80))])
def test_attention_is_that_of_a_prompt_with_the_text_in_it(prefix: list[int]) -> None:
    """One chunk that stands where it was read: prefix and question see it as in a plain prompt,
    but that the question's hidden states know nothing of it. In the first layer they know nothing
    in any case.
    """
    peer = random_model(max_position_embeddings=512, num_key_value_heads=2)
    peer.set_attn_implementation("eager")
    model = ht.from_transformers(peer, ops="torch")
    heads = ReadHeads(((0, 1),), (1.0,), 2)
    text = torch.randint(3, 90, (64,), generator=torch.Generator().manual_seed(0))
    before, suffix = torch.tensor(prefix, dtype=torch.int64), torch.tensor([7, 8, 9])
    read = read_chunk(model, heads, text, torch.tensor([1]), Chunks(64, 0), 0)
    keys, scales = quantize(read)
    starts = torch.arange(64)
    stored = {"token_ids": text.int(), "unit_starts": starts, "keys": keys, "scales": scales}
    # The chunk was read behind one token; the prompt has the prefix in its place.
    end = 65 if len(prefix) < 65 else len(prefix)
    own = Finder(model, heads, stored, end, (0,))._attention(before, suffix, torch.tensor([1, 2]))
    place = torch.arange(1, 65)
    positions = torch.cat([torch.arange(len(prefix)), place, end + torch.arange(3)])
    with torch.no_grad():
        given = peer(
            torch.cat([before, text, suffix])[None],
            position_ids=positions[None],
            output_attentions=True,
        ).attentions[0]
    expected = given[0, 1, -2:, len(prefix) : len(prefix) + 64]
    torch.testing.assert_close(own, expected, atol=2e-3, rtol=0.05)
