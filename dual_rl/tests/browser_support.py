"""Headless Chromium in tests, driven by the DevTools protocol over pipes: no driver, no WebSocket."""

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from serving_support import wait_for

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe")
CONTROL, KEY_CODES = 2, {"Enter": 13}


class Browser:
    """One page in a browser of its own, whose profile lies in `folder`. Close it, or use it as a context manager."""

    def __init__(self, folder: Path, *, width: int = 1100, height: int = 900) -> None:
        (from_us, self.commands), (self.replies, to_us) = os.pipe(), os.pipe()
        # The browser reads commands from descriptor 3 and writes replies to 4.
        shell = ["bash", "-c", f'exec "$@" 3<&{from_us} 4>&{to_us}', "bash", CHROMIUM]
        flags = [*FLAGS, f"--user-data-dir={folder}", f"--window-size={width},{height}", "about:blank"]
        with open(folder / "log", "w") as log:
            self.process = subprocess.Popen([*shell, *flags], stdout=log, stderr=log, pass_fds=[from_us, to_us])
        os.close(from_us)
        os.close(to_us)
        self.number, self.unread, self.session = 0, b"", None
        (page,) = self.command("Target.getTargets", filter=[{"type": "page"}])["targetInfos"]
        attached = self.command("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self.session = attached["sessionId"]

    def command(self, method: str, **params: object) -> dict[str, Any]:
        """The result of a command; events on the way are dropped."""
        self.number += 1
        session = {"sessionId": self.session} if self.session else {}
        command = {"id": self.number, "method": method, "params": params, **session}
        os.write(self.commands, json.dumps(command).encode() + b"\0")
        while True:
            while b"\0" not in self.unread:
                read = os.read(self.replies, 1 << 20)
                assert read, "the browser has ended"
                self.unread += read
            message, _, self.unread = self.unread.partition(b"\0")
            reply = json.loads(message)
            if reply.get("id") == self.number:
                assert "error" not in reply, reply
                return reply["result"]

    def run(self, script: str) -> Any:
        """The value of an expression in the page, awaited."""
        reply = self.command("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def open(self, url: str) -> None:
        self.command("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete'")

    def wait_for(self, condition: str) -> None:
        wait_for(lambda: self.run(condition), condition)

    def text(self, selector: str) -> str:
        return self.run(f"document.querySelector({json.dumps(selector)}).innerText")

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.command("Input.insertText", text=text)

    def press(self, key: str, modifiers: int = 0, *, selector: str | None = None) -> None:
        """A key of KEY_CODES, in an element or in what has the focus."""
        if selector:
            self.run(f"document.querySelector({json.dumps(selector)}).focus()")
        for kind in ("keyDown", "keyUp"):
            keys = {"key": key, "windowsVirtualKeyCode": KEY_CODES[key], "text": "\r" if kind == "keyDown" else ""}
            self.command("Input.dispatchKeyEvent", type=kind, modifiers=modifiers, **keys)

    def drop(self, selector: str, files: Sequence[Path]) -> None:
        """Drag files from the desktop onto an element."""
        script = f"(({{x, y}}) => [x + 20, y + 20])(document.querySelector('{selector}').getBoundingClientRect())"
        x, y = self.run(script)
        data = {"items": [], "files": list(map(str, files)), "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.command("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.commands)
        self.process.kill()
        self.process.wait()
        os.close(self.replies)
