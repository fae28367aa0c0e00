"""Headless Chromium for tests, driven over its debugging pipe: no package, no port."""

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time

import support

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NEEDED = "no Chromium here: apt-get install chromium"


class Browser:
    """One page of a browser.

    Attributes:
      errors: what its console reported as an error, and exceptions of scripts.
    """

    def __init__(self, send, receive):
        self._send, self._receive, self._number, self.errors = send, receive, 0, []
        self._session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        """The result of a command of the DevTools protocol."""
        self._number += 1
        message = dict(id=self._number, method=method, params=params)
        self._send(message | ({"sessionId": self._session} if self._session else {}))
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._note(answer)

    def _note(self, event):
        method, params = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"]))
        if method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.errors.append(str(params["args"]))
        if method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"] + params["entry"].get("url", ""))
        if method == "Network.requestWillBeSent" and not params["request"]["url"].startswith(("file:", "data:")):
            self.errors.append("request " + params["request"]["url"])

    def js(self, expression):
        """The value of an expression in the page; promises are awaited."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def open(self, path, width=900, height=900, scheme="light"):
        """Load a file at a window size, in `light` or `dark`, and wait for its charts."""
        self.resize(width, height, scheme)
        self.call("Page.navigate", url=f"file://{path}")
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")

    def resize(self, width, height=900, scheme="light"):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def wait(self, condition, seconds=60):
        deadline = time.monotonic() + seconds
        while not self.js(condition):
            assert time.monotonic() < deadline, (condition, self.errors)
            time.sleep(0.02)

    def key(self, name, code=None, shift=False):
        """Press a key: Tab, Enter, Space."""
        text = {"Enter": "\r", "Space": " "}.get(name)
        codes = {"Tab": 9, "Enter": 13, "Space": 32}
        event = dict(key=" " if name == "Space" else name, code=name, windowsVirtualKeyCode=codes[name])
        event |= dict(modifiers=8 if shift else 0)
        self.call("Input.dispatchKeyEvent", type="keyDown", **event, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def screenshot(self, path, whole=True):
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        with open(path, "wb") as file:
            file.write(base64.b64decode(picture))


def _group_exists(group):
    try:
        os.killpg(group, 0)
        return True
    except ProcessLookupError:
        return False


@contextlib.contextmanager
def browser():
    """A Browser for the block."""
    to_read, to_write = os.pipe(), os.pipe()  # commands, answers
    # A child of the browser may write to its profile until it has ended; a file that is left is no failure of a test.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:

        def connect():  # Chromium reads commands from descriptor 3 and writes answers to 4
            ends = os.dup(to_read[0]), os.dup(to_write[1])
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        command = [PROGRAM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += ["--disable-background-networking", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        process = subprocess.Popen(
            [*command, "about:blank"],
            preexec_fn=connect,
            start_new_session=True,
            close_fds=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read[0])
        os.close(to_write[1])
        buffer = bytearray()

        def receive():
            while b"\0" not in buffer:
                block = os.read(to_write[0], 1 << 20)
                assert block, f"the browser ended with status {process.poll()}"
                buffer.extend(block)
            message, _, rest = bytes(buffer).partition(b"\0")
            buffer[:] = rest
            return json.loads(message)

        try:
            yield Browser(lambda message: os.write(to_read[1], json.dumps(message).encode() + b"\0"), receive)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            support.wait_until(lambda: not _group_exists(process.pid), seconds=30)
            os.close(to_read[1])
            os.close(to_write[0])
