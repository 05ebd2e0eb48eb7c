"""Kernels of dense layers, made once per activation and precision."""

import functools
from collections.abc import Sequence
from typing import Any

import warp as wp

from warp_phys.activations import activation
from warp_phys.rows import row_functions

LANES = 64
"""Numbers that a thread of `activate_kernel` takes: a loop long enough to become vector instructions."""

SAMPLES = 4
"""Samples that a thread of the fused unrolling holds: they share every weight that is loaded."""


@functools.cache
def _affine(real: type) -> Any:
    @wp.func
    def affine(x: wp.array2d[real], weight: wp.array2d[real], bias: wp.array[real], r: int, o: int):
        total = bias[o]
        for k in range(x.shape[1]):
            total += weight[o, k] * x[r, k]
        return total

    return affine


@functools.cache
def dense_kernel(name: str, real: type) -> wp.Kernel:
    """y = activation(x Wᵀ + b), differentiable on a tape; one thread per output."""
    affine, act = _affine(real), activation(name, real).value

    @wp.kernel(module="unique", enable_backward=True)
    def dense(
        # in
        x: wp.array2d[real],
        weight: wp.array2d[real],
        bias: wp.array[real],
        # out
        y: wp.array2d[real],
    ):
        r, o = wp.tid()
        y[r, o] = act(affine(x, weight, bias, r, o))

    return dense


@functools.cache
def dense_with_slope_kernel(name: str, real: type) -> wp.Kernel:
    """The same, and the slope of the activation; one thread per output."""
    affine, act, act_slope = _affine(real), activation(name, real).value, activation(name, real).slope

    @wp.kernel(module="unique", enable_backward=False)
    def dense_with_slope(
        # in
        x: wp.array2d[real],
        weight: wp.array2d[real],
        bias: wp.array[real],
        # out
        y: wp.array2d[real],
        slope: wp.array2d[real],
    ):
        r, o = wp.tid()
        z = affine(x, weight, bias, r, o)
        y[r, o] = act(z)
        slope[r, o] = act_slope(z)

    return dense_with_slope


@functools.cache
def slope_kernel(real: type) -> wp.Kernel:
    """delta[q] = adj[q] ∘ slope[q / repeat]: back through the activation."""

    @wp.kernel(module="unique", enable_backward=False)
    def through_activation(
        # in
        adj: wp.array2d[real],
        slope: wp.array2d[real],
        repeat: int,
        # out
        delta: wp.array2d[real],
    ):
        q, o = wp.tid()
        delta[q, o] = adj[q, o] * slope[q // repeat, o]

    return through_activation


@functools.cache
def transposed_kernel(real: type) -> wp.Kernel:
    """adj_x = delta W: back through the weights; one thread per input."""

    @wp.kernel(module="unique", enable_backward=False)
    def through_weights(
        # in
        delta: wp.array2d[real],
        weight: wp.array2d[real],
        # out
        adj_x: wp.array2d[real],
    ):
        q, k = wp.tid()
        total = real(0.0)
        for o in range(weight.shape[0]):
            total += delta[q, o] * weight[o, k]
        adj_x[q, k] = total

    return through_weights


@functools.cache
def contract_kernel(real: type) -> wp.Kernel:
    """adj_W += deltaᵀ x and adj_b += Σ delta over the rows; one thread per weight, so the order of sums is fixed."""

    @wp.kernel(module="unique", enable_backward=False)
    def contract_rows(
        # in
        delta: wp.array2d[real],
        x: wp.array2d[real],
        # in and out
        adj_weight: wp.array2d[real],
        adj_bias: wp.array[real],
    ):
        o, k = wp.tid()
        total = real(0.0)
        for r in range(delta.shape[0]):
            total += delta[r, o] * x[r, k]
        adj_weight[o, k] = adj_weight[o, k] + total
        if k == 0:
            total = real(0.0)
            for r in range(delta.shape[0]):
                total += delta[r, o]
            adj_bias[o] = adj_bias[o] + total

    return contract_rows


@functools.cache
def unit_rows_kernel(real: type) -> wp.Kernel:
    """Seeds of a Jacobian: row q is the unit vector q mod size."""

    @wp.kernel(module="unique", enable_backward=False)
    def unit_rows(size: int, seeds: wp.array2d[real]):
        q, o = wp.tid()
        seeds[q, o] = wp.where(q % size == o, real(1.0), real(0.0))

    return unit_rows


def padded_width(sizes: Sequence[int]) -> int:
    """Return the length of the vector type that holds any layer: a multiple of 16, the widest register of a CPU."""
    widest = max(sizes[1:] if len(sizes) > 2 else sizes)
    return -(-widest // 16) * 16


def layer_rows(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the row of the packed parameters at which each layer starts, and the number of rows."""
    starts = [0]
    for size in sizes[:-2]:
        starts.append(starts[-1] + size + 1)
    return (*starts, starts[-1] + sizes[-1] + 1)


@functools.cache
def pack_kernel(width: int, real: type) -> wp.Kernel:
    """Write one layer into the packed parameters: see `unroll_kernel`."""
    Row = wp.types.vector(length=width, dtype=real)

    @wp.kernel(module="unique", enable_backward=False)
    def pack_layer(
        # in
        weight: wp.array2d[real],
        bias: wp.array[real],
        start: int,
        last: int,
        # out
        packed: wp.array[Row],
    ):
        k, o = wp.tid()
        if k == weight.shape[1]:
            packed[start][o] = bias[o]
        elif last == 1:
            packed[start + 1 + o][k] = weight[o, k]
        else:
            packed[start + 1 + k][o] = weight[o, k]

    return pack_layer


@functools.cache
def _hidden_layer(In: Any, layer: int, sizes: tuple[int, ...], name: str, real: type) -> Any:
    """Return a function from four input vectors to four vectors of activations, kept if there is room for them."""
    width, size, start = padded_width(sizes), sizes[layer], layer_rows(sizes)[layer]
    Row = wp.types.vector(length=width, dtype=real)
    act = activation(name, real).value

    @wp.func
    def hidden_layer(packed: wp.array[Row], kept: wp.array3d[Row], n: int, r: wp.vec4i, a: In, b: In, c: In, d: In):
        za = packed[wp.static(start)]
        zb = za
        zc = za
        zd = za
        for k in range(wp.static(size)):
            w = packed[wp.static(start + 1) + k]
            za += a[k] * w
            zb += b[k] * w
            zc += c[k] * w
            zd += d[k] * w
        for j in range(wp.static(width)):
            za[j] = act(za[j])
            zb[j] = act(zb[j])
            zc[j] = act(zc[j])
            zd[j] = act(zd[j])
        if kept.shape[0] > 0:
            kept[wp.static(layer), n, r[0]] = za
            kept[wp.static(layer), n, r[1]] = zb
            kept[wp.static(layer), n, r[2]] = zc
            kept[wp.static(layer), n, r[3]] = zd
        return za, zb, zc, zd

    return hidden_layer


def _chain(first: Any, second: Any, In: Any, Row: Any) -> Any:
    """Return `second` after `first`, two functions of four vectors."""

    @wp.func
    def chained(packed: wp.array[Row], kept: wp.array3d[Row], n: int, r: wp.vec4i, a: In, b: In, c: In, d: In):
        ya, yb, yc, yd = first(packed, kept, n, r, a, b, c, d)
        za, zb, zc, zd = second(packed, kept, n, r, ya, yb, yc, yd)
        return za, zb, zc, zd

    return chained


def _embed(In: Any, size: int, Row: Any) -> Any:
    """Return the function that copies four input vectors into rows: the hidden layers of a controller that has none."""

    @wp.func
    def embed_one(x: In):
        out = Row()
        for k in range(wp.static(size)):
            out[k] = x[k]
        return out

    @wp.func
    def embed(packed: wp.array[Row], kept: wp.array3d[Row], n: int, r: wp.vec4i, a: In, b: In, c: In, d: In):
        return embed_one(a), embed_one(b), embed_one(c), embed_one(d)

    return embed


def _hidden_layers(State: Any, sizes: tuple[int, ...], name: str, real: type) -> Any:
    """Return the function from four states to four vectors of last hidden activations."""
    Row = wp.types.vector(length=padded_width(sizes), dtype=real)
    if len(sizes) == 2:
        return _embed(State, sizes[0], Row)
    network = _hidden_layer(State, 0, sizes, name, real)
    for layer in range(1, len(sizes) - 2):
        network = _chain(network, _hidden_layer(Row, layer, sizes, name, real), State, Row)
    return network


@functools.cache
def unroll_kernel(structure: Any, sizes: tuple[int, ...], name: str, real: type) -> wp.Kernel:
    """The whole forward unrolling in one kernel: dense controller and physics, all steps, four samples a thread.

    Packed parameters: rows as wide as the widest layer. A hidden layer is its bias, then one row of outgoing weights
    per input, so that all outputs of a layer are one vector that the compiler keeps in registers. The last layer is
    its bias, then one row of incoming weights per output. What pads a row is zero. The activations of the hidden
    layers are kept, shape (hidden layers, steps, batch), where there is an array for them.
    """
    types, step = structure.types(real), structure.functions(real).step
    State, Control, Parameters = types.State, types.Control, types.Parameters
    width, start = padded_width(sizes), layer_rows(sizes)[-2]
    Row = wp.types.vector(length=width, dtype=real)
    hidden_layers = _hidden_layers(State, sizes, name, real)
    x_row, c_row = row_functions(structure.state_size, real), row_functions(structure.control_size, real)
    load_x, store_x, store_c = x_row.load_at, x_row.store_at, c_row.store_at

    @wp.func
    def output_layer(packed: wp.array[Row], z: Row):
        c = Control()
        for k in range(wp.static(structure.control_size)):
            c[k] = wp.dot(z, packed[wp.static(start + 1) + k]) + packed[wp.static(start)][k]
        return c

    @wp.kernel(module="unique", enable_backward=False)
    def unroll_steps(
        # in
        packed: wp.array[Row],
        p: wp.array[Parameters],
        # in and out: row 0 is read, the others are written
        states: wp.array3d[real],
        # out; kept of length 0 is not written
        controls: wp.array3d[real],
        kept: wp.array3d[Row],
    ):
        i = SAMPLES * wp.tid()
        last = states.shape[1] - 1
        j = wp.min(i + 1, last)
        k = wp.min(i + 2, last)
        m = wp.min(i + 3, last)
        rows = wp.vec4i(i, j, k, m)
        xi = load_x(states, 0, i)
        xj = load_x(states, 0, j)
        xk = load_x(states, 0, k)
        xm = load_x(states, 0, m)
        for n in range(controls.shape[0]):
            zi, zj, zk, zm = hidden_layers(packed, kept, n, rows, xi, xj, xk, xm)
            ci = output_layer(packed, zi)
            cj = output_layer(packed, zj)
            ck = output_layer(packed, zk)
            cm = output_layer(packed, zm)
            xi = step(xi, ci, p[i % p.shape[0]])
            xj = step(xj, cj, p[j % p.shape[0]])
            xk = step(xk, ck, p[k % p.shape[0]])
            xm = step(xm, cm, p[m % p.shape[0]])
            # rows past the end repeat the last one: they write what it writes
            store_c(controls, n, i, ci)
            store_c(controls, n, j, cj)
            store_c(controls, n, k, ck)
            store_c(controls, n, m, cm)
            store_x(states, n + 1, i, xi)
            store_x(states, n + 1, j, xj)
            store_x(states, n + 1, k, xk)
            store_x(states, n + 1, m, xm)

    return unroll_steps


@functools.cache
def activate_kernel(name: str, real: type) -> wp.Kernel:
    """z becomes its activation in place, slope the activation's slope."""
    Lanes = wp.types.vector(length=LANES, dtype=real)
    act, act_slope = activation(name, real).value, activation(name, real).slope

    @wp.kernel(module="unique", enable_backward=False)
    def activate_lanes(z: wp.array[Lanes], slope: wp.array[Lanes]):
        i = wp.tid()
        v = z[i]
        s = Lanes()
        for j in range(LANES):
            s[j] = act_slope(v[j])
            v[j] = act(v[j])
        z[i] = v
        slope[i] = s

    return activate_lanes
