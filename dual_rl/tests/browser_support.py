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
CONTROL, ENTER = 2, {"key": "Enter", "windowsVirtualKeyCode": 13}


class Browser:
    """One page in a browser of its own, whose profile lies in `folder`."""

    def __init__(self, folder: Path) -> None:
        (commands, self.commands), (self.replies, replies) = os.pipe(), os.pipe()
        shell = ["bash", "-c", f'exec "$@" 3<&{commands} 4>&{replies}', "bash", CHROMIUM, *FLAGS]
        arguments, output = [f"--user-data-dir={folder}", "about:blank"], {"stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([*shell, *arguments], pass_fds=[commands, replies], **output)
        os.close(commands)
        os.close(replies)
        self.number, self.unread, self.session = 0, b"", {}
        (page,) = self.command("Target.getTargets", filter=[{"type": "page"}])["targetInfos"]
        attached = self.command("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self.session = {"sessionId": attached["sessionId"]}

    def command(self, method: str, **params: object) -> dict[str, Any]:
        """The result of a command; events on the way are dropped."""
        self.number += 1
        command = {"id": self.number, "method": method, "params": params, **self.session}
        os.write(self.commands, json.dumps(command).encode() + b"\0")
        while True:
            message, end, rest = self.unread.partition(b"\0")
            if not end:
                self.unread += os.read(self.replies, 1 << 20)
                assert self.unread != message, "the browser has ended"
                continue
            self.unread = rest
            if (reply := json.loads(message)).get("id") == self.number:
                return reply["result"]

    def run(self, script: str) -> Any:
        """The value of an expression in the page; None where it raises, as while the page loads."""
        return self.command("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def wait_for(self, condition: str) -> None:
        wait_for(lambda: self.run(condition), condition)

    def text(self, selector: str) -> str:
        return self.run(f"document.querySelector({json.dumps(selector)}).innerText")

    def enter(self, text: str, modifiers: int = 0) -> None:
        """Type into what has the focus, then press Enter."""
        self.command("Input.insertText", text=text)
        for kind, sent in (("keyDown", "\r"), ("keyUp", "")):
            self.command("Input.dispatchKeyEvent", type=kind, text=sent, modifiers=modifiers, **ENTER)

    def drop(self, selector: str, files: Sequence[Path]) -> None:
        """Drag files from the desktop onto an element."""
        box = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
        data = {"items": [], "files": list(map(str, files)), "dragOperationsMask": 1}
        place = {"x": self.run(f"{box}.x") + 20, "y": self.run(f"{box}.y") + 20}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.command("Input.dispatchDragEvent", type=kind, data=data, **place)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.commands)
        os.close(self.replies)
