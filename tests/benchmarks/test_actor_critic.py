"""The actor-critic's contestants compute the same. Nothing is said of time."""

from dataclasses import replace

import pytest
import torch

from controllers.actor_critic import ActorCritic
from tests.benchmarks.actor_critic import SWING_UP, Eager, difference, hovering, upright

SMALL = replace(SWING_UP, environments=4, horizon=6, hidden=(8,), backend="general", critic_minibatches=1)


@pytest.mark.parametrize("flow", ["regular", "modified", "combined"])
def test_an_update_is_that_of_torch(flow):
    assert difference(replace(SMALL, flow=flow)) < 1e-4


def test_both_train_alike():
    """With one minibatch there is no order in which the critic could differ."""
    settings = replace(SMALL, critic_epochs=1, schedule="constant")
    own, peer = ActorCritic(settings), Eager(ActorCritic(settings))
    for _ in range(3):
        own.step()
        peer.step()
    torch.testing.assert_close(own.states, peer.x, rtol=1e-3, atol=1e-4)
    for module in ("actor", "critic", "target", "observer"):
        for name, mine in getattr(own, module).state_dict().items():
            its = getattr(peer.learner, module).state_dict()[name]
            torch.testing.assert_close(mine, its, rtol=1e-2, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def test_what_ends_well():
    states = torch.zeros(501, 2, 6)
    states[450:, 1] = 0.6
    assert upright(states).tolist() == [True, False]
    assert hovering(states).tolist() == [True, False]
