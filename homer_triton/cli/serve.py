"""`homer serve`: the model over HTTP, for OpenAI's clients and for browsers."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from .answers import Answers
from .groups import with_groups
from .help import SERVER
from .inputs import note_long_chunks, takes_template
from .options import Checkpoint, Json, NoChatTemplate, Thinking
from .output import note, print_json
from .settings import Settings

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How a server is reached, and its limits."""

    panel = SERVER

    host: Annotated[
        str,
        typer.Option(
            "--host",
            metavar="NAME",
            help="The address to listen at. 0.0.0.0 means all networks; set --api-key then.",
        ),
    ] = "127.0.0.1"
    port: Annotated[
        int,
        typer.Option(
            "--port",
            metavar="N",
            min=0,
            max=65535,
            help="The port to listen at. 0 takes any free one.",
        ),
    ] = 8000
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            metavar="NAME",
            help="The model's name for clients.",
            show_default="the hub id, or the folder's name",
        ),
    ] = None
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            metavar="KEY",
            envvar="HOMER_API_KEY",
            help="Refuse requests without this key.",
            show_default="none, everybody who reaches the port may ask",
        ),
    ] = None
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-origin",
            metavar="URL",
            help="A page elsewhere that may ask, such as https://chat.example. Repeat it for more. "
            "Also needed behind a proxy: the address that its users see.",
            show_default="none but the server's own page",
        ),
    ] = None
    documents: Annotated[
        Path | None,
        typer.Option(
            "--documents",
            metavar="FOLDER",
            help="The folder for documents and their encodings.",
            show_default="homer_triton/documents in the user's cache folder",
        ),
    ] = None
    documents_size: Annotated[
        str,
        typer.Option(
            "--documents-size",
            metavar="SIZE",
            help="The most disk space for documents and encodings. Beyond it, those used longest "
            "ago are deleted.",
        ),
    ] = "10GiB"
    at_hand: Annotated[
        str,
        typer.Option(
            "--at-hand",
            metavar="SIZE",
            help="The most memory for encodings on the model's device. They are asked without "
            "reading a file.",
        ),
    ] = "1GiB"
    running: Annotated[
        int,
        typer.Option(
            "--running", metavar="N", min=1, help="The most answers that are generated at once."
        ),
    ] = 16
    waiting: Annotated[
        int,
        typer.Option(
            "--waiting",
            metavar="N",
            min=1,
            help="The most requests in the queue. Further ones get HTTP status 429.",
        ),
    ] = 256
    body_size: Annotated[
        str,
        typer.Option(
            "--body-size",
            metavar="SIZE",
            help="The largest request body, and so the largest document.",
        ),
    ] = "32MiB"


@with_groups
def serve(
    *,
    checkpoint: Checkpoint,
    serving: Serving,
    no_chat_template: NoChatTemplate = False,
    thinking: Thinking = None,
    wanted: Answers,
    as_json: Json = False,
    settings: Settings,
) -> None:
    """Serve a model over HTTP, with OpenAI's API and a web page.

    A conversation longer than the model's context limit is read by HOMER; clients need not do
    anything for this. A document is sent once and stays on disk. It is read for the first question
    of each conversation, and the encoding is kept for later turns and equal questions.
    --max-new-tokens (up to a quarter of the context limit) and the options under "Answer" are
    defaults for requests. Ctrl-C stops the server.

    Needs: pip install 'homer_triton[serve]'.

    \b
    Example:
      homer serve --model HuggingFaceTB/SmolLM2-1.7B-Instruct
      curl http://127.0.0.1:8000/v1/documents \\
          -H "Content-Type: text/plain" --data-binary @book.txt
    """
    from ..config import parse_bytes
    from ..extras import require

    for package in _PACKAGES:
        require(package, "`homer serve`", "serve")
    from ..serving.app import make_app
    from ..serving.engine import Engine
    from ..serving.guard import LOCAL
    from ..serving.memory import Memory
    from ..serving.server import Server, bind
    from ..serving.service import Service
    from ..serving.sources import Sources
    from ..serving.store import Store

    config, defaults = settings.config, wanted.decoding
    disk, hand, body = map(
        parse_bytes, (serving.documents_size, serving.at_hand, serving.body_size)
    )
    folder = serving.documents or _cache() / "homer_triton" / "documents"
    if serving.api_key is not None and not serving.api_key.isascii():
        raise ValueError("--api-key must be of ASCII characters, because HTTP headers are.")
    origins = [check_origin(origin) for origin in serving.allow_origin or ()]
    listening = bind(serving.host, serving.port)
    model, tokenizer = checkpoint.open()
    note_long_chunks(config, model.config)
    templated = takes_template(tokenizer, not no_chat_template, thinking)
    fingerprint = model.fingerprint
    store = Store(folder, fingerprint, disk)
    memory = Memory(hand)
    sources = Sources(model, config, templated, thinking, store, memory)
    sources.check()
    engine = Engine(model, config, serving.running, serving.waiting, memory)
    name = serving.name or _name(checkpoint.model)
    service = Service(name, fingerprint, engine, sources, store, defaults)
    app = make_app(service, serving.api_key, body, serving.host in LOCAL, origins)
    host, port = listening.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    if as_json:
        print_json({"url": url, "model": name, "fingerprint": fingerprint})
    note(f"Serving {name} at {url}. Press Ctrl-C to stop.")
    Server(app, service).run(sockets=[listening])


def check_origin(origin: str) -> str:
    """An origin as browsers send it. Raises `ValueError` for anything else."""
    found = re.fullmatch(r"(https?://[^/\s?#@*]+)/?", origin)
    if found is None:
        raise ValueError(
            f"--allow-origin {origin} is no origin; give scheme and name, such as "
            "https://chat.example."
        )
    return found[1]


def _cache() -> Path:
    """The user's cache folder (XDG)."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return Path(given) if os.path.isabs(given) else Path.home() / ".cache"


def _name(path_or_id: str) -> str:
    """The default name of a model: its hub id, or the name of its folder without the private path
    to it.
    """
    path = Path(path_or_id).expanduser()
    return path.resolve().name if path.is_dir() else path_or_id
