"""A policy of stable-baselines3 (PPO) learns on an environment of ours; prints the mean return before and after.

    python -m demos.reinforcement
    python -m demos.reinforcement --environment warp_phys/Repulsion-v0 --steps 200000

The environment is made by its registered name, as any other one is: there is no code of ours between the two libraries.
"""

from demos.interrupt import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import warp

from controllers.commandline import Parser, add_flags
from warp_phys.errors import check_count
from warp_phys.interop.gymnasium import TASKS

EPISODES = 64
"""Episodes of a measurement, the same ones before and after."""


@dataclass(frozen=True)
class Settings:
    """Settings of the demo."""

    environment: str = "warp_phys/CartPole-v0"
    """Registered name."""
    steps: int = 100_000
    """Environment steps to learn from."""
    environments: int = 16
    """Copies that are stepped in turn."""
    seed: int = 0
    """Seed of policy and environments."""

    def __post_init__(self):
        if self.environment not in TASKS:
            raise ValueError(f"environment must be one of {', '.join(TASKS)}, got {self.environment!r}")
        for name in ("steps", "environments"):
            check_count(name, getattr(self, name))


class Returns(NamedTuple):
    """Mean and standard deviation of undiscounted returns."""

    mean: float
    deviation: float

    def __str__(self):
        return f"{self.mean:.1f} ± {self.deviation:.1f}"


def learn(settings: Settings) -> tuple[Returns, Returns, float]:
    """Return the returns before and after learning, and the seconds that learning took."""
    from stable_baselines3 import PPO  # noqa: PLC0415, an optional library, and slow to import
    from stable_baselines3.common.env_util import make_vec_env  # noqa: PLC0415

    horizon = TASKS[settings.environment][1]
    envs = make_vec_env(settings.environment, settings.environments, seed=settings.seed)
    batch = horizon * settings.environments // 4
    model = PPO(
        "MlpPolicy", envs, n_steps=horizon, batch_size=batch, learning_rate=1e-3, seed=settings.seed, device="cpu"
    )
    before = measure(model, settings)
    start = time.perf_counter()
    model.learn(settings.steps)
    return before, measure(model, settings), time.perf_counter() - start


def measure(model: Any, settings: Settings) -> Returns:
    """Return the returns of the policy without its noise, over episodes that it does not learn from."""
    from stable_baselines3.common.env_util import make_vec_env  # noqa: PLC0415
    from stable_baselines3.common.evaluation import evaluate_policy  # noqa: PLC0415

    envs = make_vec_env(settings.environment, settings.environments, seed=settings.seed + 100_000)
    returns: Any = evaluate_policy(model, envs, n_eval_episodes=EPISODES, return_episode_rewards=True)[0]
    return Returns(float(np.mean(returns)), float(np.std(returns)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns its exit status."""
    warp.config.log_level = warp.LOG_WARNING
    parser = Parser(
        prog="python -m demos.reinforcement", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    add_flags(parser, Settings)
    try:
        settings = Settings(**vars(parser.parse_args(sys.argv[1:] if arguments is None else arguments)))
        import stable_baselines3  # noqa: F401, PLC0415
    except ImportError:
        parser.error("this demo needs stable-baselines3: pip install stable-baselines3")
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    torch.set_num_threads(1)  # for networks this small more threads only wait for each other
    before, after, seconds = learn(settings)
    print(f"{settings.environment}, mean return of {EPISODES} episodes")
    print(f"before  {before}")
    print(f"after   {after}    ({settings.steps} steps, {seconds:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
