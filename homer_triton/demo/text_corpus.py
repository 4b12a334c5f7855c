"""The text model's corpus: the running Python's standard library and language reference."""

import random
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

BEGIN, END = "<s>", "</s>"
HELD_OUT = (
    "_pydatetime.py",
    "_pydecimal.py",
    "argparse.py",
    "datetime.py",
    "inspect.py",
    "pickletools.py",
    "tarfile.py",
    "turtle.py",
    "typing.py",
)
# Tests, tables of characters, settings of the machine that built this Python, other people's code,
# and the language reference's own source, whose text is read as it is.
_SKIPPED_FOLDERS = {
    *("test", "tests", "idle_test"),
    *("encodings", "pydoc_data", "ensurepip"),
    *("site-packages", "dist-packages"),
}
_SKIPPED_NAMES = ("_sysconfigdata", "entities")
SPARSE_CHUNKS = (2, 4, 8, 16)
SPARSE_RUNS = (1, 2, 4, 8, 16)


def held_out_modules() -> dict[str, str]:
    """The sources that are kept for testing, by file name; Pythons differ in which they have."""
    library = _library()
    files = [library / name for name in HELD_OUT]
    return {file.name: file.read_text(encoding="utf-8") for file in files if file.is_file()}


def training_texts() -> list[str]:
    """Every other module's source, then the topics of the language reference, in a fixed order."""
    library = _library()
    sources = [
        file.read_text(encoding="utf-8", errors="replace")
        for file in sorted(library.rglob("*.py"))
        if _is_training_source(file.relative_to(library))
    ]
    return sources + [topics[name] for name in sorted(topics)]


def build_tokenizer(
    texts: list[str], vocabulary: int, context_limit: int
) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text can be read, with a beginning token in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[BEGIN, END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        model_max_length=context_limit,
        clean_up_tokenization_spaces=False,
    )


def tokenize_corpus(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """All texts in one stream of token ids, [tokens], each followed by the end token."""
    end = [tokenizer.eos_token_id]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
    return torch.cat([torch.tensor(ids + end) for ids in encoded])


class WindowSampler:
    """Draws training windows `BOS ‖ context ‖ continuation` that begin anywhere in the stream.

    The context is what the last `room` tokens before the continuation are or, in a *sparse* window,
    as many out of a longer text: short runs that survive at random from equal chunks, each token
    with the position that it had in its own chunk, as after a merge.
    """

    def __init__(self, stream: Tensor, begin: int, length: int, room: int, seed: int) -> None:
        """stream: [tokens]; begin: BOS; length: a window's rows; room: those of its context."""
        self._stream, self._begin = stream, begin
        self._length, self._room = length, room
        self._draw = random.Random(seed)

    def windows(self, count: int, sparse_share: float) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids, positions and the tokens that follow each in the text, `[count, length]`."""
        windows = [self._window(self._draw.random() < sparse_share) for _ in range(count)]
        ids, positions, targets = zip(*windows, strict=True)
        return torch.stack(ids), torch.stack(positions), torch.stack(targets)

    def _window(self, sparse: bool) -> tuple[Tensor, Tensor, Tensor]:
        chunks = self._draw.choice(SPARSE_CHUNKS) if sparse else 1
        chunk_len = self._draw.randint(self._room // 2, self._room) if sparse else self._room
        kept = self._survivors(chunks * chunk_len)
        continuation = torch.arange(self._length - 1 - len(kept))
        rows = torch.cat([kept, chunks * chunk_len + continuation])
        positions = torch.cat([kept % chunk_len, chunk_len + continuation]) + 1

        start = self._draw.randrange(len(self._stream) - int(rows[-1]) - 1)
        text = self._stream[start:]
        begin = torch.zeros(1, dtype=torch.int64)
        return (
            torch.cat([begin + self._begin, text[rows]]),
            torch.cat([begin, positions]),
            # The token after BOS is the one that stands there; anything may follow BOS itself.
            text[torch.cat([rows[:1], rows + 1])],
        )

    def _survivors(self, length: int) -> Tensor:
        """Ascending offsets, `[room]` or as many as there are, in runs of one random length."""
        run = self._draw.choice(SPARSE_RUNS)
        runs = -(-length // run)
        luck = torch.tensor([self._draw.random() for _ in range(runs)])
        luck = luck.repeat_interleave(run)[:length]
        return luck.topk(min(self._room, length)).indices.sort().values


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _is_training_source(file: Path) -> bool:
    return (
        file.as_posix() not in HELD_OUT
        and not _SKIPPED_FOLDERS.intersection(file.parts)
        and not file.stem.startswith(_SKIPPED_NAMES)
    )
