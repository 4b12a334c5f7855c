"""Documents on disk, with the encodings that were made of them: under a bound, those used longest
ago go. They are all there again after a restart, or a kill at any moment.

A document is `ID.json`, an encoding of it `ID-KEY.safetensors`; each is renamed into place when it
is whole. A folder belongs to one model.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from threading import RLock

from ..context import EncodedContext
from ..storage.files import sweep, write_atomically
from .records import (
    DiskError,
    Document,
    NoDocumentError,
    TooLargeError,
    content_of,
    id_of,
    read_document,
)


class Store:
    """A folder of documents; any thread may use it.

    folder: made if it is not there; fingerprint: of the model that all encodings are of;
    most_bytes: what all files may take together.
    """

    def __init__(self, folder: Path, fingerprint: str, most_bytes: int) -> None:
        """Raises `ValueError` for a folder that cannot be used, or that another server uses."""
        self._folder, self._fingerprint, self._most = folder / fingerprint, fingerprint, most_bytes
        self._lock = RLock()
        self._documents: dict[str, Document] = {}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._held = (self._folder / "lock").open("ab")
        except OSError as error:
            raise ValueError(f"Cannot use {folder} for documents: {error.strerror}.") from error
        try:
            flock(self._held, LOCK_EX | LOCK_NB)
        except OSError:
            raise ValueError(
                f"Another server keeps this model's documents in {folder}; give another folder."
            ) from None
        self._look()

    def close(self) -> None:
        """Let another server have the folder."""
        self._held.close()

    def documents(self) -> list[Document]:
        """All documents, the newest first."""
        with self._lock:
            return sorted(self._documents.values(), key=lambda x: x.created, reverse=True)

    @property
    def bytes(self) -> int:
        """What all documents take on disk."""
        with self._lock:
            return sum(document.bytes for document in self._documents.values())

    def find(self, document: str) -> Document | None:
        """A document, if it is there."""
        with self._lock:
            return self._documents.get(document)

    def get(self, document: str) -> Document:
        """Raises `NoDocumentError`."""
        found = self.find(document)
        if found is None:
            raise NoDocumentError(document)
        return found

    def text(self, document: str) -> str:
        """A document's text. Raises `NoDocumentError`."""
        self.get(document)
        try:
            return str(json.loads(self._file(document).read_bytes())["text"])
        except OSError:
            raise NoDocumentError(document) from None

    def add(
        self, text: str, title: str, suffix: str | None, key: str, encoded: EncodedContext
    ) -> Document:
        """Keep a text and the encoding that was made of it.

        Raises `TooLargeError` and `DiskError`.
        """
        document = Document(
            *(id_of(text, suffix), title, suffix, int(time.time()), len(text)),
            encoded.stats.to_dict(),
        )
        content = content_of(document, text)
        encoding = self._encoding(document.id, key)
        _save(encoded, encoding)
        if len(content) + encoding.stat().st_size > self._most:
            encoding.unlink(missing_ok=True)
            raise TooLargeError
        with self._lock:
            if document.id not in self._documents:
                try:
                    file = self._file(document.id)
                    write_atomically(file, lambda target: target.write_bytes(content))
                except ValueError as error:
                    raise DiskError(str(error)) from error
                document.size = len(content)
                self._documents[document.id] = document
            self._count(document.id, key)
            self._make_room((document.id, key))
            return self._documents[document.id]

    def keep(self, document: str, key: str, encoded: EncodedContext) -> None:
        """Keep another encoding of a document, if that is still there. Raises `DiskError`."""
        if document not in self._documents:
            return
        file = self._encoding(document, key)
        _save(encoded, file)
        with self._lock:
            if document not in self._documents:
                file.unlink(missing_ok=True)
                return
            self._count(document, key)
            self._make_room((document, key))

    def load(self, document: str, key: str) -> EncodedContext | None:
        """An encoding that was kept, on the CPU; None where there is none, or it is damaged.

        Raises `NoDocumentError`.
        """
        if key not in self.get(document).encodings:
            return None
        try:
            encoded = EncodedContext.load(self._encoding(document, key))
            encoded.check_maker(self._fingerprint)
        except (ValueError, FileNotFoundError):
            with self._lock:
                self._drop(document, key)
            return None
        self.touch(document, key)
        return encoded

    def touch(self, document: str, key: str) -> None:
        """Say that an encoding has been used."""
        with self._lock, suppress(OSError):
            kept = self.get(document).encodings
            if key in kept:
                kept[key] = kept[key][0], time.time()
                os.utime(self._encoding(document, key))

    def remove(self, document: str) -> list[str]:
        """Remove a document with all its encodings, whose keys are returned.

        Raises `NoDocumentError`.
        """
        with self._lock:
            keys = list(self.get(document).encodings)
            del self._documents[document]
            # Without it, a kill leaves what the next start removes.
            self._file(document).unlink(missing_ok=True)
            for key in keys:
                self._encoding(document, key).unlink(missing_ok=True)
            return keys

    def _look(self) -> None:
        """Find what is there, and remove what belongs to nothing."""
        sweep(self._folder)
        for file in self._folder.glob("*.json"):
            document = read_document(file)
            if document is None:
                file.unlink()
            else:
                self._documents[document.id] = document
        for file in self._folder.glob("*.safetensors"):
            document_id, _, key = file.stem.rpartition("-")
            if document_id in self._documents:
                found = file.stat()
                kept = self._documents[document_id].encodings
                kept[key] = found.st_size, found.st_mtime
            else:
                file.unlink()
        self._make_room(None)

    def _count(self, document: str, key: str) -> None:
        size = self._encoding(document, key).stat().st_size
        self._documents[document].encodings[key] = size, time.time()

    def _make_room(self, newest: tuple[str, str] | None) -> None:
        """Let go what was used longest ago, the newest last; a document goes with its last
        encoding.
        """
        while self.bytes > self._most:
            used = [
                ((document.id, key) == newest, when, document.id, key)
                for document in self._documents.values()
                for key, (_, when) in document.encodings.items()
            ]
            bare = [x.id for x in self._documents.values() if not x.encodings]
            if bare:
                self.remove(bare[0])
                continue
            _, _, document_id, key = min(used)
            self._drop(document_id, key)
            if not self._documents[document_id].encodings:
                self.remove(document_id)

    def _drop(self, document: str, key: str) -> None:
        self._documents[document].encodings.pop(key, None)
        self._encoding(document, key).unlink(missing_ok=True)

    def _file(self, document: str) -> Path:
        return self._folder / f"{document}.json"

    def _encoding(self, document: str, key: str) -> Path:
        return self._folder / f"{document}-{key}.safetensors"


def _save(encoded: EncodedContext, file: Path) -> None:
    try:
        encoded.save(file)
    except ValueError as error:
        raise DiskError(str(error)) from error
