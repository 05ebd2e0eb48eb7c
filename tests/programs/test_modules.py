"""Modules as row programs: the general backend's numbers for every flow, or the general backend and a sentence.

Float64, one pole; each module is asked for by `backend="fused"`, and what is refused says why.
"""

import pytest
import torch

from warp_phys import CartPole
from warp_phys.errors import NotRepeatable
from warp_phys.interop.torch import Rollout
from warp_phys.interop.torch.program import Unreadable, read_program
from warp_phys.interop.torch.state import state_of

NN, F = torch.nn, torch.nn.functional
SYSTEM = CartPole(dt=0.02)
STEPS, FLOWS, BATCHES = 12, "RMSNC", (5, 1, 9)
SIZE = SYSTEM.state_size
TOLERANCE = 1e-10


class Module(NN.Module):
    """A module made of a function of itself and of states, and of parts by name."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, NN.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


def linear(inputs, outputs=1, **options):
    return NN.Linear(inputs, outputs, **options)


def parameter(*shape):
    return NN.Parameter(torch.randn(shape))


def frozen(part):
    return part.requires_grad_(False)


def gradients_of(rollout, flow, x0):
    """Return states, controls, adjoint of x0 (for a linear flow), and the `.grad` of every parameter."""
    rollout.flow = flow
    own = x0.clone().requires_grad_(flow != "C")
    for p in rollout.controller.parameters():
        p.grad = None
    states, controls = rollout(own)
    loss = SYSTEM.loss(states, controls, when="every", control_cost=0.3)
    loss.backward()
    found = {"states": states.detach(), "controls": controls.detach(), "x0": own.grad}
    return found | {name: p.grad for name, p in rollout.controller.named_parameters()}


def differences(module, fused, x0, flow):
    """Return what of a fused rollout is not as the general backend has it, relative to the largest of each tensor."""
    general = Rollout(SYSTEM, module, STEPS, flow, backend="general")
    new, old = (gradients_of(rollout, flow, x0) for rollout in (fused, general))
    wrong = {}
    for name, wanted in old.items():
        if wanted is None or new[name] is None:
            if wanted is not new[name]:
                wrong[name] = "is None" if new[name] is None else "is not None"
            continue
        error = (new[name] - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12)
        if not error <= TOLERANCE:
            wrong[name] = float(error)
    return wrong


def states(batch, seed=0):
    return torch.as_tensor(SYSTEM.sample(batch, seed=seed, dtype="float64"))


def check(module, flows=FLOWS, batches=BATCHES):
    """Compare all flows for the first batch, and for the others those that take both feedbacks, alone and combined."""
    fused = Rollout(SYSTEM, module, STEPS, backend="fused")
    assert fused.backend == "fused" and fused.why_general is None
    for batch in batches:
        for flow in flows if batch == batches[0] else "RC":
            assert not differences(module, fused, states(batch), flow), (batch, flow)


def double(make):
    """Return the module in double precision, its parameters moved off what they start with (norms' ones and zeros)."""
    torch.manual_seed(0)
    module = make().double()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return module.eval()


def norms_and_activations():
    middle = NN.ModuleList([
        NN.LayerNorm(6), NN.RMSNorm(6), NN.GELU(), NN.GELU(approximate="tanh"), NN.SiLU(), NN.ELU(0.7), NN.Softmax(1),
        NN.Softplus(2.0), NN.LeakyReLU(0.1), NN.Mish(), NN.Hardtanh(-0.4, 0.6), NN.ReLU(), NN.Tanhshrink(),
        NN.Softsign(),
    ])  # fmt: skip
    first = NN.ModuleList(linear(SIZE, 6) for _ in middle)
    last = NN.ModuleList(linear(6) for _ in middle)
    forward = lambda m, x: sum(c(b(a(x))) for a, b, c in zip(m.first, m.middle, m.last, strict=True))  # noqa: E731
    return Module(forward, first=first, middle=middle, last=last)


def more_norms_and_activations():
    middle = NN.ModuleList([
        NN.PReLU(6), NN.GLU(), NN.BatchNorm1d(6), NN.GroupNorm(3, 6), NN.LogSoftmax(1), NN.SELU(), NN.CELU(1.5),
        NN.Hardswish(), NN.LogSigmoid(), NN.ReLU6(), NN.Threshold(0.1, 0.3),
    ])  # fmt: skip
    first = NN.ModuleList(linear(SIZE, 6) for _ in middle)
    last = NN.ModuleList(linear(3 if isinstance(part, NN.GLU) else 6) for part in middle)
    forward = lambda m, x: sum(c(b(a(x))) for a, b, c in zip(m.first, m.middle, m.last, strict=True))  # noqa: E731
    return Module(forward, first=first, middle=middle, last=last)


def recurrent_cells():
    def forward(m, x):
        h = m.gru(x, m.start(x))
        h, c = m.lstm(h, (m.start(x), m.start(x[:, :4]).tanh()))
        return m.last(torch.cat([m.plain(h), c], 1))

    cells = {"gru": NN.GRUCell(SIZE, 5), "lstm": NN.LSTMCell(5, 5, bias=False), "plain": NN.Linear(5, 5)}
    return Module(forward, start=linear(SIZE, 5), last=linear(10), **cells)


def recurrent_networks():
    """Over the numbers of a state as a sequence, from zeros."""

    def forward(m, x):
        return m.last(torch.cat([m.gru(x[:, :, None])[0][:, -1], m.cell(x), m.lstm(x[:, :, None])[0][:, 1]], 1))

    cells = {
        "gru": NN.GRU(1, 3, batch_first=True),
        "lstm": NN.LSTM(1, 2, batch_first=True),
        "cell": NN.RNNCell(SIZE, 3),
    }
    return Module(forward, last=linear(8), **cells)


def attention():
    def forward(m, x):
        tokens = m.embed(x[:, :, None]) + m.places
        mixed, _ = m.heads(tokens, tokens, tokens, need_weights=False)
        return m.last(m.encoder(mixed)[:, 0])

    heads = NN.MultiheadAttention(4, 2, batch_first=True)
    encoder = NN.TransformerEncoderLayer(4, 2, 7, batch_first=True)
    return Module(forward, embed=linear(1, 4), last=linear(4), heads=heads, encoder=encoder, places=parameter(SIZE, 4))


def a_token_of_its_own():
    def forward(m, x):
        tokens = torch.cat([m.token.expand(x.shape[0], 1, 4), m.embed(x[:, :, None])], 1)
        return m.last(m.heads(tokens, tokens, tokens, need_weights=False)[0][:, 0])

    heads = NN.MultiheadAttention(4, 2, batch_first=True)
    return Module(forward, embed=linear(1, 4), last=linear(4), heads=heads, token=parameter(1, 1, 4))


def layout():
    """What moves numbers, and pieces of them."""

    def forward(m, x):
        angles = torch.stack([x[:, 2].sin(), x[:, 2].cos()], dim=-1)
        first, second = x.split([1, 3], dim=1)
        h = m.wide(torch.cat([angles, first, second.flip(1), x.roll(1, 1)], 1))
        h = h.unflatten(1, (3, 4)) + first[:, :, None].expand(-1, 3, 4)
        a, b, c = h.unbind(1)
        h = torch.stack([a * b, b - c.mean(-1, keepdim=True), c], 2).transpose(1, 2).reshape(-1, 12)
        return m.last(h)

    return Module(forward, wide=linear(10, 12), last=linear(12))


def products():
    def forward(m, x):
        h = torch.einsum("bi,ijk->bjk", x, m.tensor.exp()) + torch.einsum("bi,bj->bij", x, m.wide(x))
        y = m.matrix @ h + (h @ m.matrix.T) * m.vector
        y = m.pair(y.flatten(1).tanh(), x) + (x @ m.vector)[:, None]
        return (y + torch.addmm(m.vector[:1], x, m.column, beta=0.5)).tanh()

    own = {"tensor": parameter(4, 4, 4), "matrix": parameter(4, 4), "vector": parameter(4), "column": parameter(4, 1)}
    return Module(forward, wide=linear(4, 4), pair=NN.Bilinear(16, 4, 1), **own)


def angles():
    def forward(m, x):
        angle = (9 * x[:, 2:3] + torch.pi) % (2 * torch.pi) - torch.pi
        return m.last(torch.cat([angle, torch.fmod(7 * x, 1.0), F.normalize(x)], 1))

    return Module(forward, last=linear(1 + 2 * SIZE))


def numbers_by_their_place():
    def forward(m, x):
        h = torch.cat([x[:, [0, 3]], x.index_select(1, m.order), torch.ones_like(x[:, :1]), F.pad(x, (1, 2))], 1)
        return m.last(torch.cat([h, x.new_zeros(x.shape[0], 1)], 1))

    return Module(forward, last=linear(13), order=torch.tensor([3, 0]))


def choices():
    """Comparisons and reductions."""

    def forward(m, x):
        h = m.first(x)
        h = torch.where(h > m.limit, h, 0.1 * h) * m.limit + torch.where(x[:, :1] < 0, 1.0, h * h)
        h = h.clamp(-3, 2)
        g = h.unflatten(1, (2, 3))
        return m.last(torch.cat([g.mean((1, 2))[:, None], g.sum(1), g.sum(dim=2), h.softmax(1)], 1))

    return Module(forward, first=linear(SIZE, 6), limit=parameter(6), last=linear(1 + 3 + 2 + 6))


def more_choices():
    def forward(m, x):
        h = m.first(x)
        h = torch.where((h < 0) | ~(h < 0.3), 1.0, h * h).masked_fill(h.abs() < 0.05, 0.0)
        g = h.unflatten(1, (2, 3))
        return m.last(torch.cat([g.amax(2), g.logsumexp(1), g.var(2), F.normalize(m.first(x)), g.norm(dim=2)], 1))

    return Module(forward, first=linear(SIZE, 6), last=linear(2 + 3 + 2 + 6 + 2))


def shared_and_frozen():
    """Residuals, a layer that comes twice, gains, weights the other way round, no biases, frozen ones."""

    def forward(m, x):
        h = (x @ m.matrix) * m.gain + m.frozen
        for _ in range(2):
            h = h + m.shared(h).tanh()
        h = (h @ m.square).sigmoid() * m.scale[0]
        h = torch.add(h, m.none(x), alpha=0.5) * x[:, :1]
        return m.still(h) + m.last(h)

    parts = {"still": frozen(linear(5, 1)), "none": linear(SIZE, 5, bias=False), "frozen": frozen(parameter(5))}
    parts |= {"square": parameter(5, 5), "scale": parameter(3), "matrix": parameter(SIZE, 5), "gain": parameter(5)}
    return Module(forward, shared=linear(5, 5), last=linear(5), **parts)


def convolutions():
    def forward(m, x):
        h = m.first(x).unflatten(1, (2, 6))
        h = m.padded(h).relu() + m.circular(h).tanh() + m.wide(h)
        return m.last(torch.cat([m.strided(h).flatten(1), h[:, :, 0]], 1))

    parts = {
        "padded": NN.Conv1d(2, 3, 3, padding=1), "circular": NN.Conv1d(2, 3, 3, padding=1, padding_mode="circular"),
        "strided": NN.Conv1d(3, 2, 2, stride=2, bias=False), "wide": NN.Conv1d(2, 3, 3, dilation=2, padding="same"),
    }  # fmt: skip
    return Module(forward, first=linear(SIZE, 12), last=linear(9), **parts)


def convolutions_over_a_plane():
    def forward(m, x):
        h = F.max_pool2d(m.plane(m.first(x).unflatten(1, (1, 4, 4))).relu(), 2)
        return m.last(torch.cat([h.flatten(1), m.apart(h).mean((2, 3))], 1))

    parts = {"plane": NN.Conv2d(1, 2, 3, padding=1), "apart": NN.Conv2d(2, 2, 2, groups=2)}
    return Module(forward, first=linear(SIZE, 16), last=linear(10), **parts)


def in_place():
    """Written to on the way: temporaries, views of them, ReLU(inplace=True)."""

    def forward(m, x):
        h = m.first(x)
        h += x[:, :1]
        h[:, 0] = 1.0
        h[:, 1:3] *= x[:, 1:3]
        h.unsqueeze_(1).transpose_(1, 2)
        h.squeeze_(2)
        out = torch.zeros(len(h), 5, dtype=h.dtype)
        out[:, 1] = h[:, 2]
        out[:, 2:].copy_(h[:, 2:])
        return m.last(m.relu(out.add_(h)))

    return Module(forward, first=linear(SIZE, 5), relu=NN.ReLU(inplace=True), last=linear(5))


def dropout_that_rests():
    return NN.Sequential(linear(SIZE, 5), NN.Dropout(0.5), NN.Tanh(), NN.LayerNorm(5), linear(5))


def a_parameter_that_is_not_used():
    return Module(lambda m, x: m.last(x.sin()), last=linear(SIZE), unused=linear(3, 2))


def a_parameter_without_a_gradient():
    return Module(
        lambda m, x: torch.where(x[:, :1] > m.limit, m.last(x), x[:, :1]), last=linear(SIZE), limit=parameter(1)
    )


def weight_norm():
    return NN.Sequential(NN.utils.parametrizations.weight_norm(linear(SIZE, 5)), NN.Tanh(), linear(5))


def spectral_norm():
    return NN.Sequential(NN.utils.parametrizations.spectral_norm(linear(SIZE, 5)), NN.Tanh(), linear(5))


def computed_weights():
    """Bounded ones, ones made by another network, a softmax over them, positive ones."""

    def forward(m, x):
        w = m.maker(m.code).view(5, SIZE)
        h = F.linear(x, w, m.bias.tanh()) + F.linear(x, m.matrix.softmax(1)) + x @ m.matrix.T.exp()
        return F.linear(h, m.last.weight.clamp(-0.1, 0.2) + 0.1 * m.last.weight)

    parts = {"code": parameter(3), "matrix": parameter(5, SIZE), "bias": parameter(5)}
    return Module(forward, maker=linear(3, 5 * SIZE), last=linear(5, bias=False), **parts)


def a_large_matrix():
    forward = lambda m, x: m.last(F.linear(m.first(x), m.wide.tanh()))  # noqa: E731
    return Module(forward, first=linear(SIZE, 80), wide=parameter(80, 80), last=linear(80))


def a_place_that_is_computed():
    return Module(lambda m, x: m.last(m.table[(x[:, 2] > 0).long()] + x), table=parameter(2, SIZE), last=linear(SIZE))


def a_branch_on_numbers():
    return Module(lambda m, x: m.last(x) if bool((m.last.weight > 0).all()) else -m.last(x), last=linear(SIZE))


def a_number_of_a_tensor():
    return Module(lambda m, x: m.last(x) * m.last.bias.item(), last=linear(SIZE))


def a_length():
    return Module(lambda m, x: m.last(torch.cat([x, m.token.expand(len(x), 2)], 1)), last=linear(6), token=parameter(2))


def rounded():
    return Module(lambda m, x: m.last((8 * x).round() / 8 + x), last=linear(SIZE))


def truncated():
    return Module(lambda m, x: m.last(x) * (x[:, :1] * 4).to(torch.int64), last=linear(SIZE))


def counted():
    """True and true are true, not two: seldom enough that few states show it."""
    return Module(
        lambda m, x: m.last(x) * ((x[:, 2:3] > 9.6) + (x[:, 2:3] > 9.65)) + m.first(x),
        last=linear(SIZE),
        first=linear(SIZE),
    )


def counts_its_calls():
    """In a buffer of real numbers, which decides from some call on."""

    def function(m, x):
        m.calls += 1.0
        return m.last(x) * torch.where(m.calls > 400.0, -1.0, 1.0)

    return Module(function, last=linear(SIZE), calls=torch.zeros(()))


def sorted_rows():
    return Module(lambda m, x: m.last(x.sort(1)[0]), last=linear(SIZE))


def attention_over_the_batch():
    return Module(lambda m, x: m.last(x) + (x @ x.T).softmax(1) @ x[:, :1], last=linear(SIZE))


def statistics_of_the_batch():
    return Module(lambda m, x: m.last(x - x.mean(0)), last=linear(SIZE))


def no_layer():
    return Module(lambda m, x: (x * m.gain).sum(1, keepdim=True), gain=parameter(SIZE))


def a_part_of_weights():
    return Module(lambda m, x: F.linear(x, m.both[:1]), both=parameter(2, SIZE))


def no_gradient_inside():
    def forward(m, x):
        with torch.no_grad():
            h = m.first(x)
        return m.last(h + x)

    return Module(forward, first=linear(SIZE, SIZE), last=linear(SIZE))


def another_way_for_one():
    """Rows do not see each other, but one alone goes another way: that is refused later, when there is one."""
    return Module(lambda m, x: m.first(x) if x.shape[0] == 1 else m.last(x), first=linear(SIZE), last=linear(SIZE))


def a_hook():
    module = NN.Sequential(linear(SIZE, 5), NN.LayerNorm(5), linear(5))
    module[1].register_forward_hook(lambda part, inputs, output: 2 * output)
    return module


def clipped_adjoints():
    def forward(m, x):
        h = m.first(x).relu()
        if h.requires_grad:
            h.register_hook(lambda d: d.clamp(-0.01, 0.01))
        return m.last(h)

    return Module(forward, first=linear(SIZE, 5), last=linear(5))


class Sum(NN.Module):
    """The sum of several modules: one program, which takes less time to compile than one each."""

    def __init__(self, *makes):
        super().__init__()
        self.parts = NN.ModuleList(make() for make in makes)

    def forward(self, x):
        return sum(part(x) for part in self.parts)


TOGETHER = [
    (norms_and_activations, more_norms_and_activations),
    (recurrent_cells, recurrent_networks),
    (attention, a_token_of_its_own),
    (choices, more_choices, a_parameter_without_a_gradient),
    (layout, numbers_by_their_place, in_place, products, a_length),
    (convolutions, convolutions_over_a_plane),
    (shared_and_frozen, dropout_that_rests, rounded, angles, no_gradient_inside, a_parameter_that_is_not_used),
    (weight_norm, spectral_norm, computed_weights, a_part_of_weights),
]
"""Modules that are read as programs, some at a time."""


@pytest.mark.parametrize("makes", TOGETHER, ids=lambda makes: makes[0].__name__)
def test_modules_that_are_programs(makes):
    check(double(lambda: Sum(*makes)))


def test_attention_in_training_is_the_same_program():
    module, like = double(a_token_of_its_own), torch.zeros((), dtype=torch.float64)
    assert read_program(module, SIZE, like).plan == read_program(module.train(), SIZE, like).plan


def test_a_module_without_layers():
    check(double(no_layer), flows="MC", batches=(5,))


GENERAL = [
    a_branch_on_numbers, counts_its_calls, a_number_of_a_tensor, truncated, counted, sorted_rows,
    attention_over_the_batch, statistics_of_the_batch, another_way_for_one, a_hook, clipped_adjoints,
    a_place_that_is_computed, a_large_matrix,
]  # fmt: skip


@pytest.mark.parametrize("make", GENERAL, ids=lambda make: make.__name__)
def test_modules_that_are_not(make):
    """General, with a sentence; the passes before and after the reading have the same numbers."""
    module = double(make)
    rollout, seeds = Rollout(SYSTEM, module, STEPS), range(5)
    for seed in seeds:
        assert not differences(module, rollout, states(5, seed), "C")
    assert rollout.backend == "general" and len(rollout.why_general) > 10
    with pytest.raises(ValueError, match="fused"):
        Rollout(SYSTEM, module, STEPS, backend="fused")


def written_through_a_detached_view(m, x):
    h = m.last(x)
    h.detach().mul_(2.0)
    return h


def written_without_gradients(m, x):
    h = m.last(x)
    with torch.no_grad():
        h[:, 0] *= 2.0
    return h


def another_way_where_reading_fails(m, x):
    try:
        return -m.last(x) if (x.abs() > 20.0).any() else m.last(x)
    except Exception:
        return m.last(x)


def numbers_or_none(m, x):
    try:
        return m.last(x) * float(x.numpy().max() < 20.0)
    except Exception:
        return m.last(x)


def numbers_behind_a_tensor(m, x):
    far = torch.ones(len(x), x.shape[1], dtype=x.dtype)
    far.data = x.detach()
    return m.last(x) * torch.where((far.abs() > 20.0).any(1, keepdim=True), -1.0, 1.0)


def bits_of_numbers(m, x):
    return m.last(x) * torch.where(x.detach().view(torch.int64)[:, :1] > 4626322717216342016, -1.0, 1.0)


REFUSED = {
    "its rows depend on each other": [another_way_where_reading_fails],
    "the memory of a tensor": [numbers_behind_a_tensor, lambda m, x: m.last(x) + x.detach().clone().apply_(abs)],
    "the bits of its numbers": [bits_of_numbers],
    "no operation of row programs": [lambda m, x: torch.sinc(m.last(x))],
    "outside of autograd": [written_through_a_detached_view, written_without_gradients],
    "a number out of a tensor": [lambda m, x: m.last(x) if m.last.weight[0, 0] > 0.0 else -m.last(x)],
    "beside its numbers": [lambda m, x: m.last(x) * x.max(1)[1][:, None].to(x.dtype)],
    "as other tensors": [lambda m, x: m.last(x) * m.hidden[0]],
    "random numbers": [lambda m, x: m.last(x) * torch.rand(1, dtype=x.dtype)],
    "cannot be read": [
        numbers_or_none,
        lambda m, x: m.last(x) * m.last.bias.tolist()[0],
        lambda m, x: m.last(x + x.numpy().sum()),
    ],
    "its rows in another order": [lambda m, x: m.last(x.flip(0))],
    "converts": [lambda m, x: m.last(x).float().double()],
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_reading_refuses(reason):
    """Nothing that a program would not follow is taken for a constant; the module stays as it was."""
    for function in REFUSED[reason]:
        module = double(lambda function=function: Module(function, last=linear(SIZE)))
        module.hidden = [module.last.bias.detach()]
        before = state_of(module, outside=True)
        with pytest.raises(Unreadable, match=reason):
            read_program(module, SIZE, module.last.weight)
        assert state_of(module, outside=True) == before


def test_what_a_module_keeps_is_its_own():
    """A table by the size of a batch, made when it is first asked for: reading leaves nothing of its own in it."""
    kept = {}

    def function(m, x):
        if len(x) not in kept:
            kept[len(x)] = torch.full((len(x), 1), 0.5, dtype=x.dtype)
        return m.last(x) * kept[len(x)]

    module = double(lambda: Module(function, last=linear(SIZE)))
    rollout = Rollout(SYSTEM, module, STEPS)
    for seed in range(5):
        assert not differences(module, rollout, states(5, seed), "C")
    assert all(type(value) is torch.Tensor for value in kept.values())
    assert module(states(3)).detach().numpy().shape == (3, 1)


def test_random_numbers_are_refused_at_each_pass():
    module = double(lambda: NN.Sequential(linear(SIZE, 5), NN.Dropout(0.5), linear(5))).train()
    rollout = Rollout(SYSTEM, module, STEPS)
    for _ in range(5):
        with pytest.raises(NotRepeatable):
            SYSTEM.loss(*rollout(states(5))).backward()
    assert rollout.backend == "general"
