"""What the vector environments share, whatever arrays they speak: spaces, generators, pictures."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from warp_phys.errors import check_choice
from warp_phys.interop.extras import require
from warp_phys.interop.gymnasium.episodes import Episodes, Task
from warp_phys.systems import System

RENDER_MODES = ["rgb_array"]


class Camera:
    """Pictures of a system's states by its own drawing; matplotlib is imported for the first one."""

    def __init__(self, system: System):
        self.system = system
        self._canvas: Any = None
        self._move: Callable[..., Any] | None = None

    def __reduce__(self):  # a copy draws pictures of its own
        return Camera, (self.system,)

    def picture(self, state: np.ndarray, control: np.ndarray | None) -> np.ndarray:
        """Return one picture, shape (400, 400, 3), uint8."""
        if self._move is None:
            require("matplotlib", "plots")
            from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415, only who renders needs it
            from matplotlib.figure import Figure  # noqa: PLC0415

            figure = Figure(figsize=(4.0, 4.0), dpi=100)
            self._canvas = FigureCanvasAgg(figure)
            self._move = self.system.sketch(figure.subplots())
        self._move(state, control)
        self._canvas.draw()
        return np.array(self._canvas.buffer_rgba())[..., :3]


class BatchEnv(VectorEnv):
    """Environments of one system: what Gymnasium asks of a vector environment but `reset` and `step`."""

    def __init__(
        self,
        task: Task,
        num_envs: int,
        max_episode_steps: int | None,
        autoreset_mode: AutoresetMode | str,
        render_mode: str | None,
    ):
        self.task, self._episodes = task, Episodes(task, num_envs, max_episode_steps, autoreset_mode)
        self.num_envs, self.render_mode = self._episodes.count, check_render_mode(render_mode, task.system)
        self.single_observation_space, self.single_action_space = task.spaces()
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.metadata = {
            "render_modes": RENDER_MODES,
            "render_fps": frames_per_second(task.system),
            "autoreset_mode": self._episodes.mode,
        }
        self._camera = Camera(task.system)

    @property
    def system(self) -> System:
        """The system."""
        return self.task.system

    @property  # type: ignore[misc]
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]  # a tuple, as in SyncVectorEnv
        """The environments' generators."""
        return tuple(self._episodes.generators)

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        """The environments' seeds."""
        return tuple(self._episodes.seeds)

    def render(self) -> tuple[np.ndarray, ...] | None:
        """Return a picture of each environment, shape (height, width, 3), uint8; None without a render mode."""
        if self.render_mode is None:
            return None
        states, controls = self._shown()
        rows = [None] * self.num_envs if controls is None else controls
        return tuple(self._camera.picture(*pair) for pair in zip(states, rows, strict=True))

    @abstractmethod
    def _shown(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the present states and the last controls, if any, as numpy."""


def check_render_mode(mode: str | None, system: System) -> str | None:
    """Return a render mode, or raise a ValueError that lists them, or that says that the system cannot be drawn."""
    if mode is not None and type(system).picture is System.picture:
        raise ValueError(f"render_mode must be None: {type(system).__name__} has no method picture to be drawn by")
    return None if mode is None else check_choice("render_mode", mode, RENDER_MODES)


def frames_per_second(system: System) -> int:
    """Return how many pictures a second show a system in its own time."""
    return max(1, round(1.0 / getattr(system, "dt", 1.0)))
