"""How a prune chooses the tokens that it keeps, as data.

A `Selection` says whose attention counts and how it becomes a score. `PAPER` is the published
method. `VOTES` is the default, because on real pretrained models the paper's selection finds little
(see bench/README.md).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import Any, Literal, get_args, get_type_hints


@dataclass(frozen=True)
class Selection:
    """How a prune chooses the tokens that it keeps.

    Every chunk ends with the suffix, usually the question. When the chunk is pruned, the suffix's
    last tokens vote: each context token is scored by the attention that they pay to it, and the
    tokens with the best scores stay. A `Selection` says which tokens vote, and how their attention
    becomes a score. Give it to `HomerConfig(selection=...)`, as an object or as a text such as
    "votes,window=7" (see `parse`).

    Attributes:
        rows: How many of the suffix's last tokens vote. None: all of them, but at most 32.
        logit: What an attention logit q · k / sqrt(D) counts as: "logit" (the value itself), or its
            "log_softmax" or "softmax" over all tokens that the voting ones see, which are the
            prefix and the chunk.
        heads: How the attention heads are joined, each with its mean over the voting tokens: "max"
            or "sum" over all heads, or "retrieval", the sum over the retrieval heads alone. These
            are the few heads that look up what a question repeats (Wu et al. 2024). They are found
            once for each model, in the time of reading some two thousand tokens
            (`homer_triton.engine.retrieval`). Where a model has none, `without_retrieval` applies.
        layers: Whose scores are added up: "last", the last layer that the chunk runs; "all", every
            layer that it runs; "levels", its last layer and what the chunks below it in the tree
            gave; "tree", every layer of all of these.
        window: The width of the max-pooling over tokens, odd. A token's score also counts for its
            neighbours where it is better than their own, so that a kept token brings along the
            words around it. 1: no pooling. None: 63 with "retrieval", 31 otherwise, but at most
            about an eighth of a chunk's context tokens. The neighbours lie half before and half
            after the token; with "retrieval", one eighth before and seven eighths after, because
            these heads find the words of a question and the answer follows them.

    Raises:
        ValueError: A value is out of range.
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
        """How many tokens vote if the suffix has `suffix_len`.

        Raises:
            ValueError: The suffix has fewer tokens than `rows`.
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
        """The window, in tokens, for chunks with `room` context tokens."""
        if self.window is not None:
            return self.window
        longest = LONGEST_RETRIEVED if self.heads == "retrieval" else LONGEST_WINDOW
        return min(longest, room // 8 | 1)

    def check_room(self, room: int) -> None:
        """Raise `ValueError` if the window is longer than the `room` context tokens of a chunk.

        The one chunk that chooses from the root's survivors may be shorter than its window.
        """
        if self.width(room) > room:
            raise ValueError(
                f"selection: window={self.window} is longer than the {room} context tokens of a "
                "chunk; lower it or raise max_chunk_len."
            )

    def reach(self, room: int) -> tuple[int, int]:
        """How many neighbours before and after a token the window has.

        room: context tokens of a chunk.
        """
        others = self.width(room) - 1
        before = others // 8 if self.heads == "retrieval" else others // 2
        return before, others - before

    @property
    def join(self) -> Literal["max", "sum"]:
        """How the heads that count are joined: "max" or "sum"."""
        return "max" if self.heads == "max" else "sum"

    @property
    def asks_all_layers(self) -> bool:
        """Whether the layers before a chunk's last one give scores too."""
        return self.layers in ("all", "tree")

    @property
    def remembers(self) -> bool:
        """Whether the scores from lower chunks of the tree count too."""
        return self.layers in ("levels", "tree")

    def without_retrieval(self) -> Selection:
        """The selection to use instead in a model without retrieval heads.

        All heads count, but only in the last layer of each chunk, because lower layers find little.
        """
        layers = "levels" if self.layers == "tree" else self.layers
        return replace(self, heads="sum", layers=layers)

    @property
    def is_paper(self) -> bool:
        """Whether this is the paper's selection: the one that a calibration corrects."""
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
        """A selection from a name, changes to its fields, or both: "paper", "votes,window=7".

        Changes without a name are changes to "votes".

        Raises:
            ValueError: The text is anything else.
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
    """The allowed values of the fields that take one of several names."""
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


# Enough for an answer in prose; shorter windows cut numbers and names into pieces.
LONGEST_WINDOW = 31
# A few sentences, for long answers and for those that come late.
LONGEST_RETRIEVED = 63
# More voting tokens than a question has hardly change the choice.
MOST_ROWS = 32

# HOMER, section 3.2: the last token's largest logit over heads.
PAPER = Selection(rows=1, logit="logit", heads="max", layers="last", window=1)
# The question's tokens vote, as in SnapKV (Li et al. 2024), in the retrieval heads.
VOTES = Selection()
SELECTIONS = {"paper": PAPER, "votes": VOTES}
