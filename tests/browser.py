"""A real browser for tests: Chromium without a window, driven over its own pipe, with nothing else installed.

The protocol is that of the developer tools (https://chromedevtools.github.io/devtools-protocol/): JSON messages, each
ended by a zero byte, written to the browser's file descriptor 3 and read from its 4.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_PATIENCE = 60.0  # seconds that one step of a page may take on a busy machine


_STARTER = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def _moved(end: int, at: int) -> int:
    high = fcntl.fcntl(end, fcntl.F_DUPFD, at)
    os.close(end)
    return high


class Browser:
    """One page of a browser that reaches no network.

    Attributes:
        problems: what the page wrote to its console as warning or error, and every exception.
        asked: the addresses that the page asked for.
    """

    def __init__(self, profile: Path, width: int = 1200, height: int = 900, dark: bool = False):
        down, self._out = os.pipe()
        self._in, up = os.pipe()
        # The browser wants its pipe on 3 and 4. A process between puts it there, from numbers that are out of the way.
        down, up = (_moved(end, at) for end, at in ((down, 60), (up, 70)))
        options = [
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--mute-audio",
            "--remote-debugging-pipe", f"--user-data-dir={profile}", "--host-resolver-rules=MAP * ~NOTFOUND",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-c", _STARTER, str(down), str(up), CHROMIUM, *options, "about:blank"],
            pass_fds=(down, up), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(down)
        os.close(up)
        self.problems: list[str] = []
        self.asked: list[str] = []
        self._count, self._rest, self._session = 0, b"", None
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        self.resize(width, height)
        self.scheme("dark" if dark else "light")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *error: object) -> None:
        self._session = None
        self._process.terminate()
        self._process.wait(20)
        os.close(self._in)
        os.close(self._out)

    def scheme(self, which: str) -> None:
        """The reader's setting, light or dark."""
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": which}])

    def resize(self, width: int, height: int) -> None:
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def open(self, address: str) -> None:
        """Opens a page and waits until its figures are drawn."""
        self._call("Page.navigate", url=address)
        self.until("document.readyState === 'complete'")
        self.settle()

    def settle(self) -> None:
        """Waits until everything that the shown part of the page draws is drawn."""
        self.until(
            "[...document.querySelectorAll('[data-figure]')].every((f) => !f.offsetParent || f.querySelector('svg'))"
        )

    def run(self, code: str) -> Any:
        """The value of an expression in the page."""
        answer = self._call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, condition: str) -> None:
        """Waits until an expression is true in the page."""
        look = f"const look = () => ({condition}) ? done(true) : setTimeout(look, 20);"
        assert self.run(f"new Promise((done) => {{ {look} look(); }})")

    def hover(self, x: float, y: float) -> None:
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x - 3, y=y)
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, x: float, y: float) -> None:
        self.hover(x, y)
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def middle(self, selector: str, index: int = 0) -> tuple[float, float]:
        """Where an element is, after it has been scrolled to."""
        return tuple(self.run(
            f"(() => {{ const e = document.querySelectorAll({json.dumps(selector)})[{index}];"
            "e.scrollIntoView({block: 'center', behavior: 'instant'}); const r = e.getClientRects()[0];"
            "return [r.left + r.width / 2, r.top + r.height / 2]; })()"
        ))  # fmt: skip

    def press(self, key: str) -> None:
        """A key of the keyboard, such as ArrowLeft or Enter."""
        number, text = {"ArrowLeft": (37, ""), "ArrowRight": (39, ""), "Enter": (13, "\r")}[key]
        given = {"key": key, "code": key, "windowsVirtualKeyCode": number}
        self._call("Input.dispatchKeyEvent", type="keyDown", **given, **({"text": text} if text else {}))
        self._call("Input.dispatchKeyEvent", type="keyUp", **given)

    def type(self, text: str) -> None:
        self._call("Input.insertText", text=text)

    def shoot(self, path: Path, whole: bool = False) -> None:
        """A picture of what is shown, or of the whole page."""
        if whole:
            height = self.run("document.documentElement.scrollHeight")
            self.resize(self.run("innerWidth"), height)
            self.settle()
        Path(path).write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + _PATIENCE
        while True:
            answer = self._read(until)
            if answer.get("id") == self._count:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._heard(answer.get("method"), answer.get("params", {}))

    def _read(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(0.0, until - time.monotonic()))
            assert ready, "the browser did not answer"
            part = os.read(self._in, 1 << 20)
            assert part, "the browser has gone"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def _heard(self, method: str | None, said: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.problems.append(str(said["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"):
            self.problems.append(str(said["args"]))
        elif method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            self.problems.append(str(said["entry"]))
        elif method == "Network.requestWillBeSent":
            self.asked.append(said["request"]["url"][:200])
