"""What is public can be copied and pickled; a copy does the same, on its own."""

import copy
import pickle

import numpy as np
import pytest
import torch
import warp as wp

from controllers import MLP
from controllers.actor_critic import ActorCritic, Settings
from controllers.tracking import tracking
from warp_phys import CartPole, Dense
from warp_phys import Rollout as WarpRollout
from warp_phys.interop.torch import Hybrid, Rollout

SYSTEM = CartPole()
X0 = SYSTEM.sample(2, seed=0)


def in_warp(rollout):
    return rollout(wp.array(X0, device="cpu"))[0].numpy()


def in_torch(rollout):
    states, controls = rollout(torch.from_numpy(X0))
    SYSTEM.loss(states, controls).backward()
    return np.concatenate([p.grad.flatten() for p in rollout.trained.parameters()])


def layers():
    torch.manual_seed(0)
    return torch.nn.Linear(5, 1)


MADE = {
    "rollout in Warp": (lambda: WarpRollout(SYSTEM, Dense((4, 3, 1), device="cpu"), 3), in_warp),
    "Rollout": (lambda: Rollout(SYSTEM, MLP(SYSTEM, (3,), seed=0), 3), in_torch),
    "rollout of a Hybrid": (
        lambda: Rollout(Hybrid(SYSTEM, layers(), "controls"), MLP(SYSTEM, (3,), seed=0), 3),
        in_torch,
    ),
    "tracking": (
        lambda: tracking(SYSTEM, "position", 2.0),
        lambda system: system.parameter_array(device="cpu").numpy(),
    ),
    "actor-critic": (
        lambda: ActorCritic(Settings(environments=4, horizon=2, episode=4, hidden=(3,), backend="general")),
        lambda learner: np.array(learner.step()[1:4]),
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_copies_do_the_same(name):
    make, act = MADE[name]
    made = make()
    copies = [copy.deepcopy(made), pickle.loads(pickle.dumps(made))]
    expected = act(made)
    copies.append(pickle.loads(pickle.dumps(made))) if name != "actor-critic" else None  # after use
    for other in copies:
        assert type(other) is type(made)
        if name == "tracking":
            assert other == made
        np.testing.assert_array_equal(act(other), expected)


def test_copies_of_layers_have_weights_of_their_own():
    dense = Dense((4, 1), device="cpu")
    other = copy.deepcopy(dense)
    before = dense.parameters[0].numpy().copy()
    other.parameters[0].zero_()
    np.testing.assert_array_equal(dense.parameters[0].numpy(), before)
