"""A demo on its page in a real Chromium: it loads, a drag moves the state, a button works, nobody else can open it."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest

pytest.importorskip("tornado", reason="the extra [browser] is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")

# The demo as it is run, with a page more: its state as JSON, for the test to see.
PROGRAM = """
import json, sys
from demos import cartpole
from demos.cartpole import CartPoleDemo, Settings
from demos.views import run

class Watched(CartPoleDemo):
    def draw(self):
        super().draw()
        with open(sys.argv[1] + ".new", "w") as file:
            json.dump({"x": float(self.simulation.state[0]), "held": self.hand is not None, "paused": self.paused,
                       "flow": self.flow, "middle": self.middle}, file)
        import os
        os.replace(sys.argv[1] + ".new", sys.argv[1])

sys.exit(run("cartpole", "Watched.", Watched, Settings, sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The cart-pole on a page, in a browser; gives (page, function that reads the demo's state, port)."""
    file = tmp_path_factory.mktemp("browser") / "state.json"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-c", PROGRAM, str(file), "--browser", "--port", str(port)]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = program.stdout.readline()
        assert line.startswith("Open http://127.0.0.1:"), line
        with playwright.sync_playwright() as driver:
            options = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
            browser = driver.chromium.launch(executable_path=CHROMIUM, args=options)
            opened = browser.new_page(viewport={"width": 1200, "height": 800})
            opened.goto(line.split()[1])
            opened.wait_for_selector("canvas", timeout=30000)
            yield opened, lambda: json.loads(file.read_text()), port
            browser.close()
    finally:
        program.terminate()
        program.wait(30)


def wait_until(holds, seconds=20.0):
    """Wait until something holds; fails if it does not."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def place(page, x, y):
    """Where a place of the figure, in parts of it from its lower left, is on the page."""
    box = page.locator("canvas").first.bounding_box()
    return box["x"] + x * box["width"], box["y"] + (1.0 - y) * box["height"]


def count_colours(page):
    """Colours on the canvas."""
    return page.evaluate(
        """() => { const c = document.querySelector('canvas');
        const d = new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer);
        return new Set(d).size }"""
    )


def test_the_page_shows_the_demo(page):
    opened, read, _ = page
    wait_until(lambda: count_colours(opened) > 20)
    assert opened.title()


def test_a_drag_moves_the_cart(page):
    opened, read, _ = page
    wait_until(lambda: "x" in read())
    # let it rest first: controller off, poles hanging
    opened.mouse.click(*place(opened, 0.9, 0.145))
    opened.mouse.click(*place(opened, 0.9, 0.275))
    wait_until(lambda: abs(read()["x"] - read()["middle"]) < 0.1)
    before = read()["x"]
    # the middle of the world: left 0.05, width 0.74; bottom 0.4, height 0.54; the cart is in its middle
    opened.mouse.move(*place(opened, 0.42, 0.67))
    opened.mouse.down()
    wait_until(lambda: read()["held"])
    opened.mouse.move(*place(opened, 0.55, 0.67), steps=8)
    wait_until(lambda: read()["x"] > before + 0.5)
    opened.mouse.up()
    wait_until(lambda: not read()["held"])


def test_buttons_work(page):
    opened, read, _ = page
    assert not read()["paused"]
    opened.mouse.click(*place(opened, 0.9, 0.08))
    wait_until(lambda: read()["paused"])
    opened.mouse.click(*place(opened, 0.9, 0.08))
    wait_until(lambda: not read()["paused"])


def test_only_this_machine_can_open_it(page):
    """The server is bound to 127.0.0.1, so another address of this machine does not answer."""
    _, _, port = page
    with socket.create_connection(("127.0.0.1", port), 5):
        pass
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", port), 5)
