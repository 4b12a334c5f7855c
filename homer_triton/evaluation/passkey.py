"""Passkey retrieval: find a five-digit number in a long text of repeated filler.

The task of Mohtashami and Jaggi (2023) as the HOMER paper uses it (section 4.1): the text is the
context, the question is the suffix, and the first run of digits of the continuation is the answer.
"""

import random
import re

from .samples import Count, Sample, Task

FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
KEY_SENTENCES = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
KEY_DIGITS = 5
NEW_TOKENS = 20

_NUMBER = re.compile(r"(?<!\d)\d(?: \d)+(?!\d)|\d+")


def make_sample(length: int, depth: float, seed: int, count_tokens: Count) -> Sample:
    """A passkey text whose context and prompt fill `length` tokens, less at most one sentence.

    Args:
        length: tokens of context and prompt together, special tokens not counted.
        depth: where the key stands, from 0 (the first sentence) to 1 (the last).
        seed: draws the key and the filler sentence that the text begins with.
        count_tokens: a text's number of tokens, `lambda text: len(tokenizer.tokenize(text))` say.

    Raises:
        ValueError: if `depth` is outside 0 to 1 or `length` is too short for key and prompt.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth is {depth}; it must lie between 0 and 1")
    draw = random.Random(seed)
    key = "".join(draw.choices("0123456789", k=KEY_DIGITS))
    first = draw.randrange(len(FILLER))
    key_text = KEY_SENTENCES.format(key=key)

    def build(sentences: int) -> str:
        before = round(depth * sentences)
        filler = [FILLER[(first + i) % len(FILLER)] for i in range(sentences)]
        return " ".join([*filler[:before], key_text, *filler[before:]])

    def size(sentences: int) -> int:
        return count_tokens(build(sentences)) + count_tokens(QUESTION)

    shortest = size(0)
    if shortest > length:
        raise ValueError(
            f"length is {length}; the key and the question alone take {shortest} tokens"
        )
    cycle = count_tokens(" ".join(FILLER))
    sentences = (length - shortest) * len(FILLER) // cycle
    while size(sentences) > length:
        sentences -= 1
    while size(sentences + 1) <= length:
        sentences += 1
    return Sample(build(sentences), QUESTION, (key,), depth)


def find_answer(generated: str) -> str | None:
    """The first run of digits in `generated`, None if there is none.

    Spaces between single digits are removed: some tokenizers put them there when they decode.
    """
    match = _NUMBER.search(generated)
    return match.group().replace(" ", "") if match else None


def _draw(draw: random.Random, room: int, depth: float | None, count_tokens: Count) -> Sample:
    seed = draw.getrandbits(32)
    return make_sample(room, draw.random() if depth is None else depth, seed, count_tokens)


def _score(generated: str, sample: Sample) -> bool:
    return find_answer(generated) == sample.answer


PASSKEY = Task("passkey", NEW_TOKENS, _draw, _score)
