"""Which torch modules are read as layers, what is read, and what is left to torch."""

import pytest
import torch

from tests.springs import Springs
from warp_phys.interop.torch import Rollout
from warp_phys.interop.torch.chain import WIDEST, read_plan
from warp_phys.interop.torch.grid import FromGrid, ToGrid
from warp_phys.programs.program import Dense

NN = torch.nn
SYSTEM = Springs(size=24, pushes=2)


def chain(*layers):
    return NN.Sequential(*layers)


def layers_of(planned):
    """Return the order of the input, None where it is read as it comes, and the layers."""
    nodes = planned.plan.nodes[1:]
    assert [node.inputs for node in nodes] == [(i,) for i in range(len(nodes))]
    order = [k for _, k in nodes[0].numbers] if nodes[0].operation == "gather" else None
    return order, [Dense(*node.numbers) for node in nodes if node.operation == "dense"]


def to_grid(points, channels):
    """States of 24 numbers as a grid, all numbers of a point side by side or one channel after the other."""
    return {"last": ToGrid(channels), "first": NN.Unflatten(1, (channels, points))}


def test_dense_layers():
    module = chain(NN.Linear(24, 7), NN.SiLU(), NN.Linear(7, 5, bias=False), NN.Linear(5, 2), NN.Tanh())
    planned = read_plan(module, 24)
    plan, tensors, _ = planned
    slots = (0, 1), (2, -1), (3, 4)
    layers = [
        Dense(1, n, n, m, *slot, False, n, name)
        for n, m, slot, name in zip((24, 7, 5), (7, 5, 2), slots, ("silu", "identity", "tanh"), strict=True)
    ]
    assert layers_of(planned) == (None, layers) and plan.slots == (168, 7, 35, 10, 2)
    assert plan.outputs == 2 and plan.multiply_adds == 24 * 7 + 7 * 5 + 5 * 2
    expected = [module[0].weight, module[0].bias, module[2].weight, None, module[3].weight, module[3].bias]
    assert all(a is b for a, b in zip(tensors, expected, strict=True))


@pytest.mark.parametrize("order", ["last", "first"])
@pytest.mark.parametrize("end", [FromGrid, NN.Flatten])
def test_convolutions(order, end):
    module = chain(to_grid(12, 2)[order], NN.Conv1d(2, 5, 4, stride=3), NN.ELU(), end(), NN.Linear(15, 2))
    layers = [
        Dense(3, 8, 6, 5, 0, 1, False, 2, "elu"),
        Dense(1, 15, 15, 2, 2, 3, False, 15 if end is FromGrid else 5),
    ]
    turned = [k % 2 * 12 + k // 2 for k in range(24)]
    assert layers_of(read_plan(module, 24)) == (None if order == "last" else turned, layers)
    assert Rollout(SYSTEM, module, 3).backend == "fused"


def test_a_layer_and_an_activation_that_come_twice():
    layer, act = NN.Linear(24, 24), NN.Sigmoid()
    planned = read_plan(chain(layer, act, layer, act, NN.Linear(24, 2)), 24)
    assert [a.activation for a in layers_of(planned)[1]] == ["sigmoid", "sigmoid", "identity"]
    assert planned.tensors[0] is planned.tensors[2] is layer.weight


def test_sizes_are_those_of_the_weights():
    """They are what torch computes with, whatever a module says of itself."""
    module = chain(NN.Linear(24, 7), NN.Tanh(), NN.Linear(7, 2))
    module[0].weight, module[0].bias = NN.Parameter(torch.randn(9, 24)), NN.Parameter(torch.randn(9))
    module[2].weight = NN.Parameter(torch.randn(2, 9))
    assert [(a.window, a.outputs) for a in layers_of(read_plan(module, 24))[1]] == [(24, 9), (9, 2)]
    module[2].weight = NN.Parameter(torch.randn(2, 8))
    assert read_plan(module, 24) is None


READ = {
    "a linear controller": lambda: chain(NN.Linear(24, 2)),
    "a flatten that does nothing": lambda: chain(NN.Linear(24, 2), NN.Flatten()),
    "a flatten of two dimensions": lambda: chain(ToGrid(2), NN.Conv1d(2, 2, 12), NN.Flatten(1, 2)),
    "one window at the end": lambda: chain(ToGrid(2), NN.Conv1d(2, 2, 12), FromGrid()),
    "a grid made of hidden numbers": lambda: chain(
        NN.Linear(24, 12), NN.ReLU(), ToGrid(3), NN.Conv1d(3, 2, 2, stride=2), FromGrid(), NN.Linear(4, 2)
    ),
    "an activation after the flatten": lambda: chain(
        ToGrid(2), NN.Conv1d(2, 3, 3), NN.Flatten(), NN.Tanh(), NN.Linear(30, 2)
    ),
    "the widest layer": lambda: chain(NN.Linear(24, WIDEST), NN.Tanh(), NN.Linear(WIDEST, 2)),
}


@pytest.mark.parametrize("make", READ.values(), ids=READ)
def test_what_is_read(make):
    rollout = Rollout(SYSTEM, make(), 3)
    assert rollout.backend == "fused"
    assert Rollout(SYSTEM, rollout.controller, 3, backend="general").backend == "general"


def _hook_on_a_layer():
    module = chain(NN.Linear(24, 7), NN.Tanh(), NN.Linear(7, 2))
    module[1].register_forward_pre_hook(lambda _module, inputs: inputs)
    return module


def _hook_on_the_module():
    module = chain(NN.Linear(24, 2))
    module.register_full_backward_hook(lambda *_arguments: None)
    return module


def _own_forward():
    module = chain(NN.Linear(24, 2))
    module.forward = lambda x: 2.0 * x[:, :2]
    return module


class _Subclass(NN.Sequential):
    def forward(self, x):
        return 2.0 * super().forward(x)


class _Layer(NN.Linear):
    pass


def _weight_that_is_no_parameter():
    module = chain(NN.Linear(24, 2))
    del module[0].weight
    module[0].weight = torch.zeros(2, 24)
    return module


def _strided_weight():
    module = chain(NN.Linear(24, 2))
    module[0].weight = NN.Parameter(torch.zeros(24, 2).T)
    return module


def _bias_that_is_broadcast():
    module = chain(NN.Linear(24, 2))
    module[0].bias = NN.Parameter(torch.zeros(1))
    return module


def _no_outputs():
    module = chain(NN.Linear(24, 2, bias=False))
    module[0].weight = NN.Parameter(torch.zeros(0, 24))
    return module


def grid(*layers):
    return chain(ToGrid(2), *layers, FromGrid(), NN.Linear(1, 2))


NOT_READ = {
    "a hook on a layer": _hook_on_a_layer,
    "a hook on the module": _hook_on_the_module,
    "a forward of its own": _own_forward,
    "a subclass with its own forward": lambda: _Subclass(NN.Linear(24, 2)),
    "a subclass of a layer": lambda: chain(_Layer(24, 2)),
    "another module": lambda: NN.Linear(24, 2),
    "another layer": lambda: chain(NN.Linear(24, 7), NN.LayerNorm(7), NN.Linear(7, 2)),
    "a weight that is no parameter": _weight_that_is_no_parameter,
    "a strided weight": _strided_weight,
    "a bias that is broadcast": _bias_that_is_broadcast,
    "an activation first": lambda: chain(NN.Tanh(), NN.Linear(24, 2)),
    "two activations in a row": lambda: chain(NN.Linear(24, 7), NN.Tanh(), NN.ReLU(), NN.Linear(7, 2)),
    "an activation between grid and convolution": lambda: grid(NN.Tanh(), NN.Conv1d(2, 1, 12)),
    "another alpha": lambda: chain(NN.Linear(24, 7), NN.ELU(alpha=0.5), NN.Linear(7, 2)),
    "padding": lambda: grid(NN.Conv1d(2, 1, 12, padding=1)),
    "padding by name": lambda: grid(NN.Conv1d(2, 1, 12, padding="same")),
    "dilation": lambda: grid(NN.Conv1d(2, 1, 4, dilation=2)),
    "groups": lambda: grid(NN.Conv1d(2, 2, 12, groups=2)),
    "other channels": lambda: grid(NN.Conv1d(3, 1, 8)),
    "a kernel that is too long": lambda: grid(NN.Conv1d(2, 1, 13)),
    "a convolution without a grid": lambda: chain(NN.Conv1d(1, 1, 1), NN.Linear(24, 2)),
    "a linear layer on a grid": lambda: chain(ToGrid(2), NN.Linear(12, 2), FromGrid()),
    "several windows at the end": lambda: chain(ToGrid(2), NN.Conv1d(2, 2, 6), FromGrid()),
    "a final grid": lambda: chain(ToGrid(2), NN.Conv1d(2, 2, 12)),
    "a final row, channels first": lambda: chain(ToGrid(2), NN.Conv1d(2, 2, 6, stride=6), NN.Flatten()),
    "a grid of other sizes": lambda: chain(NN.Unflatten(1, (2, 11)), NN.Conv1d(2, 1, 11), FromGrid(), NN.Linear(1, 2)),
    "a grid within a grid": lambda: chain(ToGrid(2), ToGrid(2), NN.Conv1d(2, 1, 12), FromGrid(), NN.Linear(1, 2)),
    "a row of a flattened grid": lambda: chain(
        ToGrid(2), NN.Conv1d(2, 3, 3), NN.Flatten(), ToGrid(3), NN.Conv1d(3, 1, 10), FromGrid(), NN.Linear(1, 2)
    ),
    "channels that do not divide": lambda: chain(ToGrid(5), NN.Conv1d(5, 1, 4), FromGrid(), NN.Linear(1, 2)),
    "no channels": lambda: chain(ToGrid(0), NN.Linear(24, 2)),
    "another number of inputs": lambda: chain(NN.Linear(23, 2)),
    "no layers": lambda: chain(),
    "no outputs": _no_outputs,
    "a layer that is too wide": lambda: chain(NN.Linear(24, WIDEST + 1), NN.Tanh(), NN.Linear(WIDEST + 1, 2)),
    "float16": lambda: chain(NN.Linear(24, 2)).half(),
    "two precisions": lambda: chain(NN.Linear(24, 7), NN.Linear(7, 2).double()),
    "two devices": lambda: chain(NN.Linear(24, 7), NN.Linear(7, 2, device="meta")),
}


@pytest.mark.parametrize("make", NOT_READ.values(), ids=NOT_READ)
def test_what_is_not_read(make):
    assert read_plan(make(), 24) is None


def test_the_backend_follows_the_module():
    """It is asked again for every pass: a hook that comes later is not passed over."""
    module = chain(NN.Linear(24, 7), NN.Tanh(), NN.Linear(7, 2))
    rollout = Rollout(SYSTEM, module, 3)
    assert rollout.backend == "fused"
    handle = module[1].register_forward_hook(lambda _module, _inputs, output: 0.5 * output)
    assert rollout.backend == "general"
    handle.remove()
    assert rollout.backend == "fused"
    handle = NN.modules.module.register_module_forward_hook(lambda *_arguments: None)
    assert rollout.backend == "general"
    handle.remove()
    module[2].weight = NN.Parameter(torch.zeros(3, 7))  # of a shape that its bias does not have
    assert rollout.backend == "general"


def test_another_number_of_controls():
    """Torch shall say so: the flatten hides the sizes from the check when the rollout is made."""
    assert Rollout(SYSTEM, chain(NN.Linear(24, 2)), 3).backend == "fused"
    assert Rollout(Springs(size=24, pushes=3), chain(NN.Flatten(), NN.Linear(24, 2)), 3).backend == "general"


def test_controls_that_end_as_a_flattened_grid():
    """Their order is another one; read by its types or by export, such a module gives its own controls."""
    system = Springs(size=6, pushes=4)
    module = NN.Sequential(NN.Linear(6, 4), ToGrid(2), NN.Flatten()).double()
    assert read_plan(module, 6) is None
    x0 = torch.as_tensor(system.sample(3, 0, "float64"))
    for backend in ("auto", "fused", "general"):
        _, controls = Rollout(system, module, 1, backend=backend)(x0)
        torch.testing.assert_close(controls[0], module(x0), rtol=1e-13, atol=1e-13)
