"""From options to the library's arguments: texts, models, RoPE parameters, parts of an input."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output import note

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .. import EncodedContext, HomerConfig, Llama, ModelConfig


def read_text(file: str) -> str:
    """The text of a UTF-8 file without its byte order mark; "-" reads standard input.

    Raises `FileNotFoundError`, or `ValueError` for a file that cannot be read or is not UTF-8.
    """
    name = "standard input" if file == "-" else file
    if file == "-" and sys.stdin is None:
        raise ValueError("Cannot read standard input: it is closed.")
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no file {name}.") from None
    except OSError as error:
        raise ValueError(f"Cannot read {name}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x}); "
            "convert it first, for example with iconv."
        ) from error


def parse_rope_scaling(text: str | None) -> Mapping[str, Any] | None:
    """The JSON object given to `--rope-scaling`. Raises `ValueError` for anything else."""
    if text is None:
        return None
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--rope-scaling is not valid JSON: {error}.") from error
    if not isinstance(parsed, dict):
        raise ValueError(
            '--rope-scaling must be a JSON object such as {"rope_type": "yarn", "factor": 4.0}.'
        )
    return parsed


def open_model(
    path_or_id: str,
    device: str | None,
    dtype: str,
    ops: str,
    rope_scaling: str | None,
    quantize: str | None,
) -> tuple[Llama, PreTrainedTokenizerBase]:
    """The model that the options name, and its tokenizer.

    Raises the errors of `homer_triton.load`, and `ValueError` for a checkpoint without a tokenizer.
    """
    from .. import load

    scaling = parse_rope_scaling(rope_scaling)
    model = load(path_or_id, device, dtype, scaling, ops, quantize)  # type: ignore[arg-type]
    if model.tokenizer is None:
        raise ValueError(
            f"The checkpoint {path_or_id} has no tokenizer; put its tokenizer.json and "
            "tokenizer_config.json beside config.json."
        )
    return model, model.tokenizer


def tokenizer_of(
    encoded: EncodedContext, model: str | None, rope_scaling: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of the checkpoint that made an encoding.

    model: the checkpoint, None for the small one that ships; rope_scaling: the RoPE parameters of
    the encoding, as JSON. Raises `ValueError` if that checkpoint did not make the encoding, has no
    tokenizer, or has one with too few tokens.
    """
    from ..demo import CHECKPOINT
    from ..loading import fingerprint_of, load_tokenizer

    checkpoint = model or str(CHECKPOINT)
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer is None:
        raise ValueError(f"The checkpoint {checkpoint} has no tokenizer.")
    found = fingerprint_of(checkpoint, parse_rope_scaling(rope_scaling))
    if found != encoded.model:
        whose = "the one that ships" if model is None else model
        raise ValueError(
            f"The encoding was made by another model than {whose} ({encoded.model}, this is "
            f"{found}); name it with --model, and give its --rope-scaling if it had one."
        )
    if int(encoded.token_ids.max()) >= len(tokenizer):
        raise ValueError(
            f"The tokenizer of {checkpoint} has only {len(tokenizer)} tokens, the encoding holds "
            "higher ones; name the checkpoint that made it with --model."
        )
    return tokenizer


def require_one_source(context_file: str | None, encoded: Path | None, given: list[str]) -> None:
    """Raise `ValueError` unless there is exactly one source, and for options that do not fit it.

    given: the options in use that only --context-file can take, because an encoding fixes them.
    """
    if (context_file is None) == (encoded is None):
        raise ValueError("Give a text with --context-file, or an encoding with --encoded.")
    if encoded is not None and given:
        raise ValueError(
            f"{', '.join(given)} cannot change what {encoded} holds; give the text with "
            "--context-file to encode it again."
        )


def note_long_chunks(config: HomerConfig, model: ModelConfig) -> None:
    """Print a note to stderr if chunks hold positions that the model was not trained on."""
    chunk_len, limit = config.chunk_len(model), model.context_limit
    if chunk_len > limit and not model.reaches_beyond_limit:
        note(
            f"chunks of {chunk_len:,} tokens are longer than the model's context limit of "
            f"{limit:,}; the model was not trained on such positions."
        )


@dataclass(frozen=True)
class Parts:
    """An input, cut for `encode`.

    prefix, suffix: the arguments of `encode`, None for its defaults; appended: for each answer, the
    text to add after the encoding (None: nothing).
    """

    prefix: str | None
    suffix: str | None
    appended: tuple[str | None, ...]


def takes_template(tokenizer: PreTrainedTokenizerBase, chat: bool, thinking: bool | None) -> bool:
    """Whether texts go into the tokenizer's chat template. chat: whether they may.

    Raises `ValueError` if `thinking` is given without a template.
    """
    templated = chat and bool(tokenizer.chat_template)
    if thinking is not None and not templated:
        raise ValueError("--thinking and --no-thinking need a chat template; leave them out.")
    return templated


def compose(
    tokenizer: PreTrainedTokenizerBase,
    prefix: str | None,
    suffix: str | None,
    prompts: Sequence[str],
    chat: bool,
    ask_later: bool,
    special_tokens: bool = False,
    thinking: bool | None = None,
) -> Parts:
    """Lay the texts out around the context: `prefix ‖ context ‖ suffix ‖ prompt`.

    ask_later: append each prompt after the encoding, one per answer. Otherwise the prompt, if there
    is one, ends the suffix, so that it decides what is kept. chat: put everything into the user's
    turn of the tokenizer's chat template, if it has one; the turn ends after the prompt.
    special_tokens: whether prompts may hold control tokens; prefix and suffix always may. thinking:
    see `chat_affixes`.

    Raises `ValueError` for a chat template that does not take a plain user turn, for `thinking`
    without a template that has this switch, and for texts that are not Unicode.
    """
    from ..chat import chat_affixes
    from ..checks import check_text
    from ..text.controls import Affix, opening_ids, words

    given = [("--prefix", prefix), ("--suffix", suffix), *(("--prompt", p) for p in prompts)]
    for option, text in given:
        check_text(text or "", option)

    opening, closing = "", Affix("")
    if takes_template(tokenizer, chat, thinking):
        try:
            opening, closing = chat_affixes(tokenizer, thinking=thinking)
        except ValueError as error:
            remedy = "use --no-chat-template" if thinking is None else "leave --thinking out"
            raise ValueError(f"{str(error)[:-1]}; {remedy}.") from error
    elif prefix is not None:
        opening = "".join(tokenizer.convert_ids_to_tokens(opening_ids(tokenizer)))
    before = opening + (prefix or "") or None
    read = Affix if special_tokens else words
    endings = tuple("\n" + read(prompt) + closing for prompt in prompts)
    if ask_later:
        return Parts(before, suffix, endings or (None,))
    after = (suffix or "") + (endings[0] if endings else closing)
    return Parts(before, after or None, (None,))
