"""Trained weights that come with the demos; `python -m demos.train_weights` makes them."""

import io
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from controllers.checkpoint import check_whole, sealed, write_bytes

FOLDER = Path(__file__).parent / "trained"


def save_weights(name: str, weights: Mapping[str, torch.nn.Module], folder: Path = FOLDER) -> Path:
    """Write controllers, by a key each, as one compressed file of float16 numbers; other keys stay as they are."""
    path, arrays = Path(folder) / f"{name}.npz", load_arrays(name, folder)
    for key, controller in weights.items():
        for part, tensor in controller.state_dict().items():
            arrays[f"{key}/{part}"] = tensor.detach().cpu().numpy().astype(np.float16)
    memory = io.BytesIO()
    np.savez_compressed(memory, **dict(sorted(arrays.items())))  # type: ignore[arg-type]
    write_bytes(path, sealed(memory.getvalue()))
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
        return _arrays(path)
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is no file of weights ({error}); delete it, or choose another folder") from None


def _arrays(path: Path) -> dict[str, np.ndarray]:
    archive = path.read_bytes()
    check_whole(path, archive)
    with np.load(io.BytesIO(archive)) as file:
        return {entry: file[entry] for entry in file.files}


def load_weights(name: str, key: str, controller: torch.nn.Module, folder: Path = FOLDER) -> torch.nn.Module:
    """Give a controller the weights of that key; returns it.

    Raises:
        ValueError: The file or the key is not there, or belongs to another network.
    """
    path = Path(folder) / f"{name}.npz"
    try:
        parts = {name.partition("/")[2]: array for name, array in _arrays(path).items() if name.startswith(f"{key}/")}
        controller.load_state_dict(
            {part: torch.from_numpy(values.astype(np.float32)) for part, values in parts.items()}
        )
    except (OSError, EOFError, RuntimeError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"no weights {key!r} in {path}: {error}; python -m demos.train_weights {name} makes them"
        ) from None
    return controller
