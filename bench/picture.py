"""Draw the main README's picture: `python bench/picture.py` writes it to bench/picture/, in light
and in dark colours.

A text is split into chunks, neighbours merge and are pruned, and a short KV cache is left.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).resolve().parent / "picture"
WIDTH, HEIGHT = 900, 520
LEFT, RIGHT = 24, 876
LEAVES, CELLS = 8, 10  # chunks of the text, tokens drawn in each
NEEDLE = (5, (4, 5))  # the leaf and the cells that hold the answer
CELL, GAP, AFFIX, TALL = 6, 1, 9, 26  # pixels
WIDE = 2 * (AFFIX + 3) + CELLS * (CELL + GAP) - GAP  # of a chunk
MIDDLE = (LEFT + RIGHT) / 2
TEXT, LEVELS, STEP, CACHE, ANSWER = 34, 108, 82, 432, 494  # top edges

THEMES = {
    "light": {
        "ink": "#1f2328",
        "quiet": "#59636e",
        "line": "#8c959f",
        "kept": "#6e7781",
        "pruned": "#d8dee4",
        "prefix": "#0969da",
        "suffix": "#1a7f37",
        "needle": "#d1570b",
    },
    "dark": {
        "ink": "#f0f6fc",
        "quiet": "#9198a1",
        "line": "#656c76",
        "kept": "#b1bac4",
        "pruned": "#3d444d",
        "prefix": "#4493f8",
        "suffix": "#3fb950",
        "needle": "#f0883e",
    },
}


def chunks() -> list[list[list[str]]]:
    """Each level's nodes from the leaves to the root: the colour of each of a node's tokens."""
    rng = random.Random(3)
    leaf, cells = NEEDLE
    # Whether each token is part of the answer.
    nodes = [[n == leaf and i in cells for i in range(CELLS)] for n in range(LEAVES)]
    levels = []
    while len(nodes) > 1:
        stays = [keep(node, rng) for node in nodes]
        levels.append([coloured(*pair) for pair in zip(nodes, stays, strict=True)])
        halves = [[node[i] for i in rows] for node, rows in zip(nodes, stays, strict=True)]
        nodes = [halves[i] + halves[i + 1] for i in range(0, len(halves), 2)]
    return [*levels, [coloured(nodes[0], list(range(CELLS)))]]


def keep(node: list[bool], rng: random.Random) -> list[int]:
    """Which half of a node's tokens stays, the answer's among them."""
    order = sorted(range(len(node)), key=lambda i: (not node[i], rng.random()))
    return sorted(order[: len(node) // 2])


def coloured(node: list[bool], stays: list[int]) -> list[str]:
    """The colours of a node's tokens, of which some stay."""
    return [
        "needle" if answer else "kept" if i in stays else "pruned" for i, answer in enumerate(node)
    ]


class Drawing:
    """SVG elements in one theme's colours."""

    def __init__(self, colours: dict[str, str]) -> None:
        self.colours = colours
        self.parts: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        fill = self.colours[colour]
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="1.5" '
            f'fill="{fill}"/>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float) -> None:
        middle = (y1 + y2) / 2
        self.parts.append(
            f'<path d="M{x1:g} {y1:g}C{x1:g} {middle:g} {x2:g} {middle:g} {x2:g} {y2:g}" '
            f'fill="none" stroke="{self.colours["line"]}" stroke-width="1.5"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        colour: str = "quiet",
        anchor: str = "start",
        size: int = 14,
        weight: int = 400,
    ) -> None:
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" fill="{self.colours[colour]}" text-anchor="{anchor}" '
            f'font-size="{size}" font-weight="{weight}">{escape(words)}</text>'
        )

    def svg(self) -> str:
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
                'role="img" aria-label="A long text is split into chunks. Neighbours merge and '
                'are pruned, up to a short KV cache, from which the model answers." '
                'font-family="system-ui,-apple-system,Segoe UI,Helvetica,Arial,sans-serif">',
                *self.parts,
                "</svg>\n",
            ]
        )


def draw(colours: dict[str, str]) -> str:
    """The picture in these colours."""
    drawing = Drawing(colours)
    levels = chunks()
    long_text(drawing)
    for height, nodes in enumerate(levels):
        top = LEVELS + height * STEP
        for n, node in enumerate(nodes):
            x = centre(height, n)
            if height:
                for child in (2 * n, 2 * n + 1):
                    drawing.line(centre(height - 1, child), top - STEP + TALL, x, top)
            chunk(drawing, x - WIDE / 2, top, node)
    drawing.text(LEFT, LEVELS - 14, "Chunks share a prefix (blue) and the question (green).")
    drawing.text(RIGHT, LEVELS - 14, "Early layers run chunk by chunk.", anchor="end")
    for line, words in enumerate(
        ("Neighbours merge.", "Tokens that the question", "attends to least are pruned.")
    ):
        drawing.text(MIDDLE, LEVELS + 2 * STEP - 4 + 19 * line, words, anchor="middle")
    short_cache(drawing, levels[-1][0])
    return drawing.svg()


def centre(height: int, node: int) -> float:
    """Where a node's middle is."""
    span = (RIGHT - LEFT) / LEAVES * 2**height
    return LEFT + span * (node + 0.5)


def long_text(drawing: Drawing) -> None:
    drawing.text(LEFT, TEXT - 10, "A long text: 16,384 tokens", "ink", weight=600)
    drawing.text(RIGHT, TEXT - 10, "“… the magic number is 4817253 …”", "needle", "end")
    rng = random.Random(1)
    x = float(LEFT)
    while x < RIGHT - 3:
        width = min(rng.uniform(4, 22), RIGHT - x)
        drawing.box(x, TEXT, width, 7, "kept")
        drawing.box(x, TEXT + 10, width, 7, "kept")
        x += width + 3
    leaf, cells = NEEDLE
    at = centre(0, leaf) + (sum(cells) / len(cells) - CELLS / 2) * (CELL + GAP)
    drawing.box(at - 14, TEXT, 28, 17, "needle")


def chunk(drawing: Drawing, x: float, y: float, node: list[str]) -> None:
    drawing.box(x, y, AFFIX, TALL, "prefix")
    x += AFFIX + 3
    for colour in node:
        drawing.box(x, y, CELL, TALL, colour)
        x += CELL + GAP
    drawing.box(x + 3 - GAP, y, AFFIX, TALL, "suffix")


def short_cache(drawing: Drawing, root: list[str]) -> None:
    drawing.line(MIDDLE, LEVELS + 3 * STEP + TALL, MIDDLE, CACHE)
    chunk(drawing, MIDDLE - WIDE / 2, CACHE, root)
    right = MIDDLE + WIDE / 2 + 14
    drawing.text(
        right, CACHE + 17, "A short, ordinary KV cache: about 440 tokens", "ink", weight=600
    )
    drawing.text(LEFT, CACHE + 17, "The survivors are read once more, as one prompt.")
    drawing.line(MIDDLE, CACHE + TALL, MIDDLE, ANSWER)
    drawing.text(MIDDLE - 20, ANSWER + 16, "“What is the magic number?”", "suffix", "end")
    drawing.text(MIDDLE, ANSWER + 16, "→", "quiet", "middle")
    drawing.text(MIDDLE + 20, ANSWER + 16, "“4817253”", "needle", weight=600)


def main() -> int:
    FOLDER.mkdir(exist_ok=True)
    for name, colours in THEMES.items():
        (FOLDER / f"{name}.svg").write_text(draw(colours), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
