"""The server process: its socket, and an end that loses no answer."""

from __future__ import annotations

import socket

import uvicorn
from fastapi import FastAPI

from .service import Service


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 is any free one. Raises `ValueError` where there is none."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(1024)
    except (OSError, UnicodeError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"Cannot listen at {host}, port {port}: {reason}.") from None
    return listening


class Server(uvicorn.Server):
    """On Ctrl-C and SIGTERM, answers that are coming end, and requests that wait are refused; the
    second time, it ends at once.
    """

    def __init__(self, app: FastAPI, service: Service) -> None:
        settings = uvicorn.Config(
            app, access_log=False, log_level="warning", server_header=False, date_header=False
        )
        super().__init__(settings)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """What uvicorn does first once it is to end."""
        self._service.engine.drain()
        await super().shutdown(sockets)
