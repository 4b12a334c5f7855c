"""The command line run in this process, on tiny checkpoints with a word-level tokenizer."""

from pathlib import Path
from typing import Any

from checkpoints import save_checkpoint
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from homer_triton.cli.commands import app

VOCABULARY = 96
CHAT_TEMPLATE = (
    "{{ bos_token }}w10 {{ messages[0]['content'] }} w11"
    "{% if add_generation_prompt %} w12{% endif %}"
)


def run(*arguments: object, stdin: str | None = None) -> Result:
    """What `homer` does with these arguments; `stdout` and `stderr` are kept apart."""
    return CliRunner().invoke(app, [str(a) for a in arguments], input=stdin, prog_name="homer")


def checkpoint(folder: Path, words: int = VOCABULARY, chat: bool = False, **settings: Any) -> Path:
    """Save a tiny random Llama whose tokenizer knows `<unk> <s> </s> w3 w4 …`, `words` in all."""
    save_checkpoint(folder, vocab_size=VOCABULARY, **settings)
    tokens = ["<unk>", "<s>", "</s>", *(f"w{index}" for index in range(3, words))]
    tokenizer = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return folder


def text(words: int) -> str:
    """A text of that many tokens."""
    return " ".join(f"w{3 + index * 7 % 80}" for index in range(words))
