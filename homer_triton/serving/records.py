"""What is kept of a document beside its encodings: one JSON file, the text in it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

_TOLD = ("id", "title", "suffix", "created", "characters", "stats")


class NoDocumentError(Exception):
    """There is no document of that id."""


class TooLargeError(Exception):
    """A document does not fit the bound, even alone."""


class DiskError(Exception):
    """The disk refuses a file; the message is for whoever runs the server."""


@dataclass
class Document:
    """A text that was read.

    suffix: what it was read for; created: seconds since 1970; stats: what reading it took.
    """

    id: str
    title: str
    suffix: str | None
    created: int
    characters: int
    stats: dict[str, Any]
    # By key: bytes on disk, and when it was used last.
    encodings: dict[str, tuple[int, float]] = field(default_factory=dict)
    size: int = 0

    @property
    def bytes(self) -> int:
        """What it takes on disk."""
        return self.size + sum(size for size, _ in self.encodings.values())


def id_of(text: str, suffix: str | None) -> str:
    """A document's id, which the text and what it is read for decide."""
    told = json.dumps([suffix, text]).encode()
    return f"doc-{blake2b(told, digest_size=12).hexdigest()}"


def content_of(document: Document, text: str) -> bytes:
    """A document's file."""
    told = {name: value for name, value in asdict(document).items() if name in _TOLD}
    return json.dumps({**told, "text": text}).encode()


def read_document(file: Path) -> Document | None:
    """What a file says of its document; None where it is none, or damaged."""
    try:
        content = file.read_bytes()
        told = json.loads(content)
        text = told.pop("text")
        document = Document(**{name: told[name] for name in _TOLD}, size=len(content))
        is_whole = id_of(text, document.suffix) == document.id == file.stem
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return document if is_whole else None
