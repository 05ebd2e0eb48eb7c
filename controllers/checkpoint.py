"""Files that are never half written: a temporary name in the same folder, then a rename."""

import json
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

CHECKPOINT, CONTROLLER, RECORD, CURVES = "checkpoint.pt", "controller.pt", "record.csv", "curves.png"
CONFIG = "run.toml"
OLD_CONFIG = "settings.json"
"""What settings were called before."""
KEYS = {"settings", "weights", "optimiser", "records", "minibatch", "losses", "seconds"}
ADDED = {"update"}
"""What checkpoints of earlier versions lack."""


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a binary file that takes the place of `path` once everything is written, or leaves `path` as it was.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "numbers.txt"
    >>> with atomic_write(path) as file:
    ...     _ = file.write(b"1 2 3")
    >>> path.read_text()
    '1 2 3'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A fixed name: what a killed program leaves behind is overwritten by the next one.
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def save_checkpoint(folder: Path, content: dict[str, Any]) -> None:
    """Write a run's checkpoint: tensors, numbers, text, and containers of them only, so that loading runs no code."""
    with atomic_write(folder / CHECKPOINT) as file:
        torch.save(content, file)


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """Read a run's checkpoint.

    Raises:
        FileNotFoundError: The folder holds none.
        ValueError: The file is something else.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        raise FileNotFoundError(f"out: {folder} holds no {CHECKPOINT}, so there is nothing to resume")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if KEYS <= content.keys() <= KEYS | ADDED:
            return content
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, LookupError, ValueError):
        pass
    raise ValueError(f"out: {path} is not a checkpoint of this program")


def save_json(path: Path, content: dict[str, Any]) -> None:
    """Write a dictionary as indented JSON."""
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def claim_folder(folder: Path, overwrite: bool) -> None:
    """Make sure that a new run destroys nothing: refuse a folder that holds a run, or clear it where that was asked.

    The settings of the run that was there, which may have been written by hand, stay beside it as run.toml.before.

    Raises:
        FileExistsError: The folder holds a run and `overwrite` is false.
    """
    found = [name for name in (CHECKPOINT, CONTROLLER, RECORD, CURVES, CONFIG, OLD_CONFIG) if (folder / name).exists()]
    if found and not overwrite:
        raise FileExistsError(
            f"out: {folder} already holds a run ({', '.join(found)}); "
            "continue it with resume, replace it with overwrite, or choose another out"
        )
    for name in found:
        if name == CONFIG:
            (folder / name).replace(folder / f"{name}.before")
        else:
            (folder / name).unlink()
