"""Controllers: their layers, their start, their errors."""

import copy
from types import SimpleNamespace

import pytest
import torch

from controllers import MLP, GridCNN, Linear
from controllers.networks import make_network

SYSTEM = SimpleNamespace(state_size=6, control_size=2)


def linear_layers(controller):
    return [layer for layer in controller if isinstance(layer, torch.nn.Linear)]


def test_mlp_is_a_plain_chain():
    controller = MLP(SYSTEM, hidden=(5, 7))
    assert isinstance(controller, torch.nn.Sequential)
    assert [type(layer).__name__ for layer in controller] == ["Linear", "Tanh", "Linear", "Tanh", "Linear"]
    assert [layer.weight.shape for layer in linear_layers(controller)] == [(5, 6), (7, 5), (2, 7)]


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("tanh", torch.tanh),
        ("relu", torch.relu),
        ("elu", torch.nn.functional.elu),
        ("silu", torch.nn.functional.silu),
        ("sigmoid", torch.sigmoid),
    ],
)
def test_mlp_computes_its_formula(activation, function):
    controller = MLP(SYSTEM, hidden=(5,), activation=activation, init="torch", seed=1)
    first, last = linear_layers(controller)
    x = torch.randn(9, 6)
    expected = function(x @ first.weight.T + first.bias) @ last.weight.T + last.bias
    torch.testing.assert_close(controller(x), expected)


def test_linear_computes_its_formula():
    controller = Linear(SYSTEM, seed=3)
    x = torch.randn(9, 6)
    torch.testing.assert_close(controller(x), x @ controller[0].weight.T + controller[0].bias)


def test_glorot_fills_its_range_with_zero_biases():
    for layer in linear_layers(MLP(SYSTEM, hidden=(100, 100), seed=0)):
        bound = (6 / (layer.in_features + layer.out_features)) ** 0.5
        assert 0.95 * bound < layer.weight.abs().max() <= bound
        assert float(layer.weight.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.1)
        assert not layer.bias.any()


def test_zero_last_is_glorot_with_a_zero_last_weight():
    zero, glorot = (linear_layers(MLP(SYSTEM, init=init, seed=0)) for init in ("zero-last", "glorot"))
    assert not zero[-1].weight.any()
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(zero[:-1], glorot[:-1], strict=True))


def test_torch_init_fills_torchs_range():
    for layer in linear_layers(MLP(SYSTEM, hidden=(100, 100), init="torch", seed=0)):
        bound = layer.in_features**-0.5
        assert 0.95 * bound < layer.weight.abs().max() <= bound
        assert 0 < layer.bias.abs().max() <= bound


@pytest.mark.parametrize("init", ["glorot", "zero-last", "torch"])
def test_seed_decides_the_bits_and_spares_the_global_generator(init):
    before = torch.get_rng_state()
    one, same, other = (MLP(SYSTEM, init=init, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one[0].weight, other[0].weight)


def test_without_a_seed_the_global_generator_decides():
    weights = []
    for _ in range(2):
        torch.manual_seed(11)
        weights.append(MLP(SYSTEM)[0].weight)
    assert torch.equal(*weights)
    assert not torch.equal(weights[0], MLP(SYSTEM)[0].weight)


def test_slices_and_copies_work():
    controller = MLP(SYSTEM, hidden=(5,), seed=0)
    x = torch.randn(3, 6)
    torch.testing.assert_close(controller[2](controller[:2](x)), controller(x))
    torch.testing.assert_close(copy.deepcopy(controller)(x), controller(x))
    assert controller[-1] is controller[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": (100, 0)}, r"hidden must be widths from 1 to 65536, such as \(100, 100\), got \(100, 0\)"),
        ({"hidden": "100"}, "hidden must be widths"),
        ({"hidden": 16}, r"hidden must be widths from 1 to 65536, such as \(100, 100\), got 16"),
        ({"activation": "cosine"}, "activation must be one of tanh, relu, elu, silu, sigmoid, got 'cosine'"),
        ({"init": "he"}, "init must be one of glorot, zero-last, torch, got 'he'"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        MLP(SYSTEM, **arguments)


def test_grid_cnn_is_the_published_network():
    """Sizes of the published one for 32 points; channels fastest; the same function written out by hand."""
    system = SimpleNamespace(state_size=64, control_size=1)
    network = GridCNN(system, seed=0).double()
    shapes = [tuple(parameter.shape) for parameter in network.parameters()]
    assert shapes == [(60, 2, 3), (60,), (60, 60, 3), (60,), (1, 420), (1,)]
    x = torch.randn(3, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grid = x.reshape(3, 32, 2)
    _, first, _, second, _, _, output = network
    for layer in (first, second):
        windows = torch.stack([grid[:, i : i + 3] for i in range(0, grid.shape[1] - 2, 2)], dim=1)
        grid = torch.tanh(torch.einsum("bpkc,ock->bpo", windows, layer.weight) + layer.bias)
    expected = grid.reshape(3, -1) @ output.weight.T + output.bias
    torch.testing.assert_close(network(x), expected, rtol=1e-12, atol=1e-12)


def test_grid_cnn_starts_with_glorot():
    network = GridCNN(SimpleNamespace(state_size=64, control_size=1), seed=0)
    _, first, _, second, _, _, output = network
    for layer, fans in ((first, 3 * 2 + 3 * 60), (second, 3 * 60 + 3 * 60), (output, 421)):
        bound = (6 / fans) ** 0.5
        assert 0.9 * bound < float(layer.weight.detach().abs().max()) <= bound and not layer.bias.any()


def test_grid_cnn_errors():
    with pytest.raises(ValueError, match="a grid of at least 7 points"):
        GridCNN(SimpleNamespace(state_size=12, control_size=1))
    with pytest.raises(ValueError, match="activation must be one of"):
        GridCNN(SimpleNamespace(state_size=64, control_size=1), activation="cosine")


def test_a_gru_remembers_by_its_cell_and_sees_inputs():
    before = torch.get_rng_state()
    network = make_network("auto", SYSTEM, (5,), "tanh", "glorot", seed=3, inputs=1, memory=4)
    assert torch.equal(torch.get_rng_state(), before)
    gru = network.network
    assert gru.cell.weight_ih.shape == (12, 7) and 0.45 < gru.cell.weight_hh.abs().max() <= 0.5
    x, w, h = torch.randn(9, 6), torch.randn(9, 1), torch.randn(9, 4)
    c, remembered = network(x, w, h)
    expected = gru.cell(torch.cat([x, w], dim=1), h)
    torch.testing.assert_close((c, remembered), (gru.layers(expected), expected))
    again, other = (make_network("gru", SYSTEM, (5,), "tanh", "glorot", seed, memory=4) for seed in (3, 4))
    assert not torch.equal(again.cell.weight_hh, other.cell.weight_hh)
    assert [tensor.shape for tensor in again(x, h)] == [(9, 2), (9, 4)]
