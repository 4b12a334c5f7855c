"""A selection by its name, its changes and its limits."""

from typing import Any

import pytest
from cases import peers, random_tokens

import homer_triton as ht
from homer_triton.selection import MOST_ROWS, PAPER, VOTES, Selection


@pytest.mark.parametrize(
    ("text", "selection"),
    [
        ("paper", PAPER),
        ("votes", VOTES),
        ("votes,window=7", Selection(window=7)),
        ("rows=4, heads=max", Selection(rows=4, heads="max")),
        ("paper,rows=3", Selection(3, "logit", "max", "last", 1)),
        ("votes,layers=all,rows=None", Selection(layers="all")),
    ],
)
def test_what_is_written_is_read_back(text: str, selection: Selection) -> None:
    assert Selection.parse(text) == selection
    assert Selection.parse(str(selection)) == selection


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("l2", "selection='l2' is not known; give paper or votes, and changes to rows, logit"),
        ("votes,paper", "selection='votes,paper' is not known"),
        ("votes,size=3", "selection='votes,size=3' is not known"),
        ("votes,window=4", "window=4 must be odd"),
        ("votes,window=0", "window=0 must be a whole number of at least 1"),
        ("votes,rows=many", "rows='many' must be a whole number"),
        ("votes,logit=tanh", "logit='tanh' is not known; choose one of logit, log_softmax"),
        ("votes,heads=mean", "heads='mean' is not known; choose one of max, sum"),
        (
            "votes,layers=first",
            "layers='first' is not known; choose one of last, all, levels, tree",
        ),
        ("", "selection='' is not known"),
    ],
)
def test_anything_else_is_refused_in_a_sentence(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Selection.parse(text)


def test_as_many_rows_ask_as_there_are() -> None:
    assert [VOTES.asking(n) for n in (1, 20, 500)] == [1, 20, MOST_ROWS]
    assert Selection(rows=3).asking(3) == 3
    with pytest.raises(ValueError, match="asks the suffix's last 4 tokens, but it has only 3"):
        Selection(rows=4).asking(3)


def test_a_window_left_out_fits_the_chunk() -> None:
    widths = [VOTES.width(room) for room in (1, 20, 115, 1000, 5000)]
    assert widths == [1, 3, 15, 63, 63]
    assert Selection(heads="sum").width(5000) == 31
    Selection(window=9).check_room(9)
    with pytest.raises(ValueError, match="window=9 is longer than the 8 context tokens of a chunk"):
        Selection(window=9).check_room(8)


def test_what_retrieval_heads_find_is_followed_by_the_answer() -> None:
    assert VOTES.reach(5000) == (7, 55)
    assert Selection(heads="max").reach(5000) == (15, 15)
    assert Selection(window=1).reach(8) == PAPER.reach(8) == (0, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"selection": "votes,rows=4"}, "suffix's last 4 tokens, but it has only 2"),
        ({"selection": "votes,window=31"}, "window=31 is longer than"),
    ],
)
def test_encode_refuses_what_the_input_does_not_have(
    settings: dict[str, Any], message: str
) -> None:
    model = peers(4, 2)[1]
    config = ht.HomerConfig(16, 16, 1, **settings)
    with pytest.raises(ValueError, match=message):
        ht.encode(model, random_tokens(60), [1], [2, 3], config)
