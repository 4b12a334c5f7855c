"""A page in a real headless Chromium, driven through its debugging pipe."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


class Browser:
    """One page of one size; `run` evaluates JavaScript in it and waits for promises."""

    def __init__(self, url: str, width: int = 1200, height: int = 900) -> None:
        self._profile = TemporaryDirectory(ignore_cleanup_errors=True)
        # Chromium reads messages from its file descriptor 3 and answers on 4.
        (in_read, in_write), (out_read, out_write) = os.pipe(), os.pipe()
        command = [
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--remote-debugging-pipe",
            f"--user-data-dir={self._profile.name}",
            f"--window-size={width},{height}",
        ]
        # The shell puts the pipes where Chromium expects them, whatever their numbers are here.
        line = f'exec "$@" 3<&{in_read} 4>&{out_write}'
        self._process = subprocess.Popen(
            ["bash", "-c", line, "bash", *command],
            pass_fds=(in_read, out_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(in_read)
        os.close(out_write)
        self._requests = os.fdopen(in_write, "wb", buffering=0)
        self._answers = os.fdopen(out_read, "rb")
        self._count = 0
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        self.call("Page.navigate", url=url)
        self.run(
            "new Promise(done => { const look = () => document.body?.dataset.ready"
            " ? done() : setTimeout(look, 20); look(); })"
        )

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._requests.close()
        self._answers.close()
        self._profile.cleanup()

    def run(self, script: str) -> Any:
        """The value of an expression in the page. Raises `RuntimeError` for one that throws."""
        result = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in result:
            raise RuntimeError(json.dumps(result["exceptionDetails"]))
        return result["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """Write what the window shows as a PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._requests.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = json.loads(self._read())
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(json.dumps(answer["error"]))
                return answer["result"]

    def _read(self) -> bytes:
        """The next message, up to its closing zero byte."""
        message = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("Chromium ended.")
            message += byte
        return bytes(message)
