"""What decides which tokens a prune keeps, as one small, named thing.

A selection says whose attention counts, and what is made of it. The paper's is `PAPER`; `VOTES` is
the default, since on real pretrained models the paper's finds little (bench/README.md).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import Any, Literal, get_args, get_type_hints


@dataclass(frozen=True)
class Selection:
    """Which rows of a chunk its last rows find significant.

    rows: how many of the suffix's last rows ask, None for as many as there are up to `MOST_ROWS`.
    logit: what an attention logit becomes, "logit" (itself, the one that a calibration corrects),
    "log_softmax" or "softmax" over all rows that are seen. heads: "max" or "sum" over the heads of
    the asking rows' mean, or "retrieval", the sum over the model's retrieval heads
    (`homer_triton.engine.retrieval`) alone. layers: "last" asks the node's last layer, "all" adds
    up all of its layers, "levels" adds to the last one's what the nodes below it gave, "tree" adds
    up all of both. window: how many rows share a row's score where it is better than their own, an
    odd number, 1 for each its own, None for 31, of retrieval heads 63, or an eighth of a short
    chunk. They lie on both sides of it; of retrieval heads seven eighths lie behind it, since these
    find the words of a question, and an answer follows them. A row that is kept so brings its
    neighbours, which a reader needs.

    Raises `ValueError` for values out of range.
    """

    rows: int | None = None
    logit: Literal["logit", "log_softmax", "softmax"] = "softmax"
    heads: Literal["max", "sum", "retrieval"] = "retrieval"
    layers: Literal["last", "all", "levels", "tree"] = "tree"
    window: int | None = None

    def __post_init__(self) -> None:
        if self.rows is not None:
            _require_count("rows", self.rows)
        if self.window is not None:
            _require_count("window", self.window)
        if self.window is not None and self.window % 2 == 0:
            raise ValueError(f"selection: window={self.window} must be odd, as 7, 31 or 63.")
        for name, allowed in _choices().items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(
                    f"selection: {name}={value!r} is not known; choose one of {', '.join(allowed)}."
                )

    def asking(self, suffix_len: int) -> int:
        """How many rows ask where the suffix has `suffix_len`.

        Raises `ValueError` where the suffix has fewer than `rows`.
        """
        if self.rows is None:
            return min(MOST_ROWS, suffix_len)
        if self.rows > suffix_len:
            raise ValueError(
                f"The selection asks the suffix's last {self.rows} tokens, but it has only "
                f"{suffix_len}; lower rows or give a longer suffix."
            )
        return self.rows

    def width(self, room: int) -> int:
        """The window in chunks of `room` context tokens."""
        if self.window is not None:
            return self.window
        longest = LONGEST_RETRIEVED if self.heads == "retrieval" else LONGEST_WINDOW
        return min(longest, room // 8 | 1)

    def check_room(self, room: int) -> None:
        """Raise `ValueError` where the window is longer than the `room` context tokens of chunks.

        The chunk of the root's survivors alone may be shorter.
        """
        if self.width(room) > room:
            raise ValueError(
                f"selection: window={self.window} is longer than the {room} context tokens of a "
                "chunk; lower it or raise max_chunk_len."
            )

    def reach(self, room: int) -> tuple[int, int]:
        """The window as rows before and behind a row, in chunks of `room` context tokens."""
        others = self.width(room) - 1
        before = others // 8 if self.heads == "retrieval" else others // 2
        return before, others - before

    @property
    def join(self) -> Literal["max", "sum"]:
        """What the heads that count are joined by."""
        return "max" if self.heads == "max" else "sum"

    @property
    def asks_all_layers(self) -> bool:
        """Whether a node's layers before its last are asked too."""
        return self.layers in ("all", "tree")

    @property
    def remembers(self) -> bool:
        """Whether what the nodes below gave counts."""
        return self.layers in ("levels", "tree")

    def without_retrieval(self) -> Selection:
        """What takes its place in a model that has no retrieval heads: all heads count, of the
        nodes' last layers only, since lower ones find little.
        """
        layers = "levels" if self.layers == "tree" else self.layers
        return replace(self, heads="sum", layers=layers)

    @property
    def is_paper(self) -> bool:
        """Whether this is the paper's, which one launch does and a calibration corrects."""
        return self == PAPER

    def __str__(self) -> str:
        """The text that `parse` reads back."""
        for name, known in SELECTIONS.items():
            if self == known:
                return name
        changes = [
            f"{field.name}={getattr(self, field.name)}"
            for field in fields(self)
            if getattr(self, field.name) != field.default
        ]
        return ",".join(["votes", *changes])

    @classmethod
    def parse(cls, text: str) -> Selection:
        """A selection from its name, its changes to one, or both: "paper", "votes,window=7".

        Raises `ValueError` for anything else.
        """
        selection, changes = VOTES, {}
        for number, part in enumerate(text.split(",")):
            name, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals and number == 0 and name in SELECTIONS:
                selection = SELECTIONS[name]
            elif equals and name in {field.name for field in fields(cls)}:
                changes[name] = _read(name, value)
            else:
                raise ValueError(
                    f"selection={text!r} is not known; give {' or '.join(SELECTIONS)}, and changes "
                    f"to {', '.join(field.name for field in fields(cls))} as in 'votes,window=7'."
                )
        return replace(selection, **changes)


def _require_count(name: str, value: object) -> None:
    if not isinstance(value, Integral) or value < 1:
        raise ValueError(f"selection: {name}={value!r} must be a whole number of at least 1.")


def _choices() -> dict[str, tuple[str, ...]]:
    """The allowed values of the fields that have names for values."""
    hints = get_type_hints(Selection)
    return {name: get_args(hints[name]) for name in ("logit", "heads", "layers")}


def _read(name: str, value: str) -> Any:
    """A field's value from its text."""
    if name not in ("rows", "window"):
        return value
    if value == "None":
        return None
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"selection: {name}={value!r} must be a whole number.") from None


# The context of an answer in prose; shorter ones cut numbers and names in pieces.
LONGEST_WINDOW = 31
# Some sentences, for answers that are long or follow late.
LONGEST_RETRIEVED = 63
# More rows than a question has hardly change who is asked.
MOST_ROWS = 32

# HOMER, section 3.2: the last row's largest logit over heads.
PAPER = Selection(rows=1, logit="logit", heads="max", layers="last", window=1)
# The question's rows vote, as in SnapKV (Li et al. 2024), by the heads that retrieve.
VOTES = Selection()
SELECTIONS = {"paper": PAPER, "votes": VOTES}
