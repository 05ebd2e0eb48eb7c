"""Trained weights that come with the demos; `python -m demos.train_weights` makes them."""

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from controllers.checkpoint import atomic_write

FOLDER = Path(__file__).parent / "trained"


def save_weights(name: str, weights: Mapping[str, torch.nn.Module], folder: Path = FOLDER) -> Path:
    """Write controllers, by a key each, as one compressed file of float16 numbers; other keys stay as they are."""
    path = Path(folder) / f"{name}.npz"
    arrays: dict[str, np.ndarray] = {}
    if path.exists():
        with np.load(path) as file:
            arrays = {entry: file[entry] for entry in file.files}
    for key, controller in weights.items():
        for part, tensor in controller.state_dict().items():
            arrays[f"{key}/{part}"] = tensor.detach().cpu().numpy().astype(np.float16)
    memory = io.BytesIO()
    np.savez_compressed(memory, **dict(sorted(arrays.items())))  # type: ignore[arg-type]
    with atomic_write(path) as file:
        file.write(memory.getvalue())
    return path


def load_weights(name: str, key: str, controller: torch.nn.Module, folder: Path = FOLDER) -> torch.nn.Module:
    """Give a controller the weights of that key; returns it.

    Raises:
        ValueError: The file or the key is not there, or belongs to another network.
    """
    path = Path(folder) / f"{name}.npz"
    try:
        with np.load(path) as file:
            parts = {entry.partition("/")[2]: file[entry] for entry in file.files if entry.startswith(f"{key}/")}
        controller.load_state_dict(
            {part: torch.from_numpy(values.astype(np.float32)) for part, values in parts.items()}
        )
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"no weights {key!r} in {path}: {error}; python -m demos.train_weights {name} makes them"
        ) from None
    return controller


@torch.no_grad()
def scaled(chain: torch.nn.Sequential, inputs: np.ndarray, gain: float) -> torch.nn.Sequential:
    """Fit a chain of layers to the units of a system: states come in times `inputs`, controls leave times `gain`.

    Args:
        chain: First layer linear, (B, D) to (B, K).
        inputs: Factor of each state component, shape (D,); it goes into the first layer's weights. A component whose
            factor is 0 is not seen, and training does not change that.
        gain: Factor of all controls: one more layer, that is trained like the others.
    """
    last = [layer for layer in chain if isinstance(layer, torch.nn.Linear)][-1]
    outputs = torch.nn.utils.skip_init(torch.nn.Linear, last.out_features, last.out_features, bias=False)
    outputs.weight.copy_(gain * torch.eye(last.out_features))
    first = chain[0]
    assert isinstance(first, torch.nn.Linear)
    factors = torch.as_tensor(inputs, dtype=first.weight.dtype)
    first.weight.mul_(factors)
    first.weight.register_hook(lambda gradient: gradient * (factors != 0.0))
    return torch.nn.Sequential(*chain, outputs)
