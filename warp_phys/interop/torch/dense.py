"""Dense torch layers linearised by hand: torch's matrix products, activations and slopes by a Warp kernel."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import warp as wp

from warp_phys.engine.dense_kernels import LANES, activate_kernel
from warp_phys.interop.torch.combine import places_of


def check_dense(name: str, tensor: torch.Tensor) -> None:
    """Raise a TypeError for a sparse or quantised tensor."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise TypeError(f"{name} must be a dense tensor, got one of layout {tensor.layout}, {tensor.dtype}")


class DenseLinearisation:
    """Dense layers at N rows: activations h, slopes, and the adjoints of unit seeds before each activation."""

    def __init__(
        self, linears: Sequence[torch.nn.Linear], name: str, x: torch.Tensor, trainable: Sequence[torch.Tensor]
    ):
        self.linears = linears
        self.places = {id(p): place for p, place in zip(trainable, places_of(trainable), strict=True)}
        self.h, self.slopes = [x.detach()], []
        for layer in linears[:-1]:
            y, slope = _activated(self.h[-1], layer, name)
            self.h.append(y)
            self.slopes.append(slope)
        self.units: list[torch.Tensor] | None = None

    def jacobian(self, out: wp.array) -> None:
        """Write ∂N/∂x, shape (N, K, D)."""
        rows, size = len(self.h[0]), self.linears[-1].out_features
        target = wp.to_torch(out)
        weight = self.linears[0].weight.detach()
        if len(self.linears) == 1:
            target[:] = weight
            return
        last = self.linears[-1].weight.detach()
        seed = (self.slopes[-1][:, None, :] * last).view(rows * size, -1)
        self.units = self._through_hidden(seed, size)
        torch.mm(self.units[0], weight, out=target.view(rows * size, -1))

    def pull(self, mu: wp.array, adj_x: wp.array) -> None:
        """Write adj_x = (∂N/∂x)ᵀ mu."""
        deltas = self._deltas(wp.to_torch(mu))
        torch.mm(deltas[0], self.linears[0].weight.detach(), out=wp.to_torch(adj_x))

    def contract(self, mu: wp.array, gradients: Sequence[torch.Tensor]) -> None:
        """Add Σ (∂N/∂θ)ᵀ mu[f] over the rows of each flow f to the flat tensor gradients[f]."""
        flows = wp.to_torch(mu)
        if self.units is not None and flows.shape[2] == 1:
            self._contract_units(flows[:, :, 0], gradients)
            return
        for f, gradient in enumerate(gradients):
            parts = []
            for layer, delta, h in zip(self.linears, self._deltas(flows[f]), self.h, strict=True):
                parts += [(layer.weight, delta.T @ h), (layer.bias, delta.sum(0))]
            self._add(gradient, parts)

    def _contract_units(self, mu: torch.Tensor, gradients: Sequence[torch.Tensor]) -> None:
        """Contract all flows with one product a layer: with one control, Σ_n μ_n d_nᵀ [h_n, 1] = dᵀ [μ h, μ]."""
        assert self.units is not None
        parts: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in mu]
        for layer, unit, h in zip(self.linears[:-1], self.units, self.h[:-1], strict=True):
            weighted = h.new_empty((len(h), len(mu), h.shape[1] + 1))
            weighted[:, :, -1] = mu.T
            torch.mul(h[:, None, :], mu.T[:, :, None], out=weighted[:, :, :-1])
            product = (unit.T @ weighted.view(len(h), -1)).view(unit.shape[1], len(mu), -1)
            for f, part in enumerate(parts):
                part += [(layer.weight, product[:, f, :-1]), (layer.bias, product[:, f, -1])]
        weights, biases = mu @ self.h[-1], mu.sum(1)
        for f, part in enumerate(parts):
            last = self.linears[-1]
            self._add(gradients[f], [*part, (last.weight, weights[f : f + 1]), (last.bias, biases[f : f + 1])])

    def _deltas(self, mu: torch.Tensor) -> list[torch.Tensor]:
        """Return the adjoints before the activation of every layer, for adjoints mu (N, K) of the controls."""
        if len(self.linears) == 1:
            return [mu]
        seed = (mu @ self.linears[-1].weight.detach()).mul_(self.slopes[-1])
        return [*self._through_hidden(seed, 1), mu]

    def _add(self, gradient: torch.Tensor, parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Add the gradients of those parameters that are trained to a flat tensor; a parameter may come twice."""
        if [id(parameter) for parameter, _ in parts] == list(self.places):
            gradient.add_(torch.cat([value.reshape(-1) for _, value in parts]))
            return
        for parameter, value in parts:
            place = self.places.get(id(parameter))
            if place is not None:
                gradient[place].view(value.shape).add_(value)

    def _through_hidden(self, seed: torch.Tensor, repeat: int) -> list[torch.Tensor]:
        """Return the adjoints before every hidden activation, from that before the last; each row repeated."""
        deltas = [seed]
        for layer, slope in zip(reversed(self.linears[1:-1]), reversed(self.slopes[:-1]), strict=True):
            delta = torch.mm(deltas[0], layer.weight.detach())
            delta.view(len(slope), repeat, -1).mul_(slope[:, None, :])
            deltas.insert(0, delta)
        return deltas


def _activated(x: torch.Tensor, layer: torch.nn.Linear, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the activations of a layer and their slopes, shape (N, out)."""
    shape = (len(x), layer.out_features)
    count = math.prod(shape)
    padded = -(-count // LANES) * LANES
    flat_y, flat_slope = x.new_empty((2, padded))
    y, slope = flat_y[:count].view(shape), flat_slope[:count].view(shape)
    torch.addmm(layer.bias.detach(), x, layer.weight.detach().T, out=y)
    real = wp.dtype_from_torch(x.dtype)
    Lanes = wp.types.vector(length=LANES, dtype=real)
    lanes = [as_array(t.view(-1, LANES), Lanes) for t in (flat_y, flat_slope)]
    kernel = activate_kernel(name, real)
    wp.launch(kernel, dim=padded // LANES, inputs=lanes, device=lanes[0].device, record_tape=False)
    return y, slope


def as_array(tensor: torch.Tensor, dtype: Any = None) -> wp.array:
    """Return a contiguous tensor as a Warp array: the same memory, no gradient attached.

    `wp.from_torch` does the same in twice the time, and there are a dozen of them in an update. A vector type as
    `dtype` takes up the last dimension.
    """
    tensor = tensor.resolve_neg()  # a sign that torch keeps beside the numbers
    if not tensor.is_cpu or not tensor.is_contiguous():
        return wp.from_torch(tensor, dtype=dtype, requires_grad=False)  # type: ignore[return-value]
    shape = tensor.shape if dtype is None else tensor.shape[:-1]
    real = dtype or wp.dtype_from_torch(tensor.dtype)
    array = wp.array(ptr=tensor.data_ptr(), dtype=real, shape=tuple(shape), device="cpu")
    array._tensor = tensor  # type: ignore[attr-defined]  # keeps the memory alive
    return array


def launch(kernel: wp.Kernel, dim: int | tuple[int, ...], arguments: Sequence[Any], device: torch.device) -> None:
    """Launch a kernel, outside of any tape; arguments are tensors, Warp arrays and numbers."""
    given = [as_array(argument) if isinstance(argument, torch.Tensor) else argument for argument in arguments]
    wp.launch(kernel, dim, given, device=str(device), record_tape=False)


def is_finite(states: torch.Tensor) -> bool:
    """Whether all numbers of a tensor are finite."""
    return math.isfinite(float(states.detach().sum())) or bool(torch.isfinite(states).all())
