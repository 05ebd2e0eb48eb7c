"""Tensors that do not let numpy cut their gradient, as Gymnasium's wrappers would."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch


class Attached(torch.Tensor):
    """A tensor of an environment, for torch like any other, whose gradient numpy does not cut unnoticed.

    Wrappers of Gymnasium hand to numpy what an environment returns. A tensor with a history may be added to an array
    in place, as statistics do, for nothing comes back that could want a gradient; anything else raises. Without a
    history, numpy gets and gives back arrays. What torch computes from it is a plain tensor.

    >>> rewards, returns = Attached(torch.ones(2, requires_grad=True) * 3.0), np.zeros(2)
    >>> returns += rewards
    >>> returns
    array([3., 3.])
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __getitem__(self, index: Any) -> "Attached":
        """Return a part, which wrappers hand on to numpy."""
        return super().__getitem__(index).as_subclass(Attached)

    def __iter__(self) -> Iterator["Attached"]:
        """Return the parts one by one."""
        return (part.as_subclass(Attached) for part in self.unbind())

    def __rsub__(self, other: Any) -> torch.Tensor:
        """Return other − self; flags count as numbers, as those of numpy do."""
        if self.dtype is torch.bool:
            return (other - self.long()).as_subclass(Attached)
        return super().__rsub__(other)

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        """Return the numbers without history, or refuse."""
        _refuse(self, "an array")
        return self.as_subclass(torch.Tensor).cpu().__array__(*args, **kwargs)

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        """Hand the memory to another library, or refuse."""
        _refuse(self, "an exchange of memory")
        return super().__dlpack__(*args, **kwargs)

    def __array_function__(self, function: Callable, types: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Do what numpy's functions do, or refuse."""
        _refuse((args, kwargs), f"numpy.{function.__name__}")
        return function(*_without_history(args), **_without_history(kwargs))

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        """Do what numpy's operations do: with scalars in torch, into an array without history, else refuse."""
        if method == "__call__" and all(isinstance(value, torch.Tensor) or np.isscalar(value) for value in inputs):
            if self.is_floating_point() and not kwargs and hasattr(torch, ufunc.__name__):
                make: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
                given = [value if isinstance(value, torch.Tensor) else torch.tensor(value, **make) for value in inputs]
                return getattr(torch, ufunc.__name__)(*given)
        if not kwargs.get("out"):
            _refuse(inputs, f"numpy.{ufunc.__name__}")
        return getattr(ufunc, method)(*_without_history(inputs), **_without_history(kwargs))


def _refuse(values: Any, what: str) -> None:
    """Raise a TypeError if a tensor within values has a history."""
    if isinstance(values, torch.Tensor):
        if values.requires_grad:
            raise TypeError(
                f"{what} would cut the gradient of this environment's observations and rewards: compute with torch "
                "instead (wrappers of Gymnasium that compute with numpy do not fit, docs/gymnasium.md names them), or "
                "call .detach() where no gradient is wanted"
            )
    elif isinstance(values, (list, tuple, dict)):
        for value in values.values() if isinstance(values, dict) else values:
            _refuse(value, what)


def _without_history(values: Any) -> Any:
    """Return values with arrays in the place of tensors."""
    if isinstance(values, torch.Tensor):
        return values.detach().cpu().numpy()
    if isinstance(values, dict):
        return {key: _without_history(value) for key, value in values.items()}
    return type(values)(map(_without_history, values)) if isinstance(values, (list, tuple)) else values
