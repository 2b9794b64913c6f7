"""A page in headless Chromium, driven over a pipe by its DevTools protocol."""

import base64
import json
import os
import shutil
import subprocess

CHROMIUM = shutil.which("chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1200,1600",
         "--remote-debugging-pipe"]


class Browser:
    """A browser with one tab. Use it with `with`; downloads go to the folder `profile`."""

    def __init__(self, profile):
        ours, theirs = os.pipe(), os.pipe()  # commands to it, answers from it
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{ours[0]} 4>&{theirs[1]}', "-", CHROMIUM, *FLAGS,
             f"--user-data-dir={profile}"], pass_fds=(ours[0], theirs[1]),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(ours[0])
        os.close(theirs[1])
        self.commands, self.answers = open(ours[1], "wb"), open(theirs[0], "rb")
        self.number, self.session, self.received, self.events = 0, {}, b"", []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self.ask("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(profile),
                 eventsEnabled=True)
        self.session = {"sessionId": attached["sessionId"]}
        self.ask("Page.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.commands.close()
        self.answers.close()

    def ask(self, method, **params):
        """Result of a command of the protocol."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params, **self.session}
        self.commands.write(json.dumps(message).encode() + b"\0")
        self.commands.flush()
        while (answer := self.next_message()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def next_message(self):
        while b"\0" not in self.received:
            piece = os.read(self.answers.fileno(), 2**16)
            assert piece, "the browser has ended"
            self.received += piece
        message, self.received = self.received.split(b"\0", 1)
        return json.loads(message)

    def wait_for(self, method, **params):
        """Wait for an event that has these parameters."""
        while True:
            event = self.events.pop(0) if self.events else self.next_message()
            if event.get("method") == method and params.items() <= event["params"].items():
                return

    def open(self, url):
        """Load a page anew, also where only the fragment of its address is another."""
        for address in ("about:blank", url):
            self.load("Page.navigate", url=address)

    def load(self, method, **params):
        self.events.clear()
        self.ask(method, **params)
        self.wait_for("Page.loadEventFired")

    def value(self, expression):
        """Value of a JavaScript expression."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key)

    def click(self, selector):
        """Click with the mouse on what a selector finds first."""
        box = self.value(f"(e => {{ e.scrollIntoView({{block: 'center'}}); "
                         "const r = e.getBoundingClientRect(); "
                         "return [r.x + r.width / 2, r.y + r.height / 2] })"
                         f"(document.querySelector({json.dumps(selector)}))")
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left",
                     clickCount=1)

    def screenshot(self):
        """A PNG of the window."""
        return base64.b64decode(self.ask("Page.captureScreenshot")["data"])
