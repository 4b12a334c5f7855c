"""Which keys a document keeps, and how its text is cut: what each choice is worth.

    python bench/reading.py --model FOLDER --text NOVEL … [--tokens N] [--out FILE] [NAME …]

Sentences are hidden in the first tokens of each novel: 64 that look alike, with a number for each
pair of eight adjectives and eight nouns, and eight about invented people. Eight of the first kind
are asked for, and all of the second twice: in the words of the text, and in other words. The text
is read in different ways (`WAYS`), and its units are ranked by their votes. A line of the results
says how many tokens must be read again, best unit first, until the hidden sentence is among them:
the mean and the most over the questions, and how often it comes first.

Writes bench/results/reading.csv. What is there already for a model, a text and a way is kept.
"""

import argparse
import csv
import random
import sys
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from itertools import groupby
from pathlib import Path

import torch
from measure import about, write_csv
from torch import Tensor

import homer_triton as ht
from homer_triton.document import OPENING
from homer_triton.engine.finding import Finder, lengths_of, rank
from homer_triton.engine.reading import (
    LEAST_DEEP,
    MOST_HEADS,
    OVERLAP,
    Chunks,
    ReadHeads,
    best_heads,
    quantize,
    read_chunk,
)
from homer_triton.engine.retrieval import known_attention
from homer_triton.evaluation.needles import Needle, draw_number, hide, split_sentences
from homer_triton.evaluation.words import draw_pair
from homer_triton.model.llama import Llama
from homer_triton.text.controls import plain_ids
from homer_triton.text.parts import Part, cut
from homer_triton.text.tokens import beginning

RESULTS = Path(__file__).resolve().parent / "results" / "reading.csv"
# Sentences that look alike: so many adjectives, and so many nouns with each.
ALIKE = 8
# A sentence, a question in its words, and one in others.
PROSE = (
    (
        "Marta Holm cast the new bell of Oderbruck from melted spoons.",
        "From what did Marta Holm cast the bell?",
        "Which cutlery was turned into something that rings?",
    ),
    (
        "The ferryman Ilja Brandt kept a tame heron named Quill.",
        "How was the ferryman's heron named?",
        "Which bird did the boatman have as a pet?",
    ),
    (
        "On the isle of Sarn, bread is baked with seawater and dill.",
        "With what is bread baked on Sarn?",
        "Where do loaves taste of the ocean?",
    ),
    (
        "Doctor Vane lost his left glove in the crypt of Ebersfeld.",
        "Where did Doctor Vane lose his glove?",
        "What did the physician leave behind under a church?",
    ),
    (
        "The lighthouse at Torsk was painted green to please a widow.",
        "Why was the lighthouse painted green?",
        "Which tower on the coast got its colour for a bereaved lady?",
    ),
    (
        "Old Pettersen taught the miller's goat to ring for dinner.",
        "Who taught the miller's goat?",
        "Which farm animal could announce a meal?",
    ),
    (
        "The treaty of Lund was signed on the back of a menu.",
        "Where was the treaty of Lund signed?",
        "Which agreement was written on a restaurant's card?",
    ),
    (
        "Captain Ruiz carried a jar of blue sand from Tamrit.",
        "What did Captain Ruiz carry from Tamrit?",
        "Who brought home a pot of desert?",
    ),
)


@dataclass(frozen=True)
class Way:
    """One way to read: the number of heads, and the share of the attention for which the deepest
    layer is read; tokens of a chunk, and of those before it; what every chunk begins with; the kind
    of keys; and whether better heads count more.
    """

    name: str
    heads: int = MOST_HEADS
    least_deep: float = LEAST_DEEP
    chunk_len: int = 1024
    overlap: int = OVERLAP
    opening: str = OPENING
    keys: str = "int8"
    weighted: bool = True


WAYS = (
    Way("as shipped"),
    Way("as deep as a head is", least_deep=0.0),
    Way("unquantized keys", keys="unquantized"),
    Way("heads of equal weight", weighted=False),
    *(Way(f"{count} heads", heads=count) for count in (2, 4, 8, 16, 24)),
    Way("no tokens before a chunk", overlap=0),
    Way("no opening", opening=""),
    Way("opening of one line break", opening="\n"),
    *(Way(f"chunks of {length}", chunk_len=length) for length in (256, 512, 2048)),
)


@dataclass(frozen=True)
class Line:
    """One way's result on one text. bytes: of a token's keys; last_layer: the last one that is read
    (from 0).
    """

    model: str
    text: str
    tokens: int
    kind: str
    way: str
    questions: int
    first: int
    needed_mean: float
    needed_most: int
    bytes: int
    last_layer: int
    device: str
    versions: str
    commit: str
    command: str


def make_text(text: str, tokens: int, model: Llama) -> tuple[str, list[tuple[str, str, str]]]:
    """The beginning of a text with all sentences in it; and what is asked: the kind, the sentence
    and the question.
    """
    draw = random.Random(f"reading/{text[:100]}")
    pairs = {draw_pair(draw) for _ in range(8 * ALIKE)}
    first, second = (sorted({pair.split("-")[at] for pair in pairs})[:ALIKE] for at in (0, 1))
    needles = [Needle(f"{one}-{other}", draw_number(draw)) for one in first for other in second]
    what = "What is the special magic number for {} mentioned in the text?"
    asked = [("alike", x.sentence, what.format(x.key)) for x in draw.sample(needles, ALIKE)]
    asked += [("prose", sentence, question) for sentence, question, _ in PROSE]
    asked += [("other words", sentence, question) for sentence, _, question in PROSE]
    hidden = [*(needle.sentence for needle in needles), *(sentence for sentence, _, _ in PROSE)]
    draw.shuffle(hidden)
    tokenizer, lines = model.tokenizer, []
    used = sum(len(plain_ids(tokenizer, f" {sentence}")) for sentence in hidden)
    for sentence in split_sentences(text):
        used += len(plain_ids(tokenizer, f" {sentence}"))
        if used > tokens:
            break
        lines.append(sentence)
    return hide(hidden, lines), asked


def heads_of(model: Llama, way: Way) -> ReadHeads:
    """The heads that a way reads."""
    attention, config = known_attention(model), model.config
    if attention is None:
        raise ValueError("the model has no retrieval heads")
    groups = config.num_attention_heads // config.num_key_value_heads
    heads = best_heads(attention, groups, way.heads, way.least_deep)
    if way.weighted:
        return heads
    return replace(heads, weights=(1 / len(heads.heads),) * len(heads.heads))


def read_keys(model: Llama, part: Part, ways: list[Way]) -> tuple[Tensor, ReadHeads, int]:
    """The keys [N, G, D] of all heads of ways that cut alike, those heads, and a chunk's end."""
    way = ways[0]
    every = sorted({head for own in ways for head in heads_of(model, own).heads})
    said = plain_ids(model.tokenizer, way.opening) if way.opening else []
    opening = torch.tensor([*beginning(model), *said], dtype=torch.int64)
    chunks, found = Chunks(way.chunk_len, way.overlap), []
    heads = ReadHeads(tuple(every), (1.0,) * len(every), heads_of(model, way).groups)
    for begin in range(0, len(part.ids), way.chunk_len):
        found.append(read_chunk(model, heads, part.ids, opening, chunks, begin))
        show(f"{way.name}: {begin + len(found[-1]):,} of {len(part.ids):,} tokens")
    return torch.cat(found), heads, chunks.end(len(opening))


def needed(
    model: Llama, finder: Finder, part: Part, text: str, sentence: str, question: str
) -> tuple[int, bool]:
    """How many tokens the best units have, down to the one that holds a sentence, and whether that
    is the best.
    """
    prefix = torch.tensor(beginning(model), dtype=torch.int64)
    suffix = torch.tensor(plain_ids(model.tokenizer, f"\n{question}"))
    votes, _ = finder.votes(prefix, suffix)
    lengths = lengths_of(torch.tensor(part.starts), len(part.ids))
    place, total = text.index(sentence), 0
    for number, unit in enumerate(rank(votes)):
        total += int(lengths[unit])
        start, end = part.spans[unit]
        if start <= place + len(sentence) // 2 < end:
            return total, number == 0
    raise ValueError("the sentence is in no unit")


def measure(
    model: Llama, name: str, file: Path, tokens: int, ways: list[Way]
) -> Iterator[list[Line]]:
    """The lines of each way."""
    text, asked = make_text(file.read_text("utf-8-sig"), tokens, model)
    part = cut(model, None, text)
    for _, alike in groupby(ways, lambda way: (way.chunk_len, way.overlap, way.opening)):
        own = list(alike)
        keys, superset, end = read_keys(model, part, own)
        for way in own:
            heads = heads_of(model, way)
            kept = keys[:, [superset.key_heads.index(head) for head in heads.key_heads]]
            stored = {"token_ids": part.ids.int(), "unit_starts": torch.tensor(part.starts)}
            if way.keys == "int8":
                stored["keys"], stored["scales"] = quantize(kept)
            else:
                stored["keys"] = kept
            finder = Finder(model, heads, stored, end, [0, len(part.starts)])
            size = sum(x[0].nbytes for key, x in stored.items() if key in ("keys", "scales"))
            lines: list[Line] = []
            for kind in ("alike", "prose", "other words"):
                found = [
                    needed(model, finder, part, text, sentence, question)
                    for own_kind, sentence, question in asked
                    if own_kind == kind
                ]
                counts = [count for count, _ in found]
                first = sum(is_first for _, is_first in found)
                lines.append(
                    Line(
                        *(name, file.name, len(part.ids), kind, way.name, len(counts), first),
                        *(round(sum(counts) / len(counts), 1), max(counts), size, heads.last_layer),
                        *about(),
                    )
                )
            yield lines


def show(sentence: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{sentence:60}", end="", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these ways; default: all")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    wrong = set(args.names) - {way.name for way in WAYS}
    if wrong:
        print(f"There is no way {wrong.pop()!r}; see WAYS.", file=sys.stderr)
        return 2
    lines: list[Line] = []
    if args.out.is_file():
        with args.out.open(newline="") as file:
            lines = [Line(**row) for row in csv.DictReader(file)]  # type: ignore[arg-type]
    names = args.names or [way.name for way in WAYS]
    model = ht.load(args.model, dtype="float32")
    for text in args.text:
        known = args.model.name, text.name
        done = {line.way for line in lines if (line.model, line.text) == known}
        ways = [way for way in WAYS if way.name in names and way.name not in done]
        for own in measure(model, args.model.name, text, args.tokens, ways):
            for line in own:
                print(*astuple(line)[1:12], flush=True)
            lines += own
            write_csv(args.out, lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
