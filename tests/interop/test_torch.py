"""The torch bridge: memory, several passes, several rollouts, all the ways in which people use autograd."""

import copy
import gc
import io
import threading
import weakref

import numpy as np
import pytest
import torch
import warp as wp
from torch.utils._python_dispatch import TorchDispatchMode

from tests.rollout.reference import gradient, relative, unroll
from tests.toy import TwoControls
from warp_phys import CartPole, Diverged, Flow
from warp_phys.engine import phases
from warp_phys.flow import linear_parts, resolve
from warp_phys.interop.torch import Rollout
from warp_phys.interop.torch import rollout as bridge
from warp_phys.interop.torch.loss import rows_of_parameters

STEPS = 60
SYSTEM = CartPole(poles=2, dt=0.05)


def network(system=SYSTEM, device="cpu", dtype=torch.float64, seed=0, hidden=16):
    generator = torch.Generator().manual_seed(seed)
    net = torch.nn.Sequential(
        torch.nn.Linear(system.state_size, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, system.control_size)
    ).to(dtype)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=dtype) / 2)
    return net.to(device)


def start(device="cpu", batch=8, seed=0, system=SYSTEM, dtype=np.float64):
    return torch.as_tensor(system.sample(batch, seed, dtype), device=device)


def flat(net):
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def update(rollout, *batches, scale=1.0):
    """Return the gradients after one backward pass per batch, from cleared gradients."""
    rollout.controller.zero_grad()
    for x0 in batches:
        (scale * SYSTEM.loss(*rollout(x0))).backward()
    return flat(rollout.controller).clone()


def test_memory_is_shared(device, monkeypatch):
    """What torch returns is what the kernels wrote, and the weights that they read are the parameters."""
    seen = []
    original = phases.forward
    monkeypatch.setattr(bridge, "forward", lambda *a: (seen.append(a), original(*a))[1])
    net = network(device=device)
    rollout = Rollout(SYSTEM, net, STEPS)
    states, controls = rollout(start(device))
    _, adapter, states_array, controls_array = seen[0][:4]
    assert states_array.ptr == states.data_ptr() and controls_array.ptr == controls.data_ptr()
    pointers = [array.ptr for array in adapter.dense().parameters]
    assert pointers == [p.data_ptr() for p in net.parameters()]


def test_shapes_and_the_first_state(device):
    x0 = start(device)
    states, controls = Rollout(SYSTEM, network(device=device), STEPS)(x0)
    assert states.shape == (STEPS + 1, 8, 6) and controls.shape == (STEPS, 8, 1)
    assert torch.equal(states[0], x0) and states.requires_grad and controls.requires_grad


@pytest.mark.parametrize("flow", ["R", "C"])
def test_the_same_bits_again(flow):
    net = network(dtype=torch.float32)
    x0 = start(dtype=np.float32)
    a, b = (update(Rollout(SYSTEM, net, STEPS, flow), x0) for _ in range(2))
    assert torch.equal(a, b)


def test_gradients_are_not_changed_behind_the_users_back(device):
    """Clipping in place must not change the report, nor an earlier gradient."""
    net = network(device=device)
    rollout = Rollout(SYSTEM, net, STEPS, "C")
    before = update(rollout, start(device))
    kept = [p.grad for p in net.parameters()]
    norm = rollout.report.norm
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1e-6)
    net.zero_grad()
    update(rollout, start(device, seed=1))
    assert relative(torch.cat([g.flatten() for g in kept]), 1e-6 * before / before.norm()) < 1e-4
    assert norm == pytest.approx(float(before.norm()), rel=1e-10)


def test_no_grad_and_evaluation_mode(device):
    net = network(device=device)
    rollout, x0 = Rollout(SYSTEM, net, STEPS), start(device)
    attached, _ = rollout(x0)
    with torch.no_grad():
        states, controls = rollout(x0)
    assert not states.requires_grad and not controls.requires_grad
    assert torch.equal(states, attached.detach())
    net.eval()
    assert torch.equal(rollout(x0)[0].detach(), states) and rollout(x0)[0].requires_grad
    with torch.inference_mode():
        assert torch.equal(rollout(x0)[0], states)


def test_dropout_works_in_evaluation_mode_only(device):
    """Dropout gives other controls each time: there is no backward pass of it that would be right."""
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1)).double().to(device)
    rollout, x0 = Rollout(SYSTEM, net, STEPS), start(device)
    assert rollout.backend == "general"
    with pytest.raises(ValueError, match="controller must give the same controls for the same states each time"):
        SYSTEM.loss(*rollout(x0)).backward()
    net.eval()
    SYSTEM.loss(*rollout(x0)).backward()
    assert torch.isfinite(flat(net)).all() and flat(net).any()


def test_frozen_parameters(device):
    net = network(device=device)
    x0 = start(device)
    full = update(Rollout(SYSTEM, net, STEPS, "C"), x0)
    sizes = [p.numel() for p in net.parameters()]
    for kind in ("dense", "module"):
        module = net if kind == "dense" else torch.nn.Sequential(net, torch.nn.Identity())
        net.zero_grad()
        net[0].weight.requires_grad_(False)
        SYSTEM.loss(*Rollout(SYSTEM, module, STEPS, "C")(x0)).backward()
        net[0].weight.requires_grad_(True)
        assert net[0].weight.grad is None
        rest = torch.cat([p.grad.flatten() for p in list(net.parameters())[1:]])
        assert relative(rest, full[sizes[0] :]) < 1e-10


def test_gradients_of_initial_states_alone(device):
    """A controller that is not trained still passes feedback on."""
    net = network(device=device).requires_grad_(False)
    x0 = start(device).requires_grad_()
    rollout = Rollout(SYSTEM, net, 10, "R")
    SYSTEM.loss(*rollout(x0)).backward()
    h, d = 1e-6, torch.randn(x0.shape, generator=torch.Generator().manual_seed(0), dtype=x0.dtype).to(device)
    with torch.no_grad():
        plus, minus = (SYSTEM.loss(*rollout(x0 + s * h * d)) for s in (1, -1))
    assert float((x0.grad * d).sum()) == pytest.approx(float(plus - minus) / (2 * h), rel=1e-7)


def test_any_expression_of_states_and_controls(device):
    """Not only the system's own loss: R against finite differences through the initial state."""
    net, x0 = network(device=device), start(device).requires_grad_()
    rollout = Rollout(SYSTEM, net, 10, "R")

    def loss(x0):
        states, controls = rollout(x0)
        return (states[3:, :, 2] * controls[2:, :, 0].mean().exp()).square().mean() + states[0].sum() * 0.1

    (grad,) = torch.autograd.grad(loss(x0), x0)
    h, d = 1e-6, torch.randn(x0.shape, generator=torch.Generator().manual_seed(0), dtype=x0.dtype).to(device)
    with torch.no_grad():
        rate = float(loss(x0 + h * d) - loss(x0 - h * d)) / (2 * h)
    assert float((grad * d).sum()) == pytest.approx(rate, rel=1e-7)


@pytest.mark.parametrize("flow", ["R", "M", "C"])
@pytest.mark.parametrize("per_sample", [True, False])
def test_gradients_of_physical_parameters(per_sample, flow, device):
    """R against finite differences; the loss depends on the target, too."""
    system = TwoControls()
    net, x0 = network(system, device), start(device, 6, system=system)
    rollout = Rollout(system, net, 15, flow)
    count = 6 if per_sample else 1
    values = {"stiffness": torch.linspace(1.0, 2.0, count, dtype=torch.float64, device=device).requires_grad_()}
    values["target"] = torch.linspace(0.5, 0.9, count, dtype=torch.float64, device=device).requires_grad_()

    def loss(values):
        return system.loss(*rollout(x0, values), "every", 0.1, parameters=values)

    grads = torch.autograd.grad(loss(values), list(values.values()))
    assert all(g.shape == (count,) and g.any() for g in grads)
    if flow == "R":
        h = 1e-6
        for name, grad in zip(values, grads, strict=True):
            for i in range(count):
                shifted = []
                for sign in (1, -1):
                    moved = {key: value.detach().clone() for key, value in values.items()}
                    moved[name][i] += sign * h
                    with torch.no_grad():
                        shifted.append(float(loss(moved)))
                assert float(grad[i]) == pytest.approx((shifted[0] - shifted[1]) / (2 * h), rel=1e-6)


def test_numpy_and_dlpack_initial_states(device):
    net = network(device=device, dtype=torch.float32)
    rollout, x0 = Rollout(SYSTEM, net, 5), SYSTEM.sample(4)
    expected = rollout(torch.as_tensor(x0, device=device))[0]
    assert torch.equal(rollout(x0)[0], expected)
    assert torch.equal(rollout(x0.astype(np.float64))[0], expected)
    assert torch.equal(rollout(wp.array(x0, device=device))[0], expected)


def test_losses_of_all_kinds_of_arrays(device):
    states, controls = (t.detach() for t in Rollout(SYSTEM, network(device=device), 7)(start(device)))
    value = float(SYSTEM.loss(states, controls, "every", 0.2))
    assert SYSTEM.loss(states.cpu().numpy(), controls.cpu().numpy(), "every", 0.2) == pytest.approx(value, rel=1e-12)
    arrays = wp.from_torch(states), wp.from_torch(controls)
    assert SYSTEM.loss(*arrays, "every", 0.2).numpy()[0] == pytest.approx(value, rel=1e-12)


def test_report(device):
    net = network(device=device)
    rollout, x0 = Rollout(SYSTEM, net, STEPS, "C"), start(device)
    combined = update(rollout, x0)
    base, other = (update(Rollout(SYSTEM, net, STEPS, flow), x0) for flow in "MR")
    assert rollout.report.norms == pytest.approx(
        {"modified": float(base.norm()), "regular": float(other.norm())}, rel=1e-9
    )
    assert rollout.report.norm == pytest.approx(float(combined.norm()), rel=1e-9)
    assert rollout.report.cosine == pytest.approx(float(base @ other / base.norm() / other.norm()), rel=1e-9)
    assert rollout.report.agreement == pytest.approx(float((base.sign() == other.sign()).double().mean()))
    norms = "|M| {:.3g}, |R| {:.3g}, |update| {:.3g}, cosine".format(
        *(float(v.norm()) for v in (base, other, combined))
    )
    assert str(rollout.report).startswith(norms) and "tensor" not in repr(rollout.report)


def test_observing_other_flows_changes_nothing(device):
    net = network(device=device)
    rollout, x0 = Rollout(SYSTEM, net, STEPS, "S"), start(device)
    alone = update(rollout, x0)
    assert np.isnan(rollout.report.cosine) and list(rollout.report.norms) == ["stopped"]
    rollout.observe = ("modified", "regular")
    assert relative(update(rollout, x0), alone) < 1e-12
    assert list(rollout.report.norms) == ["stopped", "modified", "regular"] and -1 <= rollout.report.cosine <= 1


def test_a_rollout_inside_a_backward_pass(device):
    """Re-entrant use: a gradient hook that runs and differentiates another rollout."""
    net, inner_net = network(device=device), network(device=device, seed=1)
    rollout, inner = Rollout(SYSTEM, net, STEPS, "C"), Rollout(SYSTEM, inner_net, STEPS, "C")
    x0 = start(device)
    expected, expected_inner = update(rollout, x0), update(inner, x0)
    net.zero_grad()
    inner_net.zero_grad()
    states, controls = rollout(x0)

    @torch.enable_grad()
    def train_inner(_grad):
        SYSTEM.loss(*inner(x0)).backward()

    states.register_hook(train_inner)
    SYSTEM.loss(states, controls).backward()
    assert torch.equal(flat(net), expected) and torch.equal(flat(inner_net), expected_inner)


def test_threads(device):
    """Two trainings side by side in threads give what each gives alone."""
    expected, results = {}, {}

    def train(seed, out):
        net = network(device=device, seed=seed)
        optimiser = torch.optim.SGD(net.parameters(), 0.1)
        rollout = Rollout(SYSTEM, net, STEPS, "C")
        for i in range(5):
            optimiser.zero_grad()
            SYSTEM.loss(*rollout(start(device, seed=i))).backward()
            optimiser.step()
        out[seed] = torch.cat([p.detach().flatten() for p in net.parameters()])

    for seed in (0, 1):
        train(seed, expected)
    threads = [threading.Thread(target=train, args=(seed, results)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (0, 1):
        assert torch.equal(results[seed], expected[seed])


def test_nothing_of_torchs_is_kept(device):
    """After a backward pass neither gradients nor trajectories stay alive."""
    net = network(device=device)
    rollout = Rollout(SYSTEM, net, STEPS, "C")
    alive = []
    states, controls = rollout(start(device))
    states.register_hook(lambda grad: alive.append(weakref.ref(grad)))
    alive.append(weakref.ref(states))
    SYSTEM.loss(states, controls).backward()
    del states, controls
    gc.collect()
    assert len(alive) == 2 and [reference() for reference in alive] == [None, None]
    alive = [weakref.ref(net), weakref.ref(net[0].weight)]
    del net, rollout
    gc.collect()
    assert [reference() for reference in alive] == [None, None]


def test_copies_and_files_of_a_trained_controller(device):
    net = network(device=device)
    rollout = Rollout(SYSTEM, net, STEPS, "C")
    expected = update(rollout, start(device))
    twin = copy.deepcopy(net)
    assert torch.equal(update(Rollout(SYSTEM, twin, STEPS, "C"), start(device)), expected)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(update(Rollout(SYSTEM, loaded, STEPS, "C"), start(device)), expected)


def test_a_change_of_parameters_before_the_backward_pass_is_noticed(device):
    net = network(device=device)
    loss = SYSTEM.loss(*Rollout(SYSTEM, net, STEPS)(start(device)))
    with torch.no_grad():
        net[0].weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="a parameter of the controller has been modified in place"):
        loss.backward()


def test_a_second_derivative_is_refused(device):
    net = network(device=device)
    loss = SYSTEM.loss(*Rollout(SYSTEM, net, STEPS)(start(device)))
    with pytest.raises(RuntimeError, match="differentiated once: create_graph=True is not supported"):
        torch.autograd.grad(loss, list(net.parameters()), create_graph=True)


def test_diverged_and_masked(device):
    net = network(device=device)
    x0 = start(device)
    x0[2, 1] = 1e300  # a cart so fast that its position overflows
    x0[5, 3] = 1e200
    with pytest.raises(Diverged) as caught:
        Rollout(SYSTEM, net, STEPS)(x0)
    assert 5 in caught.value.samples and caught.value.step >= 1
    bad = list(caught.value.samples)
    good = [i for i in range(8) if i not in bad]
    rollout = Rollout(SYSTEM, net, STEPS, "C", on_divergence="mask")
    states, controls = rollout(x0)
    assert torch.isfinite(states).all() and torch.isfinite(controls).all()
    weight = torch.zeros(8, dtype=torch.float64, device=device)
    weight[good] = 1 / len(good)
    net.zero_grad()
    ((1 - states[-1, :, 2::2].cos().mean(1)) * weight).sum().backward()
    assert list(rollout.report.diverged) == bad
    masked = flat(net).clone()
    assert relative(masked, update(Rollout(SYSTEM, net, STEPS, "C"), x0[good])) < 1e-10
    with pytest.raises(Diverged):
        rollout(x0[bad])  # none is left


@pytest.mark.parametrize("backend", ["fused", "general"])
@pytest.mark.parametrize("is_asked_for", [False, True])
def test_masked_for_a_physical_parameter(backend, is_asked_for, device):
    """A pole with next to no length divides by nothing: at a healthy sample's states as well."""
    net, x0 = network(device=device), start(device)
    lengths = torch.full((8,), SYSTEM.half_length, dtype=torch.float64, device=device)
    lengths[2] = 5e-324
    lengths.requires_grad_(is_asked_for)
    good = [i for i in range(8) if i != 2]
    rollout = Rollout(SYSTEM, net, STEPS, "C", on_divergence="mask", backend=backend)
    net.zero_grad()
    SYSTEM.loss(*rollout(x0, {"half_length": lengths})).backward()
    masked = flat(net).clone()
    assert rollout.report.diverged == (2,)
    net.zero_grad()
    own = lengths.detach()[good].requires_grad_(is_asked_for)
    healthy = Rollout(SYSTEM, net, STEPS, "C", backend=backend)(x0[good], {"half_length": own})
    (SYSTEM.loss(*healthy) * 7 / 8).backward()
    assert relative(masked, flat(net)) < 1e-10
    if is_asked_for:
        assert lengths.grad[2] == 0.0 and own.grad.any()
        assert relative(lengths.grad[good], own.grad) < 1e-10


def test_chunks_do_not_change_the_numbers(device, monkeypatch):
    """A horizon and a batch of many chunks: more samples than rows of a chunk, and more steps."""
    net = torch.nn.Sequential(network(device=device), torch.nn.Identity())
    results = []
    for rows in (2048, 24, 5, 3):  # blocks of 5 and 3 samples: the last one is a part
        monkeypatch.setattr(phases, "CHUNK_ROWS", rows)
        for x0 in (start(device), start(device).requires_grad_()):
            results.append(update(Rollout(SYSTEM, net, STEPS, "C"), x0))
    for result in results[1:]:
        assert relative(result, results[0]) < 1e-10


@pytest.mark.parametrize("kind", ["dense", "module"])
def test_memory_over_the_horizon_is_the_trajectory(kind, device, monkeypatch):
    """What a backward pass allocates besides does not grow with the horizon, nor with the batch beyond a chunk."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # each thread of a batch has as much
    sizes = []
    for steps, batch in ((600, 8), (6232, 8), (40, 5000)):
        net = network(device=device, hidden=4)
        with torch.no_grad():
            net[2].weight.zero_()  # hanging poles under no force: stable over any horizon
        rollout = Rollout(CartPole(poles=2, dt=1e-3), net if kind == "dense" else torch.nn.Sequential(net), steps, "C")
        states, controls = rollout(start(device, batch))
        SYSTEM.loss(states, controls, "every").backward()
        arrays = rollout._workspaces[0]._arrays
        sizes.append(sum(array.capacity for key, array in arrays.items() if key[0] != "lambda"))
    assert sizes[0] == sizes[1] and sizes[2] < 1.5 * sizes[0]  # 6232 leaves the same remainder of a chunk as 600


@pytest.mark.parametrize("flow", ["R", "M", "C", Flow(0.9, 0.7, window=8)])
@pytest.mark.parametrize("kind", ["dense", "module"])
def test_step_by_step_equals_parallel(flow, kind, device, monkeypatch):
    system = TwoControls()
    net, x0 = network(system, device), start(device, 6, system=system).requires_grad_()
    rollout = Rollout(system, net if kind == "dense" else torch.nn.Sequential(net, torch.nn.Identity()), 20, flow)
    results = []
    for parallel in (True, False):
        monkeypatch.setattr(phases, "parallel_in_time", lambda *_, parallel=parallel: parallel)
        net.zero_grad()
        stiffness = torch.tensor([1.4], dtype=torch.float64, device=device, requires_grad=True)
        x0.grad = None
        system.loss(*rollout(x0, {"stiffness": stiffness}), "every", 0.1).backward()
        results.append(torch.cat([flat(net), x0.grad.flatten(), stiffness.grad]))
    assert relative(results[1], results[0]) < 1e-10


@pytest.mark.parametrize(
    ("flow", "batch", "controls", "parallel"),
    [
        ("R", 256, 1, True),  # one pass over all rows, where each step that is walked takes one of its own
        ("R", 8, 33, True),
        ("R", 256, 33, False),
        ("M", 256, 33, True),  # nothing is asked of the controller
        ("C", 256, 33, False),  # of two flows one goes through the controller
        ("C", 5000, 2, True),
        ("C", 5000, 9, False),
        (Flow(window=1), 256, 33, True),
    ],
)
def test_the_choice_of_a_way_counts_passes_and_steps(flow, batch, controls, parallel):
    """By counts alone: of a GRU of 32 units whose memory stands in the state, for instance."""
    trajectory = phases.Trajectory(None, np.zeros((100, batch, controls)), None)
    adapter = type("GRU", (), {"multiply_adds": 3681})()
    is_open = phases.flow_gates(linear_parts(resolve(flow)), 100)[:, :, 1] != 0.0
    assert phases.parallel_in_time(adapter, trajectory, is_open) is parallel


class Waits(TorchDispatchMode):
    """Counts how often numbers are asked for that may still be computed."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_physical_parameters_are_waited_for_once(device):
    x0, names = start(device), SYSTEM.parameter_names
    values = {name: torch.full((8,), getattr(SYSTEM, name), device=device) for name in names}
    with Waits() as waits:
        rows = rows_of_parameters(SYSTEM, values, x0)
    assert waits.count == 1 and rows.shape == (8, len(names)) and rows.device == x0.device
    for name, wrong, message in (("gravity", np.nan, "finite, got nan"), ("dt", -0.1, "positive, got -0.1")):
        with pytest.raises(ValueError, match=f"parameter {name} must be {message}"):
            rows_of_parameters(SYSTEM, {**values, name: wrong}, x0)
        with pytest.raises(ValueError, match=f"parameter {name} must be {message.split(',')[0]}"):
            rows_of_parameters(SYSTEM, {**values, name: torch.full((8,), wrong, device=device)}, x0)


class Spring:
    """A simulator that is no System: two verbs in numpy, without physical parameters."""

    state_size, control_size = 2, 1

    def step(self, x, c, y):
        x, c = x.numpy(), c.numpy()
        v = x[:, 1:] + 0.1 * (c - np.sin(x[:, :1]))
        y.assign(np.concatenate([x[:, :1] + 0.1 * v, v], axis=1))

    def step_vjp(self, x, c, adj_y, adj_x, adj_c):
        x, adj_y = x.numpy(), adj_y.numpy()
        adj_v = adj_y[:, 1:] + 0.1 * adj_y[:, :1]
        adj_x.assign(np.concatenate([adj_y[:, :1] - 0.1 * np.cos(x[:, :1]) * adj_v, adj_v], axis=1))
        adj_c.assign(0.1 * adj_v)


@pytest.mark.parametrize("flow", ["R", "M", "S", "N"])
def test_a_simulator_that_is_no_system(flow):
    """Against torch with detach."""
    system = Spring()
    net = network(system)
    x0 = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(6, 2)

    def step(x, c):
        v = x[:, 1:] + 0.1 * (c - x[:, :1].sin())
        return torch.cat([x[:, :1] + 0.1 * v, v], dim=1)

    states, _ = unroll(step, net, x0, resolve(flow).gates(30))
    expected = gradient(states[-1].square().sum(), list(net.parameters()))
    net.zero_grad()
    Rollout(system, net, 30, flow)(x0)[0][-1].square().sum().backward()
    assert relative(flat(net), expected) < 1e-10


def test_by_hand_equals_autograd(device):
    """The hand-written linearisation of dense layers, for every activation, both precisions."""
    activations = [torch.nn.Tanh, torch.nn.ReLU, torch.nn.ELU, torch.nn.SiLU, torch.nn.Sigmoid, None]
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        for activation in activations:
            for system in (SYSTEM, TwoControls()):
                net = network(system, device, dtype)
                if activation is None:  # a controller without hidden layers
                    net = network(system, device, dtype, hidden=system.control_size)[:1]
                else:
                    net[1] = activation()
                results = []
                for by_hand in (True, False):
                    rollout = Rollout(system, net, 10, "C", backend="general")
                    rollout._adapter.by_hand = by_hand
                    net.zero_grad()
                    x0 = start(device, 6, system=system).to(dtype)
                    system.loss(*rollout(x0), "every").backward()
                    results.append(flat(net).double())
                assert relative(results[0], results[1]) < tolerance, (dtype, activation, system)
