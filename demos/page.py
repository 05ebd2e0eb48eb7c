"""A demo on a page in a browser, by viser: its picture in space, what can be touched in it, controls, curves."""

import contextlib
import io
import ipaddress
import math
import time
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from queue import SimpleQueue
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import viser
import websockets.asyncio.server

from demos.frame import ANYWHERE, Button, Choice, Control, Demo, Grip, Plot, Ray
from warp_phys.systems.drawing import ABOVE, Ball, Block, Cone, Line, Picture, Rod, Shape, Surface, Text, corners

LONGEST_STEP = 0.1
"""Seconds of a demo's time that one picture may pass, however long it took."""
CURVES_EVERY, WORDS_EVERY = 0.1, 0.25
"""Seconds between two drawings of the curves, and of the words."""
ROOT = "/scene"
FOV = 0.7
"""Vertical angle of the camera [rad]."""
PHONE, SEEN_OF_PHONE, MARGIN = 577, 0.4, 1.15
"""Width in pixels below which viser has its controls over the lower part of the page, what they leave free, and by how
much farther away the camera stands then."""
PANEL = 320
"""Width in pixels of the controls elsewhere."""
PLAIN = ("127.0.0.1", "localhost", "::1")


class PortTaken(Exception):
    """The page cannot be served at its port."""


def check_request(headers: Any, host: str) -> str | None:
    """Return why a request is refused, None where it is not.

    A page of somebody else in the same browser can send requests here: then the header Origin names that page, or,
    where its name was made to lead to this machine, Host does.

    Args:
        headers: Of the request.
        host: What the server is bound to; where that is more than this machine, addresses in numbers are let in as
            well, since they cannot be made to lead elsewhere.

    >>> check_request({"Host": "127.0.0.1:8988"}, "127.0.0.1")
    >>> check_request({"Host": "evil.example", "Origin": "http://evil.example"}, "127.0.0.1")
    'this page is not known as evil.example'
    >>> check_request({"Host": "localhost:8988", "Origin": "http://evil.example"}, "127.0.0.1")
    'pages from http://evil.example may not speak to this one'
    """
    asked, origin = headers.get("Host", ""), headers.get("Origin")
    try:
        name = urlsplit(f"//{asked}").hostname or ""
    except ValueError:
        name = ""
    numbers = False
    with contextlib.suppress(ValueError):
        numbers = bool(ipaddress.ip_address(name)) and host not in PLAIN
    if name not in {*PLAIN, host.lower()} and not numbers:
        return f"this page is not known as {asked}"
    if origin is not None and origin not in (f"http://{asked}", f"https://{asked}"):
        return f"pages from {origin} may not speak to this one"
    return None


@contextlib.contextmanager
def open_server(host: str, port: int, title: str) -> Iterator[viser.ViserServer]:
    """Serve pages that foreign names and foreign pages are kept away from.

    viser has no place for such a check, but its web server is that of `websockets`, which has: the check stands before
    viser's own answer to a request.

    Raises:
        PortTaken: The port is not to be had.
    """

    class Guarded(websockets.asyncio.server.serve):  # type: ignore[misc]
        def __init__(self, *arguments: Any, process_request: Any, **options: Any) -> None:
            def check(connection: Any, request: Any) -> Any:
                refusal = check_request(request.headers, host)
                if refusal is not None:
                    return connection.respond(HTTPStatus.FORBIDDEN, refusal + "\n")
                return process_request(connection, request)

            super().__init__(*arguments, process_request=check, **options)

    websockets.asyncio.server.serve = Guarded  # type: ignore[assignment, misc]
    silent = contextlib.redirect_stdout(io.StringIO())  # viser tells where it is, and that it has ended
    try:
        with silent:
            server = viser.ViserServer(host, port, label=title, verbose=False)
    finally:
        websockets.asyncio.server.serve = Guarded.__base__  # type: ignore[misc, assignment]
    try:
        if port and server.get_port() != port:
            raise PortTaken
        yield server
    finally:
        with silent:
            server.stop()


def to_rgb(colour: str) -> tuple[int, int, int]:
    """Read a colour.

    >>> to_rgb("#0072B2")
    (0, 114, 178)
    """
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def turn_up(along: np.ndarray) -> np.ndarray:
    """Return the quaternion (w, x, y, z) that turns the z axis to a direction.

    >>> turn_up(np.array([0.0, 0.0, 2.0])) + 0.0
    array([1., 0., 0., 0.])
    """
    x, y, z = along / max(float(np.linalg.norm(along)), 1e-12)
    if z < -1.0 + 1e-9:
        return np.array([0.0, 1.0, 0.0, 0.0])
    found = np.array([1.0 + z, -y, x, 0.0])
    return found / np.linalg.norm(found)


def make_cone(corner_count: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Return corners and triangles of a cone of radius 1 and height 1 whose middle is at the origin."""
    angle = 2.0 * np.pi * np.arange(corner_count) / corner_count
    ring = np.stack([np.cos(angle), np.sin(angle), np.full(corner_count, -0.5)], axis=1)
    here, there = np.arange(corner_count), np.roll(np.arange(corner_count), -1)
    sides = np.stack([here, there, np.full(corner_count, corner_count)], axis=1)
    base = np.stack([there, here, np.full(corner_count, corner_count + 1)], axis=1)
    return np.concatenate([ring, [[0.0, 0.0, 0.5], [0.0, 0.0, -0.5]]]), np.concatenate([sides, base])


def segments(line: Line) -> tuple[np.ndarray, np.ndarray]:
    """Return the pieces of a line, shape (M, 2, 3), and their colours: shape (3,) or (M, 2, 3), from 0 to 255."""
    points = np.asarray(line.points, dtype=float)
    pieces = np.stack([points[:-1], points[1:]], axis=1)
    whole = np.isfinite(pieces).all(axis=(1, 2))
    if isinstance(line.colour, str):
        return pieces[whole], np.array(to_rgb(line.colour), np.uint8)
    colours = (255.0 * np.clip(line.colour, 0.0, 1.0)).astype(np.uint8)
    return pieces[whole], np.stack([colours[:-1], colours[1:]], axis=1)[whole]


def as_trimesh(surface: Surface) -> Any:
    """Return a surface as viser takes it."""
    import trimesh  # noqa: PLC0415, viser brings it, and it takes its time

    colours = (255.0 * np.clip(surface.colour, 0.0, 1.0)).astype(np.uint8)
    return trimesh.Trimesh(surface.points, surface.faces, vertex_colors=colours, process=False)


class Node:
    """One shape of a picture in viser's scene."""

    def __init__(self, scene: Any, name: str, shape: Shape) -> None:
        self.kind, self.last = type(shape), {}
        self.handle = self._make(scene, name, shape)
        self.show(shape)

    def _make(self, scene: Any, name: str, shape: Any) -> Any:
        makers: dict[type, Callable[[], Any]] = {
            Line: lambda: scene.add_line_segments(
                name, np.zeros((1, 2, 3)), np.zeros(3, np.uint8), thickness=shape.width, thickness_units="screen"
            ),
            Text: lambda: scene.add_label(name, shape.words, anchor="center-center"),
            Surface: lambda: scene.add_mesh_trimesh(name, as_trimesh(shape)),
            Ball: lambda: scene.add_icosphere(name, 1.0, subdivisions=3),
            Block: lambda: scene.add_box(name, dimensions=(1.0, 1.0, 1.0)),
            Rod: lambda: scene.add_cylinder(name, 1.0, 1.0, radial_segments=20),
            Cone: lambda: scene.add_mesh_simple(name, *make_cone(), flat_shading=True),
        }
        return makers[type(shape)]()

    def show(self, shape: Shape) -> None:
        """Show it as it is now; only what has changed is sent."""
        if isinstance(shape, Line):
            points, colours = segments(shape)
            self._send("visible", len(points) > 0)
            if len(points):
                self._send("points", points.astype(np.float32))
                self._send("colors", colours)
        elif isinstance(shape, Text):
            self._send("text", shape.words)
            self._send("position", np.asarray(shape.place, dtype=float))
        elif not isinstance(shape, Surface):
            self._send("color", np.array(to_rgb(shape.colour)))
            if isinstance(shape, Ball | Block):
                size = np.full(3, shape.radius) if isinstance(shape, Ball) else np.asarray(shape.size, dtype=float)
                centre = np.asarray(shape.centre, dtype=float)
            else:
                start, end = np.asarray(shape.start, dtype=float), np.asarray(shape.end, dtype=float)
                size = np.array([shape.radius, shape.radius, np.linalg.norm(end - start)])
                centre = 0.5 * (start + end)
                self._send("wxyz", turn_up(end - start))
            # nothing can be turned that has no extent
            self._send("scale", np.maximum(size, 1e-6))
            self._send("position", centre)

    def _send(self, name: str, value: Any) -> None:
        if name not in self.last or not np.array_equal(self.last[name], value):
            self.last[name] = value
            plain = isinstance(value, np.ndarray) and value.ndim == 1 and name in ("scale", "color")
            setattr(self.handle, name, tuple(value.tolist()) if plain else value)


class Stage:
    """The picture of a demo in viser's scene; it is moved so that what is to be seen stays in the same place."""

    def __init__(self, scene: Any, demo: Demo, later: Callable[[Callable[[], Any]], Any] | None = None) -> None:
        self.scene, self.demo, self.later = scene, demo, later
        self.root = scene.add_frame(ROOT, show_axes=False)
        self.nodes: dict[str, Node] = {}
        self.shift = np.zeros(3)
        self.first = demo.picture()
        self.middle = corners(self.first).mean(axis=0)
        self.show()
        if later is not None and ANYWHERE in demo.grips():
            self.attach(scene, demo.grips()[ANYWHERE])

    def show(self) -> None:
        """Show the demo as it is now."""
        picture = self.demo.picture()
        for name in [name for name in self.nodes if name not in picture.parts]:
            self.nodes.pop(name).handle.remove()
        fresh = []
        for name, shape in picture.parts.items():
            if name in self.nodes and self.nodes[name].kind is type(shape):
                if name not in picture.still:
                    self.nodes[name].show(shape)
                continue
            self.nodes[name] = Node(self.scene, f"{ROOT}/{name.replace('/', ' ')}", shape)
            fresh.append(name)
        if fresh and self.later is not None:
            grips = self.demo.grips()
            for name in fresh:
                if name in grips:
                    self.attach(self.nodes[name].handle, grips[name])
        shift = self.middle - corners(picture).mean(axis=0)
        if np.abs(shift - self.shift).max() > 1e-4:
            self.shift = self.root.position = shift

    def attach(self, handle: Any, grip: Grip) -> None:
        """Let a part be touched; what viser's threads hear is done later, in the thread of the demo."""
        later = self.later
        assert later is not None

        def ray(origin: Any, direction: Any) -> Ray:
            return Ray(np.asarray(origin, dtype=float) - self.shift, np.asarray(direction, dtype=float))

        if grip.drag is not None:
            drag = grip.drag

            # asynchronous ones are called in order
            async def dragged(event: Any) -> None:
                eye = np.asarray(event.client.camera.position, dtype=float)
                seen = ray(eye, np.asarray(event.end_position) - eye)
                later(grip.release if event.phase == "end" else lambda: drag(seen))

            handle.on_drag(dragged)
        if grip.click is not None:
            click = grip.click

            async def clicked(event: Any) -> None:
                seen = ray(event.ray_origin, event.ray_direction)
                later(lambda: click(seen))

            handle.on_click()(clicked)


def direction_of(picture: Picture) -> np.ndarray:
    """Return where one looks from at first, as seen from the middle of the picture; of length 1."""
    flat = np.asarray(picture.view) == np.asarray(ABOVE)
    found = np.array([0.0, -0.75, 1.0]) if flat.all() else np.array([0.25, -1.0, 0.3])
    return found / np.linalg.norm(found)


def look_at(picture: Picture, fov: float, aspect: float, seen: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Return where a camera stands that sees the whole box, and at what it looks, shape (3,) each.

    Args:
        picture: What is to be seen.
        fov: The camera's vertical angle in radians.
        aspect: Width of the window by its height.
        seen: Share of the window's height, from above, in which the box shall be.
    """
    towards, middle = direction_of(picture), corners(picture).mean(axis=0)
    right = np.cross([0.0, 0.0, 1.0], towards)
    right /= np.linalg.norm(right)
    upwards = np.cross(towards, right)
    offsets, tangent = corners(picture) - middle, np.tan(0.5 * fov)
    across, up = np.abs(offsets @ right) / (tangent * aspect), np.abs(offsets @ upwards) / (tangent * seen)
    away = float((np.maximum(across, up) + offsets @ towards).max())
    if seen < 1.0:  # what is not in the middle is seen aslant
        away *= MARGIN
    return middle + away * towards, middle - (1.0 - seen) * tangent * away * upwards


def place_first(server: viser.ViserServer, picture: Picture) -> None:
    """Place the camera before the shape of a window is known, and to where "reset view" leads."""
    server.initial_camera.fov = FOV
    place, target = look_at(picture, FOV, 1.0)
    server.initial_camera.position, server.initial_camera.look_at = place, target


class Page:
    """A demo on the pages of a server: `tick` does what was asked for there and shows the next picture."""

    def __init__(self, server: viser.ViserServer, demo: Demo) -> None:
        self.server, self.demo = server, demo
        self.asked: SimpleQueue[Callable[[], Any]] = SimpleQueue()
        self.frames = 0
        self.started = self.last = time.perf_counter()
        self.due = {CURVES_EVERY: 0.0, WORDS_EVERY: 0.0}
        server.gui.configure_theme(show_logo=False, show_share_button=False, dark_mode=demo.dark)
        server.gui.main_panel.dock_right()
        server.scene.set_up_direction("+z")
        server.scene.configure_default_lights(cast_shadow=False)
        self.stage = Stage(server.scene, demo, self.asked.put)
        low = np.asarray(self.stage.first.low)
        server.scene.add_grid(
            "/floor",
            infinite_grid=True,
            position=(0.0, 0.0, low[2] - 0.01),
            cell_color=(215, 215, 215) if not demo.dark else (50, 50, 50),
            section_color=(190, 190, 190) if not demo.dark else (70, 70, 70),
            fade_distance=40.0,
        )
        server.gui.add_markdown(f"**{demo.says}**")
        self.words = server.gui.add_markdown(" ")
        self.inputs = [(control, self.add_control(control)) for control in demo.controls()]
        self.build, self.curves = demo.build, self.add_plots()
        place_first(server, self.stage.first)
        server.on_client_connect(self.place_camera)

    def place_camera(self, client: Any) -> None:
        """Show a newcomer the whole picture, whatever the shape of the window."""
        width, height = client.camera.image_width, max(1, client.camera.image_height)
        # on a phone the controls cover what is below
        free, seen = (width, SEEN_OF_PHONE) if width < PHONE else (width - PANEL, 1.0)
        place, target = look_at(self.stage.first, FOV, free / height, seen)
        client.camera.fov = FOV
        # in this order: a camera that is moved looks past what it looked at
        client.camera.position = place
        client.camera.look_at = target

    def add_control(self, control: Control) -> Any:
        """Put a control beside the picture."""
        gui = self.server.gui
        if isinstance(control, Button):
            made: Any = gui.add_button(control.label)
            made.on_click(lambda _: self.asked.put(control.press))
            return made
        if isinstance(control, Choice):
            made = gui.add_dropdown(control.label, tuple(control.options), initial_value=control.read())
            act: Callable[[Any], Any] = control.choose
        else:
            made = gui.add_slider(
                control.label, min=control.least, max=control.most, step=control.step, initial_value=control.read()
            )
            act = control.move

        def changed(event: Any) -> None:
            if event.client is not None:  # else it is ourselves, see `tick`
                value = event.target.value
                self.asked.put(lambda: act(value))

        made.on_update(changed)
        return made

    def add_plots(self) -> list[tuple[Plot, Any]]:
        """Put the curves beside the picture."""
        return [(plot, add_plot(self.server.gui, plot, self.demo.dark)) for plot in self.demo.plots()]

    def tick(self) -> None:
        """Do what was asked for and show the next picture, as far on as time has passed since the last one.

        The time of a demo stands still while nobody looks.
        """
        now = time.perf_counter()
        passed, self.last = min(now - self.last, LONGEST_STEP), now
        while not self.asked.empty():
            self.asked.get()()
        if not self.server.get_clients():
            return
        if not self.demo.paused:
            self.demo.advance(passed)
        with self.server.atomic():
            self.stage.show()
            self.tell(now)
        self.frames += 1

    def tell(self, now: float) -> None:
        """Show curves, words and the values of the controls, all less often than pictures."""
        if now >= self.due[CURVES_EVERY]:
            self.due[CURVES_EVERY] = now + CURVES_EVERY
            if self.build != self.demo.build:
                for _, handle in self.curves:
                    handle.remove()
                self.build, self.curves = self.demo.build, self.add_plots()
            for plot, handle in self.curves:
                handle.data = plot_data(plot)
            for control, handle in self.inputs:
                if not isinstance(control, Button) and handle.value != control.read():
                    handle.value = control.read()
        if now >= self.due[WORDS_EVERY]:
            self.due[WORDS_EVERY] = now + WORDS_EVERY
            words = self.demo.words() or " "
            if words != self.words.content:
                self.words.content = words


def plot_data(plot: Plot) -> tuple[np.ndarray, ...]:
    """Return what uPlot draws; it needs two points at least."""
    x, curves = plot.read()
    if len(x) < 2:
        x, curves = np.array([0.0, 1.0]), np.full((len(plot.names), 2), np.nan)
    if plot.log:
        curves = np.where(curves > 0.0, curves, np.nan)
    return (np.asarray(x, dtype=float), *np.asarray(curves, dtype=float))


def powers_of_ten(low: float, high: float) -> list[float]:
    """Return those that stand at an axis, six at most.

    >>> powers_of_ten(0.1, 1e4)
    [0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0]
    >>> powers_of_ten(1e-7, 1e6)
    [1e-06, 0.001, 1.0, 1000.0, 1000000.0]
    """
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    apart = 1 + (last - first) // 6
    return [float(f"1e{power}") for power in range(first, last + 1) if power % apart == 0]


def add_plot(gui: Any, plot: Plot, dark: bool) -> Any:
    """Add curves to a panel."""
    ink = "#cccccc" if dark else "#333333"
    axis: Any = {"stroke": ink, "grid": {"stroke": "#444444" if dark else "#e8e8e8", "width": 1}}
    y: Any = {"distr": 3} if plot.log else {}
    y_axis: Any = axis | {"size": 62}
    if plot.y_range is not None:
        y["range"] = plot.y_range
        if plot.log:
            powers = powers_of_ten(*plot.y_range)
            y_axis |= {"splits": powers, "values": [f"{power:g}" for power in powers]}
    curves = zip(plot.names, plot.colours, strict=True)
    return gui.add_uplot(
        plot_data(plot),
        ({"label": plot.x_label}, *({"label": name, "stroke": colour, "width": 2} for name, colour in curves)),
        title=plot.title,
        scales={"x": {"time": False}, "y": y},
        axes=(axis, y_axis),
        legend={"show": len(plot.names) > 1, "live": False},
        padding=(12, 24, 0, 0),
        aspect=1.6,
    )


def record(demo: Demo, steps: Iterable[Any], rate: float) -> str:
    """Return a page that shows what a demo does and needs no server: one can turn and zoom what it plays.

    Args:
        demo: What is shown.
        steps: Lets the demo go on by one picture with each step.
        rate: Pictures per second.
    """
    with open_server("127.0.0.1", 0, "") as server:
        server.scene.set_up_direction("+z")
        stage = Stage(server.scene, demo)
        place_first(server, stage.first)
        serializer = server.get_scene_serializer()
        for _ in steps:
            stage.show()
            serializer.insert_sleep(1.0 / rate)
        return serializer.as_html(dark_mode=demo.dark)
