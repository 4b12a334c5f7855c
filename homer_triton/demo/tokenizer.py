"""The demo model's tokenizer: whole words, and one token per digit."""

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ..evaluation.passkey import FILLER, KEY_SENTENCES, QUESTION

UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"
WORDS = Path(__file__).with_name("words.txt").read_text(encoding="utf-8").split()


def build_tokenizer(context_limit: int) -> PreTrainedTokenizerFast:
    """Word-level, over the passkey sentences and `WORDS`; any other word becomes `<unk>`."""
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Whitespace(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    sentences = " ".join([*FILLER, KEY_SENTENCES.format(key=""), QUESTION])
    sentence_words = [word for word, _ in splitter.pre_tokenize_str(sentences)]
    characters = "0123456789.,;:!?'\"()-"
    tokens = [UNKNOWN, BEGIN, END, *characters, *sentence_words, *WORDS]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}

    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = splitter
    joined_digits = decoders.Replace(Regex(r"(?<=\d) (?=\d)"), "")
    tokenizer.decoder = decoders.Sequence([decoders.WordPiece(), decoders.Fuse(), joined_digits])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, vocabulary[BEGIN])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        bos_token=BEGIN,
        eos_token=END,
        model_max_length=context_limit,
        clean_up_tokenization_spaces=False,
    )
