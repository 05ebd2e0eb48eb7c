"""Controllers as Warp kernels: dense layers, on a tape, linearised by hand, or fused with the physics."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import warp as wp

from warp_phys.core.arrays import aligned_zeros, check_array, numpy_type, real_type
from warp_phys.core.checks import check_device, check_seed
from warp_phys.core.gate import active_tape
from warp_phys.engine import dense_kernels as kernels
from warp_phys.errors import check_choice, check_count, shown
from warp_phys.programs.activations import ACTIVATIONS
from warp_phys.programs.block_network import BlockNetwork
from warp_phys.programs.network import Network
from warp_phys.programs.program import chain


class Workspace:
    """Arrays that are allocated once and kept: a captured graph goes on using their memory."""

    def __init__(self):
        self._arrays: dict[tuple, wp.array] = {}

    def array(self, name: str, shape: Sequence[int], dtype: Any, device: Any) -> wp.array:
        """Return the array of this name, shape and type; its contents are what was written last."""
        key = (name, tuple(shape), dtype, str(device))
        if key not in self._arrays:
            self._arrays[key] = aligned_zeros(key[1], dtype, device)
        return self._arrays[key]


class Dense:
    """Dense layers c = N(x; θ): an activation after every layer but the last.

    Args:
        sizes: Layer sizes from D to K, for instance (10, 100, 100, 1).
        activation: One of `warp_phys.programs.activations.ACTIVATIONS`.
        parameters: Weights (out, in) and biases (out,) in turn, as Warp arrays whose memory is used; None makes
            Glorot-uniform weights and zero biases.
        device: Warp device of new parameters.
        dtype: float32 or float64, precision of new parameters.
        seed: Seed of new parameters.

    Copies and pickles have weights of their own.

    Raises:
        TypeError, ValueError: Sizes, names or arrays that do not fit.

    >>> Dense((4, 8, 1), device="cpu").control_size
    1
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: str = "tanh",
        parameters: Sequence[wp.array] | None = None,
        device: Any = None,
        dtype: Any = np.float32,
        seed: int = 0,
    ):
        if not isinstance(sizes, Iterable):
            raise TypeError(f"sizes must be numbers of inputs, hidden units and outputs, got {shown(sizes)}")
        self.sizes = tuple(check_count("sizes", size) for size in sizes)
        if len(self.sizes) < 2:
            raise ValueError(f"sizes must name at least an input and an output, got {self.sizes}")
        self.activation = check_choice("activation", activation, ACTIVATIONS)
        if parameters is None:
            parameters = _glorot(self.sizes, check_device(device), real_type(dtype), check_seed(seed))
        self.parameters = self._check(parameters)
        self.real = self.parameters[0].dtype
        self.device = self.parameters[0].device
        self._workspace = Workspace()
        program = chain(self.sizes, self.activation)
        self._network = Network(program, self.real) if wp.get_device(self.device).is_cpu else None
        self._blocks = None if self._network else BlockNetwork(program, self.real, self.device)

    def __reduce__(self):  # arrays of Warp cannot be copied
        numbers = [(p.numpy().copy(), p.requires_grad) for p in self.parameters]
        return _rebuilt, (type(self), self.sizes, self.activation, numbers, str(self.device))

    def _check(self, parameters: Sequence[wp.array]) -> tuple[wp.array, ...]:
        shapes = _shapes(self.sizes)
        if not isinstance(parameters, Sequence):
            raise TypeError(f"parameters must be Warp arrays, weights and biases in turn, got {shown(parameters)}")
        if len(parameters) != len(shapes):
            raise ValueError(f"sizes {self.sizes} need {len(shapes)} parameters, got {len(parameters)}")
        first = parameters[0] if isinstance(parameters[0], wp.array) else None
        for i, (array, shape) in enumerate(zip(parameters, shapes, strict=True)):
            check_array(f"parameters[{i}]", array, shape, first)
        return tuple(parameters)

    @property
    def state_size(self) -> int:
        """Number D of inputs."""
        return self.sizes[0]

    @property
    def control_size(self) -> int:
        """Number K of outputs."""
        return self.sizes[-1]

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of one evaluation of one row."""
        return sum(n * m for n, m in zip(self.sizes[:-1], self.sizes[1:], strict=True))

    def evaluate(self, x: wp.array, c: wp.array) -> None:
        """Write c = N(x) for rows x (N, D), c (N, K); an active tape records it."""
        recording = active_tape() is not None
        for i, (weight, bias) in enumerate(self._layers()):
            last = i == len(self.sizes) - 2
            y = c if last else self._hidden(i, len(x), recording)
            kernel = kernels.dense_kernel("identity" if last else self.activation, self.real)
            wp.launch(kernel, dim=y.shape, inputs=[x, weight, bias], outputs=[y], device=self.device)
            x = y

    def linearise(self, x: wp.array, workspace: Workspace, fused: bool = False) -> "DenseLinearisation":
        """Return the controller linearised at the rows x (N, D)."""
        return DenseLinearisation(self, x, workspace)

    def gradients(self, workspace: Workspace, name: str) -> list[wp.array]:
        """Return zeroed arrays of the shapes of the parameters, for `DenseLinearisation.contract`."""
        arrays = [workspace.array(f"{name}{i}", p.shape, self.real, self.device) for i, p in enumerate(self.parameters)]
        for array in arrays:
            array.zero_()
        return arrays

    def evaluator(self, states: wp.array, controls: wp.array) -> Callable[[int], None]:
        """Return a function that writes controls[n] = N(states[n]), shapes (steps + 1, B, D) and (steps, B, K)."""
        return lambda n: self.evaluate(states[n], controls[n])

    def fits(self, system: Any) -> bool:
        """Whether the whole unrolling with this system runs as one fused kernel."""
        return hasattr(system, "functions")

    def sweeps(self, system: Any) -> bool:
        """Whether `sweep` can run the whole backward pass: where `fits` holds, on a CPU."""
        return self._network is not None and self.fits(system)

    def sweep(
        self, system: Any, trajectory: Any, seeds: Any, gates: wp.array, adj_x: wp.array,
        gradients: Sequence[Sequence[wp.array]], workspace: Workspace, adj_p: wp.array | None = None,
        adj_inputs: wp.array | None = None,
    ) -> None:  # fmt: skip
        """Run all flows backward in one kernel: see `Network.sweep`; add the updates to `gradients`."""
        network = self._packed_network()
        packed = network.sweep(system, trajectory, seeds, gates, adj_x, workspace, adj_p, adj_inputs)
        network.unpack(packed, [[array.ptr for array in arrays] for arrays in gradients], lasting=True)

    def _packed_network(self) -> Network:
        assert self._network is not None
        self._network.pack(self._addresses(), lasting=True)
        return self._network

    def _addresses(self) -> list[int]:
        """Return where a kernel finds the parameters: their own memory, or a copy of what is not contiguous."""
        arrays = list(self.parameters)
        for i, array in enumerate(arrays):
            if not array.is_contiguous:
                arrays[i] = self._workspace.array(f"parameter {i}", array.shape, self.real, self.device)
                kernel = (kernels.copy_weight_kernel, kernels.copy_bias_kernel)[i % 2](self.real)
                wp.launch(kernel, array.shape, [array], [arrays[i]], device=self.device, record_tape=False)
        return [array.ptr for array in arrays]

    def unroll(
        self, system: Any, states: wp.array, controls: wp.array, parameters: wp.array, keep: bool = False
    ) -> Any:
        """Write states[1:] and controls from states[0], controller and physics in one kernel; keep nothing."""
        if self._blocks is not None:
            self._blocks.unroll(self._addresses(), system, states, controls, parameters)
        else:
            self._packed_network().unroll(system, states, controls, parameters, keep=False)

    def _layers(self):
        return zip(self.parameters[::2], self.parameters[1::2], strict=True)

    def _hidden(self, i: int, rows: int, recording: bool) -> wp.array:
        """Return the output array of hidden layer i: a new one for a tape, which must find it unchanged."""
        shape = (rows, self.sizes[i + 1])
        if recording:
            return wp.empty(shape, dtype=self.real, device=self.device, requires_grad=True)
        return self._workspace.array(f"hidden{i}", shape, self.real, self.device)


def _rebuilt(kind: type, sizes: tuple[int, ...], activation: str, numbers: Sequence[Any], device: str) -> Dense:
    """Return layers from what a pickle holds of them."""
    real = real_type(numbers[0][0].dtype)
    arrays = [wp.array(values, dtype=real, device=device, requires_grad=grad) for values, grad in numbers]
    return kind(sizes, activation, arrays)


class DenseLinearisation:
    """Dense layers at fixed rows: outputs of every layer and slopes of its activation."""

    def __init__(self, dense: Dense, x: wp.array, workspace: Workspace):
        self.dense, self.workspace = dense, workspace
        self.inputs, self.slopes = [x], []
        for i, (weight, bias) in enumerate(dense._layers()):
            last = i == len(dense.sizes) - 2
            shape = (len(x), dense.sizes[i + 1])
            y, slope = self._array(f"y{i}", shape), self._array(f"slope{i}", shape)
            kernel = kernels.dense_with_slope_kernel("identity" if last else dense.activation, dense.real)
            self._launch(kernel, shape, [self.inputs[-1], weight, bias], [y, slope])
            self.inputs.append(y)
            self.slopes.append(slope)

    def jacobian(self, out: wp.array) -> None:
        """Write ∂N/∂x, shape (N, K, D)."""
        rows, size = len(self.inputs[0]), self.dense.control_size
        seeds = self._array("seeds", (rows * size, size))
        self._launch(kernels.unit_rows_kernel(self.dense.real), seeds.shape, [size], [seeds])
        self._pull(seeds, out.reshape((rows * size, self.dense.state_size)), "jacobian", size)

    def pull(self, mu: wp.array, adj_x: wp.array) -> None:
        """Write adj_x = (∂N/∂x)ᵀ mu for rows mu (N, K)."""
        self._pull(mu, adj_x, "pull", 1)

    def contract(self, mu: wp.array, gradients: Sequence[Sequence[wp.array]]) -> None:
        """Add Σ (∂N/∂θ)ᵀ mu[f] over the rows of each flow f to gradients[f], one array per parameter."""
        kernel = kernels.contract_kernel(self.dense.real)
        for f, gradient in enumerate(gradients):
            for i, delta in self._deltas(mu[f], "contract", 1):
                weight, bias = gradient[2 * i], gradient[2 * i + 1]
                self._launch(kernel, weight.shape, [delta, self.inputs[i]], [weight, bias])

    def _pull(self, adj: wp.array, out: wp.array, name: str, repeat: int) -> None:
        for i, delta in self._deltas(adj, name, repeat):
            if i == 0:
                weight = self.dense.parameters[0]
                self._launch(kernels.transposed_kernel(self.dense.real), out.shape, [delta, weight], [out])

    def _deltas(self, adj: wp.array, name: str, repeat: int):
        """Yield (layer, adjoint before its activation) from the last layer to the first."""
        for i in reversed(range(len(self.slopes))):
            delta = self._array(f"{name} delta{i}", (len(adj), self.dense.sizes[i + 1]))
            self._launch(kernels.slope_kernel(self.dense.real), delta.shape, [adj, self.slopes[i], repeat], [delta])
            yield i, delta
            if i > 0:
                adj = self._array(f"{name} adj{i}", (len(delta), self.dense.sizes[i]))
                weight = self.dense.parameters[2 * i]
                self._launch(kernels.transposed_kernel(self.dense.real), adj.shape, [delta, weight], [adj])

    def _array(self, name: str, shape: Sequence[int]) -> wp.array:
        return self.workspace.array(name, shape, self.dense.real, self.dense.device)

    def _launch(self, kernel, dim, inputs, outputs) -> None:
        wp.launch(kernel, dim=dim, inputs=inputs, outputs=outputs, device=self.dense.device, record_tape=False)


def _shapes(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the shapes of weights and biases in turn."""
    return [shape for n, m in zip(sizes[:-1], sizes[1:], strict=True) for shape in ((m, n), (m,))]


def _glorot(sizes, device, real, seed) -> list[wp.array]:
    generator, dtype = np.random.default_rng(seed), numpy_type(real)
    arrays = []
    for shape in _shapes(sizes):
        bound = np.sqrt(6.0 / sum(shape)) if len(shape) == 2 else 0.0
        values = generator.uniform(-bound, bound, shape).astype(dtype)
        arrays.append(wp.array(values, dtype=real, device=device, requires_grad=True))
    return arrays
