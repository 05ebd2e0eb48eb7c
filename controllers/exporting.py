"""A trained controller as a file for other programs: ONNX, or a program of `torch.export`."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from controllers.checkpoint import CONFIG, CONTROLLER, atomic_write, load_tensors
from controllers.config import read_config
from controllers.networks import check_sized, make_network
from controllers.settings import Training
from warp_phys.core.checks import check_path
from warp_phys.errors import check_count
from warp_phys.interop.extras import require

SUFFIXES = (".onnx", ".pt2")
APART = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Refused is a file that computes something farther from the module than this, relative to the largest control."""


def load_controller(folder: str | Path) -> tuple[torch.nn.Module, Training]:
    """Return the controller of a finished training, and its settings.

    Args:
        folder: Where the training left controller.pt and run.toml.

    Raises:
        OSError: A file is not there.
        ValueError, TypeError: One is damaged, or something else.
    """
    folder = check_path("folder", folder)
    settings = Training(**read_config(folder / CONFIG))
    shape = settings.network, settings.make_system(), settings.hidden, settings.activation, settings.init, None
    controller = make_network(*shape, inputs=len(settings.inputs), memory=settings.memory)
    try:
        controller.load_state_dict(load_tensors(folder / CONTROLLER))
    except (RuntimeError, TypeError, AttributeError) as error:  # torch's words for weights of another network, or none
        raise ValueError(f"{folder / CONTROLLER} is not of the network that {CONFIG} describes: {error}") from None
    return controller, settings


def export(controller: torch.nn.Module, path: str | Path, system: Any, *, inputs: int = 0, memory: int = 0) -> None:
    """Write a controller as a file, and hold what the file computes against the module.

    The file takes `state`, shape (batch, D), and gives `control`, (batch, K), any batch; with inputs also `input`,
    (batch, E), with a memory `memory`, (batch, H), and gives `next_memory`. Names and units of all components stand in
    it as JSON: in ONNX as metadata of the model, under "state" and "control", and as the documentation of these values;
    in a program of `torch.export` as the extra file "interface.json". All that the module does is in the file, its
    normalisation of states too, in evaluation mode; what is done outside of the module is not.

    Args:
        controller: Any module of a rollout.
        path: Ends in .onnx (for ONNX Runtime, TensorRT and others) or .pt2 (`torch.export.load`); replaced if it is
            there.
        system: Gives names, units and sizes: `states`, `controls`, or `state_size`, `control_size` alone.
        inputs: Numbers E that a controller with inputs takes at each step.
        memory: Numbers H that a controller with a memory remembers.

    Raises:
        TypeError: The controller is no module.
        ValueError: Another ending; a module that gives other shapes, or that the file does not compute.
        ImportError: ONNX needs the extra `export`.
    """
    path = check_path("path", path)
    check_sized(system)
    if not isinstance(controller, torch.nn.Module):
        raise TypeError(f"controller must be a torch.nn.Module, got {type(controller).__name__}")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"path must end in {' or '.join(SUFFIXES)}, got {str(path)!r}")
    if path.suffix == ".onnx":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            require(name, "export")
    sizes = {"state": system.state_size, "input": check_count("inputs", inputs, 0)}
    sizes["memory"] = check_count("memory", memory, 0)
    modes = [(module, module.training) for module in controller.modules()]
    try:
        controller.eval()
        _write(controller, path, system, {name: size for name, size in sizes.items() if size})
    finally:
        for module, mode in modes:
            module.training = mode


def _write(controller: torch.nn.Module, path: Path, system: Any, sizes: dict[str, int]) -> None:
    """Write the file, and compare."""
    weight = next((p for p in controller.parameters() if p.is_floating_point()), torch.zeros(0))
    draw = torch.Generator().manual_seed(0)
    example = [torch.randn(3, size, generator=draw, dtype=weight.dtype).to(weight.device) for size in sizes.values()]
    expected = _results(controller(*example))
    shapes = {"control": system.control_size} | ({"next_memory": sizes["memory"]} if "memory" in sizes else {})
    given, wanted = [tuple(result.shape) for result in expected], [(3, size) for size in shapes.values()]
    if given != wanted:
        raise ValueError(f"controller must give {', '.join(shapes)} of shapes {wanted} for 3 states, got {given}")
    interface = {"state": _names(system, "states", "state"), "control": _names(system, "controls", "control")}
    batch = torch.export.Dim("batch")
    program = torch.export.export(controller, tuple(example), dynamic_shapes=tuple({0: batch} for _ in example))
    if path.suffix == ".onnx":
        content = _onnx(program, list(sizes), list(shapes), interface)
    else:
        buffer = io.BytesIO()
        torch.export.save(program, buffer, extra_files={"interface.json": json.dumps(interface, ensure_ascii=False)})
        content = buffer.getvalue()
    _compare(path, content, dict(zip(sizes, example, strict=True)), expected)
    with atomic_write(path) as file:
        file.write(content)


def _results(results: Any) -> list[torch.Tensor]:
    """What a controller gives, as a list."""
    return list(results) if isinstance(results, tuple) else [results]


def _names(system: Any, field: str, word: str) -> list[str]:
    """Names of components with their units, or numbers where the system has none."""
    names = getattr(system, field, None) or [f"{word} {i}" for i in range(getattr(system, f"{word}_size"))]
    return [str(name) for name in names]


def _onnx(program: Any, inputs: Sequence[str], outputs: Sequence[str], interface: dict[str, list[str]]) -> bytes:
    """A program as the bytes of a model that says what its numbers are."""
    made = torch.onnx.export(
        program, input_names=list(inputs), output_names=list(outputs), dynamo=True, optimize=True, verbose=False
    )
    assert made is not None
    model = made.model_proto
    for value in (*model.graph.input, *model.graph.output):
        value.doc_string = ", ".join(interface.get(value.name, []))
    for name, components in interface.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = name, json.dumps(components, ensure_ascii=False)
    return model.SerializeToString()


def _compare(path: Path, content: bytes, example: dict[str, torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    """Raise ValueError where what will be the file computes something else, for the example and for one row of it."""
    for rows in (3, 1):
        given = {name: tensor[:rows] for name, tensor in example.items()}
        if path.suffix == ".onnx":
            import onnxruntime  # noqa: PLC0415

            session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
            found = session.run(None, {name: tensor.detach().cpu().numpy() for name, tensor in given.items()})
        else:
            results = torch.export.load(io.BytesIO(content)).module()(*given.values())
            found = [tensor.detach().cpu().numpy() for tensor in _results(results)]
        for ours, theirs in zip(found, expected, strict=True):
            wanted = theirs[:rows].detach().cpu().numpy()
            apart = float(np.abs(ours - wanted).max() / max(np.abs(wanted).max(), 1e-30))
            if not apart <= APART.get(theirs.dtype, 1e-4):
                raise ValueError(
                    f"{path.name} would compute something else than the controller, by {apart:.1e} of its controls"
                )
