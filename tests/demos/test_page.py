"""Demos on a page: who may open it, that it shows what the demo is, that what is touched there acts."""

import importlib
import os
import shutil
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from demos.frame import ANYWHERE, Button, Choice, Demo, Slider
from tests.problems import PROBLEMS
from warp_phys.systems.drawing import Ball, Block, Cone, Line, Picture, Rod, Surface, Text

viser = pytest.importorskip("viser", reason="the extra [viewer] is not installed")
from demos import page  # noqa: E402
from tests.demos.test_frame import free_port  # noqa: E402

KINDS = {
    "cartpole": "CartPoleDemo",
    "herd": "HerdDemo",
    "landscape": "LandscapeDemo",
    "quadrotor": "QuadrotorDemo",
    "quantum": "QuantumDemo",
    "race": "RaceDemo",
    "receding": "RecedingDemo",
    "weather": "WeatherDemo",
}


@pytest.fixture(scope="module")
def server():
    """A server for all; gives viser's."""
    with page.open_server("127.0.0.1", free_port(), "test") as opened:
        yield opened


def answer(port, request):
    """Send a request; returns the first line of the answer."""
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall("\r\n".join([*request, "", ""]).encode())
        return connection.makefile("rb").readline().decode()


HANDSHAKE = [
    "Upgrade: websocket",
    "Connection: Upgrade",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Version: 13",
    f"Sec-WebSocket-Protocol: viser-v{viser.__version__}",
]


def test_only_our_own_page_may_speak_to_it(server):
    port = server.get_port()
    own, evil = f"127.0.0.1:{port}", "evil.example"
    for host, origin, status in (
        (own, f"http://{own}", 101),
        (f"localhost:{port}", f"http://localhost:{port}", 101),
        ("localhost:1234", "http://localhost:1234", 101),  # through a tunnel
        (own, None, 101),
        (evil, f"http://{evil}", 403),
        (f"{evil}:{port}", f"http://{evil}:{port}", 403),
        (own, f"http://{evil}", 403),
        (own, "null", 403),
        (own, f"http://127.0.0.1:{port + 1}", 403),
        ("10.1.2.3", "http://10.1.2.3", 403),
    ):
        lines = ["GET / HTTP/1.1", f"Host: {host}", *([f"Origin: {origin}"] if origin else []), *HANDSHAKE]
        assert answer(port, lines).startswith(f"HTTP/1.1 {status} "), (host, origin)
    for host, status in ((own, 200), (evil, 403)):
        assert answer(port, ["GET / HTTP/1.1", f"Host: {host}"]).startswith(f"HTTP/1.1 {status} "), host


def test_only_this_machine_can_open_it(server):
    """It is bound to 127.0.0.1, so another address of this machine does not answer."""
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", server.get_port()), 5)


def test_where_more_machines_are_asked_for_names_are_still_refused():
    assert page.check_request({"Host": "192.168.0.7:8988", "Origin": "http://192.168.0.7:8988"}, "0.0.0.0") is None
    assert page.check_request({"Host": "[::1]:8988"}, "127.0.0.1") is None
    assert page.check_request({"Host": "lab.example", "Origin": "http://lab.example"}, "lab.example") is None
    for headers in ({"Host": "evil.example"}, {"Host": "192.168.0.7", "Origin": "http://evil.example"}, {"Host": "["}):
        assert page.check_request(headers, "0.0.0.0") is not None
    assert page.check_request({}, "127.0.0.1") is not None


class Still(Demo):
    """A picture that does not move."""

    says = "Nothing: look."

    def __init__(self, picture):
        super().__init__()
        self.shown = picture

    def picture(self):
        return self.shown


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: type(problem.system).__name__)
def test_every_system_is_drawn(problem, server):
    """What stands in the scene is where the system says, for one state and then for another."""
    pictures = [problem.system.picture(problem.states(seed)[0], problem.controls(seed)[0]) for seed in (0, 5)]
    stage = page.Stage(server.scene, demo := Still(pictures[0]))
    for picture in pictures:
        demo.shown = picture
        stage.show()
        assert list(stage.nodes) == list(picture.parts)
        for name, shape in picture.parts.items():
            check_node(stage.nodes[name].handle, shape)
    for node in stage.nodes.values():
        node.handle.remove()


def check_node(handle, shape):
    """Hold what viser has against the shape."""
    if isinstance(shape, Line):
        pieces, _ = page.segments(shape)
        assert handle.visible == (len(pieces) > 0)
        np.testing.assert_allclose(handle.points, pieces, rtol=1e-6, atol=1e-6)
        return
    if isinstance(shape, Text):
        assert handle.text == shape.words and tuple(handle.position) == tuple(map(float, shape.place))
        return
    scale, position = np.array(handle.scale), np.array(handle.position)
    if isinstance(shape, Ball | Block):
        wanted = [shape.radius] * 3 if isinstance(shape, Ball) else np.maximum(shape.size, 1e-6)
        np.testing.assert_allclose(scale, wanted)
        np.testing.assert_allclose(position, shape.centre)
        return
    w, x, y, z = handle.wxyz
    axis = np.array([2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)])
    if np.linalg.norm(np.subtract(shape.end, shape.start)) > 1e-6:
        np.testing.assert_allclose(position + 0.5 * scale[2] * axis, shape.end, atol=1e-6)
        np.testing.assert_allclose(position - 0.5 * scale[2] * axis, shape.start, atol=1e-6)
    assert scale[0] == shape.radius


def test_every_kind_of_shape_is_drawn(server):
    """Those that no system uses as well; a part that goes, goes, and one of another kind takes its name."""
    triangle = Surface(np.eye(3), np.array([[0, 1, 2]]), np.eye(3))
    parts = {"a": triangle, "b": Cone((0, 0, 0), (0, 0, -2), 0.5), "c": Rod((0, 0, 0), (1, 2, 3), 0.1)}
    box = {"low": (-1, -1, -1), "high": (1, 1, 1)}
    stage = page.Stage(server.scene, demo := Still(Picture(parts, **box, still=frozenset("a"))))
    check_node(stage.nodes["b"].handle, parts["b"])
    demo.shown = Picture({"b": Ball((0, 0, 0), 1.0)}, **box)
    stage.show()
    assert list(stage.nodes) == ["b"] and stage.nodes["b"].kind is Ball
    stage.nodes["b"].handle.remove()


def test_the_picture_stays_in_its_place(server):
    """A box that moves in the world does not move on the page, and what is pointed at is told in the world."""
    demo = Still(Picture({"a": Ball((0, 0, 0), 1.0)}, (-1, -1, -1), (1, 1, 1)))
    asked, seen = [], []
    demo.grips = lambda: {"a": page.Grip(drag=seen.append, release=lambda: seen.append("let go"), click=seen.append)}
    stage = page.Stage(server.scene, demo, asked.append)
    demo.shown = Picture({"a": Ball((5, 0, 0), 1.0)}, (4, -1, -1), (6, 1, 1))
    stage.show()
    np.testing.assert_allclose(stage.root.position, [-5, 0, 0])
    handle = stage.nodes["a"].handle
    client = SimpleNamespace(camera=SimpleNamespace(position=np.array([0.0, -9.0, 0.0])))
    call(handle._impl.drag_cb[0].callback, client=client, end_position=(1.0, 0.0, 0.0), phase="update")
    call(handle._impl.drag_cb[0].callback, client=client, end_position=(1.0, 0.0, 0.0), phase="end")
    call(handle._impl.click_cb[0].callback, ray_origin=(0.0, -9.0, 0.0), ray_direction=(0.0, 1.0, 0.0))
    for action in asked:
        action()
    np.testing.assert_allclose(seen[0].meet((0, 0, 0), (0, 1, 0)), [6, 0, 0])
    assert seen[1] == "let go"
    np.testing.assert_allclose(seen[2].meet((0, 0, 0), (0, 1, 0)), [5, 0, 0])
    handle.remove()


def call(callback, **event):
    """Run one of viser's asynchronous callbacks."""
    with pytest.raises(StopIteration):
        callback(SimpleNamespace(**event)).send(None)


@pytest.mark.parametrize(("aspect", "seen"), [(390 / 844, 1.0), (390 / 844, 0.4), (1400 / 900, 1.0)])
def test_the_camera_sees_the_whole_box(aspect, seen):
    picture = Picture({}, (-2, -1, 0), (3, 4, 1))
    place, target = page.look_at(picture, 0.7, aspect, seen)
    ahead = (target - place) / np.linalg.norm(target - place)
    right = np.cross(ahead, [0, 0, 1]) / np.linalg.norm(np.cross(ahead, [0, 0, 1]))
    offsets = page.corners(picture) - place
    depth = offsets @ ahead
    x = offsets @ right / depth / (np.tan(0.35) * aspect)
    y = offsets @ np.cross(right, ahead) / depth / np.tan(0.35)
    assert (np.abs(x) < 1.001).all() and y.max() < 1.001 and y.min() > 1.0 - 2.0 * seen - 0.001
    assert max(np.abs(x).max(), y.max()) > 0.8, "and not much more than the box"


@pytest.mark.parametrize("name", KINDS)
def test_every_demo_on_its_page(name, monkeypatch):
    """It starts, answers, says what to do, moves, and every control acts; the first one does so visibly."""
    module = importlib.import_module(f"demos.{name}")
    kind = getattr(module, KINDS[name])
    assert 20 < len(kind.says) < 240 and (":" in kind.says)
    with page.open_server("127.0.0.1", free_port(), name) as opened:
        monkeypatch.setattr(opened, "get_clients", lambda: {0: None})
        settings = module.Settings(poles=1, epochs=3) if name == "race" else module.Settings()
        demo = kind(settings)
        try:
            shown = page.Page(opened, demo)
            port = opened.get_port()
            assert answer(port, ["GET / HTTP/1.1", f"Host: 127.0.0.1:{port}"]).startswith("HTTP/1.1 200 ")
            shown.tick()
            time.sleep(0.05)
            shown.tick()
            assert set(shown.stage.nodes) == set(demo.picture().parts)
            assert set(demo.grips()) - {ANYWHERE} <= set(shown.stage.nodes)
            assert shown.words.content == demo.words() or shown.words.content.strip()
            for plot, handle in shown.curves:
                assert len(handle.data) == 1 + len(plot.names)
                # uPlot writes small numbers as 0, so the marks of an axis of powers of ten are ours
                assert not plot.log or handle.axes[1]["values"] == [f"{power:g}" for power in handle.axes[1]["splits"]]
            for control in demo.controls():
                if isinstance(control, Button):
                    control.press()
                elif isinstance(control, Choice):
                    control.choose(control.options[-1])
                    assert control.read() == control.options[-1]
                else:
                    assert isinstance(control, Slider)
                    control.move(control.least)
                    assert control.read() == pytest.approx(control.least)
                shown.due = dict.fromkeys(shown.due, 0.0)
                shown.tick()
            for control, handle in shown.inputs:
                if not isinstance(control, Button):
                    assert handle.value == control.read()
            assert set(shown.stage.nodes) == set(demo.picture().parts)
        finally:
            demo.close()


def test_a_recording_needs_no_server(tmp_path):
    from demos import cartpole

    file = tmp_path / "a.html"
    assert cartpole.main(["--save", str(file), "--seconds", "0.4", "--rate", "10"]) == 0
    text = file.read_text()
    assert "__VISER_EMBED_DATA__" in text and file.stat().st_size < 1_500_000


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")
def test_in_a_browser(tmp_path):
    """The page loads, a click on a button and a drag of the cart reach the demo."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    file, port = tmp_path / "state", free_port()
    program = (
        "import sys; from demos import cartpole\n"
        "class Watched(cartpole.CartPoleDemo):\n"
        "    def advance(self, dt):\n"
        "        super().advance(dt); open(sys.argv[1], 'w').write(f'{self.paused} {self.steering} {self.hand}')\n"
        "    def pause(self):\n"
        "        super().pause(); open(sys.argv[1], 'w').write(f'{self.paused} {self.steering} {self.hand}')\n"
        "cartpole.CartPoleDemo = Watched; sys.exit(cartpole.main(sys.argv[2:]))"
    )
    command = [sys.executable, "-c", program, str(file), "--no-open", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline().startswith("Open http://127.0.0.1:")
        with playwright.sync_playwright() as driver:
            options = ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
            options += ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
            browser = driver.chromium.launch(executable_path=CHROMIUM, args=options)
            opened = browser.new_page(viewport={"width": 640, "height": 300})
            opened.goto(f"http://127.0.0.1:{port}")
            opened.wait_for_selector("canvas", timeout=60000)
            opened.get_by_text("controller on / off").click(timeout=60000)
            wait_until(lambda: file.read_text().split()[1:2] == ["False"])
            opened.get_by_text("pause / go on").click(timeout=60000)
            wait_until(lambda: file.read_text().split()[:1] == ["True"])
            browser.close()
    finally:
        process.terminate()
        process.wait(30)


def wait_until(holds, seconds=60.0):
    """Wait until something holds; fails if it does not."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)
