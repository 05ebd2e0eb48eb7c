"""Activation functions of controllers, as Warp functions with their slopes."""

import functools
from typing import Any, NamedTuple

import warp as wp

ACTIVATIONS = ("tanh", "relu", "elu", "silu", "sigmoid", "identity")
"""The activations by name."""


class Activation(NamedTuple):
    """An activation in one precision."""

    value: Any
    """`value(z) -> real`; its adjoint is `slope`."""
    slope: Any
    """`slope(z) -> real`, the derivative at z."""


@functools.cache
def activation(name: str, real: type) -> Activation:
    """Return the activation `name`, one of `ACTIVATIONS`, for wp.float32 or wp.float64."""
    value, slope = _MAKERS[name](real)
    return Activation(_with_slope(value, slope, real), slope)


def _with_slope(value, slope, real):
    """Return `value` with `slope` as its adjoint on a tape."""

    @wp.func
    def activate(z: real):
        return value(z)

    @wp.func_grad(activate)
    def adj_activate(z: real, adj_ret: real):
        wp.adjoint[z] += slope(z) * adj_ret

    return activate


def _tanh(real):
    """tanh: in float32 a rational function, which the compiler vectorises where a library call would not.

    Numerator and denominator have degrees 13 and 6; tests/test_layers.py states the error against float64.
    """
    if real is wp.float64:

        @wp.func
        def tanh64(z: wp.float64):
            return wp.tanh(z)

        value = tanh64
    else:

        @wp.func
        def tanh32(z: wp.float32):
            x = wp.clamp(z, -7.90531, 7.90531)
            s = x * x
            p = -2.76076847742355e-16 * s + 2.00018790482477e-13
            p = p * s - 8.60467152213735e-11
            p = p * s + 5.12229709037114e-08
            p = p * s + 1.48572235717979e-05
            p = p * s + 6.37261928875436e-04
            p = p * s + 4.89352455891786e-03
            q = 1.19825839466702e-06 * s + 1.18534705686654e-04
            q = q * s + 2.26843463243900e-03
            q = q * s + 4.89352518554385e-03
            return wp.where(z != z, z, x * p / q)  # the clamp would swallow a nan

        value = tanh32

    @wp.func
    def tanh_slope(z: real):
        y = value(z)
        return real(1.0) - y * y

    return value, tanh_slope


def _relu(real):
    @wp.func
    def relu(z: real):
        return wp.where(z < real(0.0), real(0.0), z)  # a nan stays a nan

    @wp.func
    def relu_slope(z: real):
        return wp.where(z > real(0.0), real(1.0), real(0.0))

    return relu, relu_slope


def _elu(real):
    @wp.func
    def elu(z: real):
        return wp.where(z < real(0.0), wp.exp(wp.min(z, real(0.0))) - real(1.0), z)

    @wp.func
    def elu_slope(z: real):
        return wp.exp(wp.min(z, real(0.0)))

    return elu, elu_slope


def _sigmoid(real):
    @wp.func
    def sigmoid(z: real):
        return real(1.0) / (real(1.0) + wp.exp(-z))

    @wp.func
    def sigmoid_slope(z: real):
        y = sigmoid(z)
        return y * (real(1.0) - y)

    return sigmoid, sigmoid_slope


def _silu(real):
    sigmoid, _slope = _sigmoid(real)

    @wp.func
    def silu(z: real):
        return z * sigmoid(z)

    @wp.func
    def silu_slope(z: real):
        s = sigmoid(z)
        return s * (real(1.0) + z * (real(1.0) - s))

    return silu, silu_slope


def _identity(real):
    @wp.func
    def identity(z: real):
        return z

    @wp.func
    def identity_slope(z: real):
        return real(1.0)

    return identity, identity_slope


_MAKERS = {"tanh": _tanh, "relu": _relu, "elu": _elu, "silu": _silu, "sigmoid": _sigmoid, "identity": _identity}
