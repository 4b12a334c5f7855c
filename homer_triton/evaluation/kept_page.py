"""The page that shows which tokens of a text survived: one HTML file with everything in it."""

from __future__ import annotations

import json
from pathlib import Path

from ..context import EncodedContext

_TEMPLATE = Path(__file__).with_name("kept_page.html")
_HEIGHTS = "0123456789abcdefghijklmnopqrstuvwxyz"


def build_page(encoded: EncodedContext, texts: list[str], title: str) -> str:
    """The page's HTML.

    texts: every token's text, as `pieces.piece_texts` gives it. Raises `ValueError` where there are
    more or fewer texts than tokens.
    """
    heights = encoded.pruned_at.tolist()
    if len(texts) != len(heights):
        raise ValueError(f"{len(texts)} texts do not fit {len(heights)} tokens.")
    data = {
        "title": title,
        "texts": texts,
        "heights": "".join("-" if height < 0 else _HEIGHTS[height] for height in heights),
        "height": encoded.plan.height,
        "prefix": encoded.plan.prefix_len,
        "suffix": encoded.plan.suffix_len,
    }
    # A text may hold what would end the script element.
    embedded = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    return _TEMPLATE.read_text(encoding="utf-8").replace("__DATA__", embedded)
