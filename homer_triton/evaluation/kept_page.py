"""The page that shows which tokens of a text survived: one HTML file with everything in it."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..context import EncodedContext

_TEMPLATE = Path(__file__).with_name("kept_page.html")
_HEIGHTS = "0123456789abcdefghijklmnopqrstuvwxyz"
_BROKEN = "\N{REPLACEMENT CHARACTER}"
# The most tokens that the bytes of one character are spread over.
_CHARACTER_TOKENS = 4


def build_page(encoded: EncodedContext, texts: list[str], title: str) -> str:
    """The page's HTML.

    texts: every token's text, as `piece_texts` gives it. Raises `ValueError` where there are more
    or fewer texts than tokens.
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


def piece_texts(tokenizer: PreTrainedTokenizerBase, token_ids: Tensor) -> list[str]:
    """Each token's own text, the space before it included where it makes one; joined, they read as
    the text does.

    token_ids: [tokens]. Of tokens that hold the bytes of one character between them, the first has
    it and the others are empty.
    """
    ids = token_ids.tolist()
    # Tokenizers drop the space at the beginning of a text, so every token is decoded after another.
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"][:1]
    before = len(tokenizer.decode(anchor))

    def text(pieces: list[int]) -> str:
        return str(tokenizer.decode(anchor + pieces))[before:]

    known = {index: text([index]) for index in dict.fromkeys(ids)}
    texts = [known[index] for index in ids]
    for start in range(len(ids)):
        if _BROKEN in texts[start]:
            for stop in range(start + 2, min(start + _CHARACTER_TOKENS, len(ids)) + 1):
                joined = text(ids[start:stop])
                if _BROKEN not in joined:
                    texts[start:stop] = [joined] + [""] * (stop - start - 1)
                    break
    return texts
