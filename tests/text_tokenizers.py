"""Small tokenizers of the two kinds that Llama models have."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SAMPLE = ["the king of the castle told the story of the king, and the story was told. … 漢字の城"]


def byte_level() -> PreTrainedTokenizerFast:
    """As Llama 3 has it: bytes, joined into words; some tokens end within a character."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, vocab_size=290, show_progress=False)
    bpe.train_from_iterator(SAMPLE * 2, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 1 and 2 have it: characters and words, and bytes for characters that it lacks."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [*"▁abcdefghijklmnopqrstuvwxyzATK,.…", "▁t", "he", "▁the"]
    bpe = Tokenizer(
        models.BPE(
            {token: index for index, token in enumerate(tokens)},
            [("▁", "t"), ("h", "e"), ("▁t", "he")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>")


TOKENIZERS = {"byte level": byte_level(), "byte fallback": byte_fallback()}
