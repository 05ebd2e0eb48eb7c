"""Trained weights that come with the demos; `python -m demos.train_weights` makes them."""

import io
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from controllers.checkpoint import atomic_write

FOLDER = Path(__file__).parent / "trained"


def save_weights(name: str, weights: Mapping[str, torch.nn.Module], folder: Path = FOLDER) -> Path:
    """Write controllers, by a key each, as one compressed file of float16 numbers; other keys stay as they are."""
    path, arrays = Path(folder) / f"{name}.npz", load_arrays(name, folder)
    for key, controller in weights.items():
        for part, tensor in controller.state_dict().items():
            arrays[f"{key}/{part}"] = tensor.detach().cpu().numpy().astype(np.float16)
    memory = io.BytesIO()
    np.savez_compressed(memory, **dict(sorted(arrays.items())))  # type: ignore[arg-type]
    with atomic_write(path) as file:
        file.write(memory.getvalue())
    return path


def load_arrays(name: str, folder: Path = FOLDER) -> dict[str, np.ndarray]:
    """Return all that a file of weights holds, by key and parameter; nothing where there is no file.

    Raises:
        ValueError: The file is something else.
    """
    path = Path(folder) / f"{name}.npz"
    if not path.exists():
        return {}
    try:
        with np.load(path) as file:
            return {entry: file[entry] for entry in file.files}
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is no file of weights ({error}); delete it, or choose another folder") from None


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
    except (OSError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"no weights {key!r} in {path}: {error}; python -m demos.train_weights {name} makes them"
        ) from None
    return controller
