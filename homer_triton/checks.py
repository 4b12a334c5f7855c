"""What users give as numbers and texts, checked in one place."""

from __future__ import annotations

from numbers import Integral
from typing import Any

# No text, cache or answer has as many tokens.
MOST = 2**48
# The seeds that PyTorch takes.
SEEDS = (-(2**63), 2**64 - 1)


def whole_number(name: str, value: Any, least: int, most: int = MOST) -> int:
    """The value of an argument as an `int`, of whatever kind it is, such as NumPy's.

    Raises `ValueError`, naming the argument, for what is no whole number (true and false are none)
    and outside the bounds.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be a whole number.")
    number = int(value)
    if number < least:
        raise ValueError(f"{name}={number} must be at least {least}.")
    if number > most:
        raise ValueError(f"{name}={number} must be at most {most}.")
    return number


def check_text(text: str, name: str) -> None:
    """Raise `ValueError` for text with half of a surrogate pair, which no encoding of Unicode has:
    Python puts some where bytes were not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(
            f"{name} is not Unicode text: character {error.start} is half of a surrogate pair "
            f"(U+{code:04X}), or a byte that was not UTF-8."
        ) from None
