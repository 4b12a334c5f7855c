"""The demo model's training documents: filler with a passkey in it, the question, the answer."""

import random

from transformers import PreTrainedTokenizerBase

from ..evaluation.passkey import FILLER, KEY_DIGITS, KEY_SENTENCES, QUESTION
from .tokenizer import WORDS

DOCUMENT_LENGTHS = (48, 64, 96, 128, 192, 256)
RANDOM_FILLER_SHARE = 0.7
CUT_KEY_SHARE = 0.2


class Corpus:
    """Draws documents `BOS ‖ context ‖ question ‖ five digits ‖ "." ‖ EOS` of token ids.

    Random-word filler is there because the usual sentences alone are learnt by heart. Some contexts
    begin or end in the middle of the key sentences, as the chunks of a longer text may.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self._draw = random.Random(seed)
        self._encode = lambda text: tokenizer(text, add_special_tokens=False).input_ids
        self._begin, self._end = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
        self._question = self._encode(QUESTION)
        self._usual_filler = [self._encode(sentence) for sentence in FILLER]
        vocabulary = tokenizer.get_vocab()
        self._random_filler = [vocabulary[word] for word in (*WORDS, ".", ",", ".")]
        self._full_stop = self._encode(".")
        self.answer_rows = KEY_DIGITS + 2
        self.question_rows = len(self._question)

    def documents(self, count: int, length: int) -> list[list[int]]:
        """`count` documents of exactly `length` tokens; the answer is their last `answer_rows`."""
        return [self._document(length) for _ in range(count)]

    def _document(self, length: int) -> list[int]:
        key = "".join(self._draw.choices("0123456789", k=KEY_DIGITS))
        answer = self._encode(key) + self._full_stop + self._end
        room = length - 1 - len(self._question) - len(answer)
        context = self._context(self._encode(KEY_SENTENCES.format(key=key)), room)
        return self._begin + context + self._question + answer

    def _context(self, key_tokens: list[int], room: int) -> list[int]:
        draw = self._draw
        cut = 0
        if draw.random() < CUT_KEY_SHARE:
            half = len(key_tokens) // 2 - 2
            cut = draw.choice((-1, 1)) * draw.randint(1, half)
            key_tokens = key_tokens[cut:] if cut > 0 else key_tokens[:cut]
        filler = self._filler(room - len(key_tokens))
        before = 0 if cut > 0 else len(filler) if cut < 0 else draw.randint(0, len(filler))
        return filler[:before] + key_tokens + filler[before:]

    def _filler(self, count: int) -> list[int]:
        draw = self._draw
        if draw.random() < RANDOM_FILLER_SHARE:
            return draw.choices(self._random_filler, k=count)
        first = draw.randrange(len(FILLER))
        tokens: list[int] = []
        while len(tokens) < count:
            tokens += self._usual_filler[first % len(FILLER)]
            first += 1
        return tokens[:count]
