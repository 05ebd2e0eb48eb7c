"""What a rollout asks of a torch module as its controller, and how it notices that it does not get it.

A rollout evaluates its controller step by step, and once more in the backward pass, where it differentiates all rows
at a time: by unit vectors, since a Jacobian serves all flows. That is right for a module that gives the same numbers,
and the same derivatives, each time; row by row; and whose backward pass is linear. Whether a module is so is tried out
at the first pass, at the second, the fourth and so on, and whenever something about it has changed. A module that
repeats itself but couples rows, fits one batch size only, has hooks on gradients or clips them is differentiated one
step of the whole batch at a time, each flow by its own adjoint: as autograd would. `docs/contract.md` has the list.
"""

from collections.abc import Sequence
from typing import Any

import torch
import warp as wp
from torch.nn.parameter import UninitializedParameter
from torch.overrides import TorchFunctionMode

from warp_phys.errors import NotRepeatable
from warp_phys.flow import Combined, Flow
from warp_phys.interop.torch.combine import size_of
from warp_phys.interop.torch.leaves import Cuts, leaves_of, nodes_of
from warp_phys.interop.torch.linearisation import TorchLinearisation, relative_tolerance
from warp_phys.interop.torch.rows import blame, is_optimized
from warp_phys.interop.torch.state import state_of

ADVICE = (
    "A controller's controls are a function of the state and of its parameters alone. What it remembers from call to "
    "call (the hidden state of a recurrent network, a counter of steps, a plan indexed by time) belongs into the state "
    "of the system; dropout, noise and batch statistics end with controller.eval()"
)


class Found:
    """What a forward pass found out about its controller: how its backward pass goes, and what that must meet again."""

    def __init__(self, module: torch.nn.Module, parameters: Sequence[torch.Tensor], x0: torch.Tensor, cut: bool = True):
        for part in module.modules():
            if isinstance(part, torch.nn.modules.batchnorm._BatchNorm) and part.training and part.track_running_stats:
                raise ValueError(
                    blame(module, "controller must not normalise over the batch in training: call its eval()", part)
                )
        self.module, self.state = module, state_of(module)
        self.here = TorchLinearisation(module, (), x0)
        """The module at x0."""
        self.cuts: Cuts | None = None
        """What takes the place of tensors that have a history from before the call."""
        if cut and self.here.reaches_back and not is_compiled(module):
            self.cuts = self.here.find_cuts()
            self.here = TorchLinearisation(module, (), x0, self.cuts)
        known = {id(parameter) for parameter in parameters}
        others = [leaf for leaf in self._leaves(self.here) if id(leaf) not in known]
        self.leaves = self.here.leaves = [*parameters, *others]
        """What the controls depend on: the trained parameters, and other leaves of autograd's graph after them."""
        self.whole = False
        """Whether the backward pass takes a step of the whole batch at a time."""
        self.seed = _random_like(self.here.output)

    @staticmethod
    def _leaves(linear: TorchLinearisation) -> list[torch.Tensor]:
        return [leaf for leaf in leaves_of(linear.output) if leaf is not linear.x]

    def check_again(self, otherwise: str = "controller depends on another tensor at each call") -> None:
        """Raise `NotRepeatable` unless the module still gives the same controls and derivatives at x0."""
        again = self.at(self.here.x)
        check_equal(again.output.detach(), self.here.output.detach(), "controls", self.module)
        if {id(leaf) for leaf in self._leaves(again)} - {id(leaf) for leaf in self.leaves}:
            raise NotRepeatable(blame(self.module, f"{otherwise}. {ADVICE}"))
        for new, old in zip(again.adjoints(self.seed), self.here.adjoints(self.seed), strict=True):
            check_equal(new, old, "derivatives", self.module)

    def check_unchanged(self) -> None:
        """Raise `NotRepeatable` if the module has changed since the forward pass in a way that its derivatives show."""
        if state_of(self.module) != self.state:
            self.check_again("controller depends on another tensor now than in the forward pass")

    @property
    def multiply_adds(self) -> int:
        """Number of parameters, see `phases.Controller`."""
        return size_of(self.leaves)

    def linearise(self, x: wp.array, workspace: Any, fused: bool = False) -> TorchLinearisation:
        """Return the module linearised at the rows x (N, D), with respect to all of its leaves."""
        return self.at(wp.to_torch(x))

    def at(self, x: torch.Tensor) -> TorchLinearisation:
        """Return the same at a tensor of rows."""
        return TorchLinearisation(self.module, self.leaves, x, self.cuts)


class Examination:
    """What is known of a module over many passes, and when it is tried out again."""

    def __init__(self, module: torch.nn.Module):
        self.module, self.passes = module, 0
        self._state: tuple | None = None
        self.whole = False
        """Whether backward passes take a step of the whole batch at a time."""
        self.coupled = False
        """Whether a backward pass has found rows that depend on each other where those of x0 do not."""
        self.others = False
        """Whether the controls depend on leaves that are no trained parameters."""

    def begin(
        self,
        parameters: Sequence[torch.Tensor],
        x0: torch.Tensor,
        controls: int,
        steps: int,
        always: bool,
        cut: bool = True,
    ) -> Found:
        """Look at the module, which returns so many controls, before some steps from x0, shape (batch, D).

        Without `cut`, what has a history is differentiated down to the leaves behind it, at every step.

        Raises:
            NotRepeatable: It gives other controls, or other derivatives, at each call.
            TypeError, ValueError: What it returns are no controls.
        """
        found = Found(self.module, parameters, x0, cut)
        check_shape(found.here.output, (len(x0), controls))
        self.passes += 1
        regular = always or self.passes & (self.passes - 1) == 0
        if regular or found.state != self._state:
            self._state = found.state
            self.whole = _needs_whole_steps(found)
            found.check_again()
            if regular and state_of(self.module) != found.state:
                # whoever keeps something from call to call may use it at one call in many, or at other states
                elsewhere = Found(self.module, found.leaves, _moved(x0), cut)
                for _ in range(steps):
                    found.check_again()
                    elsewhere.check_again()
        found.whole, self.others = self.whole or self.coupled, len(found.leaves) > len(parameters)
        return found

    def end(self, found: Found) -> None:
        """Look at the module after that forward pass.

        Raises:
            NotRepeatable: Being called has changed what it gives.
        """
        state = state_of(self.module)
        if state != found.state:
            found.check_again()
            found.state = state_of(self.module)


def check_repeated_controls(module: torch.nn.Module, x0: torch.Tensor, controls: torch.Tensor) -> None:
    """Raise `NotRepeatable` if a module gives other controls at x0 than a pass that ran what was read of it."""
    now = TorchLinearisation(module, (), x0).output.detach()
    if not is_close(now, controls):
        raise NotRepeatable(
            blame(
                module,
                "controller gives other controls now than the pass that ran what was read of it: something that it "
                "depends on has changed. Until the backward pass is done nothing may; make what it reads outside of "
                "itself an attribute or a buffer of the module, or use backend='general'",
            )
        )


def check_shape(output: torch.Tensor, shape: Sequence[int]) -> None:
    """Raise a ValueError if a controller has returned another shape than (batch, K)."""
    if output.shape != tuple(shape):
        raise ValueError(f"controller must return shape {tuple(shape)}, got {tuple(output.shape)}")


def check_equal(new: torch.Tensor, old: torch.Tensor, what: str, module: torch.nn.Module) -> None:
    """Raise `NotRepeatable` if two evaluations at the same states differ by more than rounding."""
    if not is_close(new, old):
        error = float((new - old).abs().max()) if new.shape == old.shape else float("nan")
        raise NotRepeatable(
            blame(
                module,
                f"controller must give the same controls for the same states each time, and the same derivatives; two "
                f"calls differ in their {what} by {error:.3g}. {ADVICE}",
            )
        )


def is_close(new: torch.Tensor, old: torch.Tensor, scale: torch.Tensor | None = None) -> bool:
    """Whether two tensors are equal up to rounding, measured by the largest of their numbers or by `scale`; or nan."""
    if new.shape != old.shape:
        return False
    if new.numel() == 0:
        return True
    difference = (new - old).abs()
    difference = difference[~(new.isnan() & old.isnan()) & (new != old)]  # infinities of one sign are equal
    if difference.numel() == 0:
        return True
    finite = old.isfinite()
    size = (old[finite].abs().max() if finite.any() else old.new_zeros(())) if scale is None else scale
    return bool(difference.max() <= relative_tolerance(old.dtype) * size)


def _random_like(output: torch.Tensor) -> torch.Tensor:
    """Return normal numbers, the same for the same shape, from no generator of anybody's."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(output.shape, dtype=output.dtype, generator=generator).to(output.device)


def _moved(x: torch.Tensor) -> torch.Tensor:
    """Return states beside x (N, D)."""
    x = x.detach()
    return x + 0.1 * (1.0 + x.abs()) * _random_like(x)


def _needs_whole_steps(found: Found) -> bool:
    """Whether a module that repeats itself can only be differentiated by a step of the whole batch at a time."""
    if found.here.reaches_back and not _is_linear(found):
        raise ValueError(
            blame(
                found.module,
                "controller hands a tensor that has a history straight to an autograd.Function or to compiled code, "
                "and the backward pass is not linear: hand on a copy made in its forward, tensor.clone()",
            )
        )
    return _hooks_on_gradients(found) or _hides_function(found) or not _is_linear(found) or not _is_row_by_row(found)


def _hooks_on_gradients(found: Found) -> bool:
    """Whether gradients inside the module are seen by hooks: those must see the true adjoints, each of them once."""
    modules = list(found.module.modules())
    if any(module._backward_hooks or module._backward_pre_hooks for module in modules):
        return True
    if is_compiled(found.module):
        return False  # whatever is inside cannot be watched
    watch = _HookWatch()
    with watch:
        TorchLinearisation(found.module, (), found.here.x)
    return watch.seen


def _hides_function(found: Found) -> bool:
    """Whether an `autograd.Function` of somebody's may have been handed nothing but zeros, as behind a zero weight."""
    if all(adjoint.any() for adjoint in found.here.adjoints(found.seed)[1:]):
        return False
    return any(isinstance(node, torch.autograd.function.BackwardCFunction) for node in nodes_of(found.here.output))


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether there is something about a module that torch has compiled."""
    return any(isinstance(m, torch.jit.ScriptModule) or is_optimized(m) for m in module.modules())


class _HookWatch(TorchFunctionMode):
    """Notices that a hook is put on a tensor."""

    seen = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen |= func is torch.Tensor.register_hook
        return func(*args, **(kwargs or {}))


def _is_linear(found: Found) -> bool:
    """Whether the backward pass is linear in the adjoint, over many orders of magnitude, and keeps to its rows."""
    try:
        return _scales_and_adds(found)
    except Exception:
        return False  # it may refuse to go on with large numbers


def _scales_and_adds(found: Found) -> bool:
    here, seed = found.here, found.seed
    own, far = here.adjoints(seed), 2.0 ** (40 if seed.dtype == torch.float32 else 160)  # powers of two do not round
    for factor in (-far, -1.0 / far):
        scaled = here.adjoints(factor * seed)
        if not all(is_close(a / factor, b) for a, b in zip(scaled, own, strict=True)):
            return False
    even = torch.arange(len(seed), device=seed.device)[:, None] % 2 == 0
    first, second = here.adjoints(torch.where(even, seed, 0.0)), here.adjoints(torch.where(even, 0.0, seed))
    if first[0][~even[:, 0]].any() or second[0][even[:, 0]].any():
        return False  # the adjoint of one row reaches another
    for a, b, both in zip(first, second, own, strict=True):  # which may cancel in part
        if both.numel() and not is_close(a + b, both, a.abs().max() + b.abs().max()):
            return False
    return True


def _is_row_by_row(found: Found) -> bool:
    """Whether the controls and derivatives of the rows stay the same among other rows, before and behind them."""
    x, seed = found.here.x.detach(), found.seed
    others = _moved(x[:7]).repeat(7, 1)[:7]
    rows, own = torch.cat([others[:3], x, others[3:]]), slice(3, 3 + len(x))
    try:
        among = found.at(rows)
    except Exception:
        return False  # a module may be made for one batch size
    if among.output.shape != (len(rows), *found.here.output.shape[1:]):
        return False
    if not is_close(among.output[own].detach(), found.here.output.detach()):
        return False
    wide = seed.new_zeros(among.output.shape)
    wide[own] = seed
    adjoints = among.adjoints(wide)
    if adjoints[0][:3].any() or adjoints[0][own.stop :].any():
        return False
    adjoints[0] = adjoints[0][own]
    return all(is_close(a, b) for a, b in zip(adjoints, found.here.adjoints(seed), strict=True))


class RowsCoupled(Exception):
    """The controls of a step of the whole batch are others than those of its rows among rows of other steps."""


class PassCheck:
    """What a backward pass asks of a controller, chunk by chunk: the forward pass's controls, and what trains them.

    A controller may well leave its parameters alone at some states, but not at all.
    """

    def __init__(
        self, found: Found | None = None, masked: torch.Tensor | None = None, unused: Sequence[torch.Tensor] = ()
    ):
        self._found, self._is_known, self._reached = found, False, set[int]()
        self._unused = {id(parameter) for parameter in unused}
        self._masked = masked if masked is not None and len(masked) else None

    def __call__(self, linear: Any, stored: wp.array) -> None:
        """Look at a chunk, see `phases.backward`.

        Raises:
            NotRepeatable: The controls are not those of the forward pass, or depend on something else.
            RowsCoupled: They are not, and may be if the rows of a step are by themselves.
        """
        if not isinstance(linear, TorchLinearisation):
            return  # the engine's own layers
        self._compare(linear, wp.to_torch(stored))
        if not self._is_known and self._found is not None:
            self._found.check_unchanged()
        self._is_known = self._is_known or bool(linear.leaves)
        if len(self._reached) < len(linear.leaves):
            reached = {id(leaf) for leaf in leaves_of(linear.output)} - {id(linear.x)}
            if reached - {id(leaf) for leaf in linear.leaves} and self._found is not None:
                raise NotRepeatable(
                    blame(linear.module, f"controller depends on another tensor now than in the forward pass. {ADVICE}")
                )
            self._reached |= reached

    def _compare(self, linear: TorchLinearisation, before: torch.Tensor) -> None:
        whole = self._found is not None and self._found.whole
        if whole and self._masked is not None:  # the state that stands in for theirs may have another control
            before = before.clone()
            before[self._masked] = linear.output.detach()[self._masked]
        try:
            _check_controls(linear, before)
        except NotRepeatable as error:
            if self._found is not None and not whole:
                raise RowsCoupled from None
            if self._masked is None:
                raise
            raise NotRepeatable(
                f"{error}. Or its rows depend on each other: then samples that diverge cannot be masked, since the "
                "controls of the others depend on them; use on_divergence='raise'"
            ) from None

    def includes(self, leaf: torch.Tensor) -> bool:
        """Whether the controls depend on a leaf; those that autograd does not run say what is `unused`.

        torch leaves the `.grad` of one that they do not depend on alone, so that no optimiser moves it.
        """
        return id(leaf) in self._reached if self._is_known else id(leaf) not in self._unused

    def finish(self) -> None:
        """Raise a ValueError if there are parameters to train, and nothing led back to them."""
        if self._is_known and not self._reached:
            raise ValueError(
                "controller must be differentiable: what it returns has no graph back to its parameters; detach(), "
                "no_grad(), numpy() and .data do that. One that is not to be trained: controller.requires_grad_(False)"
            )


def _check_controls(linear: TorchLinearisation, before: torch.Tensor) -> None:
    """Raise `NotRepeatable` if the controls of a chunk are not those of the forward pass, up to rounding."""
    now = linear.output.detach()
    if is_close(now, before):
        return
    error = (now - before).abs().max()
    # controls may be small differences of large numbers: how far rounding moves them, the module itself can say
    eps = torch.finfo(before.dtype).eps
    near = TorchLinearisation(linear.module, (), linear.x.detach() * (1.0 + eps), linear.cuts).output.detach()
    moved = (near - now).abs().max()
    # noise moves them by anything
    again = TorchLinearisation(linear.module, (), linear.x.detach(), linear.cuts).output.detach()
    if not (error <= 256.0 * moved and is_close(again, now)):
        raise NotRepeatable(
            blame(
                linear.module,
                f"controller must give the same controls for the same states each time, they differ by "
                f"{float(error):.3g} between the forward and the backward pass. {ADVICE}",
            )
        )


def refuse_lazy(controller: torch.nn.Module) -> None:
    """Raise a ValueError if a controller has parameters that do not exist yet."""
    lazy = [name for name, p in controller.named_parameters() if isinstance(p, UninitializedParameter)]
    if lazy:
        raise ValueError(
            blame(
                controller,
                f"controller has lazy layers, whose parameters do not exist yet ({', '.join(lazy)}): call it once on "
                "states, shape (batch, D), before the rollout and the optimiser are made",
            )
        )


def refuse_averaging(controller: torch.nn.Module, flow: Flow | Combined, reduce: Any) -> None:
    """Raise a ValueError if torch would average combined updates over ranks, which must be combined afterwards."""
    if reduce is not None or not isinstance(flow, Combined) or not torch.distributed.is_available():
        return
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    averaging = [type(part).__name__ for part in controller.modules() if _averages(part)]
    if averaging:
        raise ValueError(
            f"controller holds a {averaging[0]}, which averages what each rank has combined by itself; flow "
            f"{flow.name!r} must sum over ranks first and combine then. Give the rollout the module without it and sum "
            "the updates: Rollout(system, controller.module, steps, flow, reduce=mean), with def mean(updates): "
            "torch.distributed.all_reduce(updates); updates /= torch.distributed.get_world_size()"
        )


def _averages(part: torch.nn.Module) -> bool:
    names = {kind.__name__ for kind in type(part).__mro__}
    return bool(names & {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"})
