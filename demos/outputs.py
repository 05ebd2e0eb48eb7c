"""What a demo is told to write, checked before anything runs: nobody shall wait for what cannot be saved."""

import os
from collections.abc import Sequence
from pathlib import Path

PICTURES = (".png", ".pdf", ".svg")
"""Endings of pictures that do not move."""


def check_file(name: str, path: str | Path, endings: Sequence[str]) -> None:
    """Raise ValueError where no file could be written; nothing is created.

    Args:
        name: The argument that names the file.
        path: The file; folders that are missing would be made.
        endings: Endings that it may have.
    """
    if Path(path).suffix.lower() not in endings:
        raise ValueError(f"{name} must end in {', '.join(endings)}, got {str(path)!r}")
    if Path(path).is_dir():
        raise ValueError(f"{name} must name a file, got {str(path)!r}, which is a folder")
    check_place(name, path, Path(path).absolute().parent)


def check_folder(name: str, path: str | Path) -> None:
    """Raise ValueError where this is no folder, or none could be made, in which files can be written."""
    if not str(path):
        raise ValueError(f"{name} must name a folder, got an empty name")
    check_place(name, path, Path(path).absolute())


def check_place(name: str, path: str | Path, folder: Path) -> None:
    """Raise ValueError where `folder`, or else the nearest one above it, is no folder to write in."""
    wanted = f"{name} must be where files can be written, got {str(path)!r}"
    for place in (folder, *folder.parents):
        try:
            place.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise ValueError(f"{wanted}: {error.strerror}") from None
        if not place.is_dir():
            raise ValueError(f"{wanted}, but {place} is no folder")
        if not os.access(place, os.W_OK | os.X_OK):
            raise ValueError(f"{wanted}, but {place} is not open to this user")
        return
