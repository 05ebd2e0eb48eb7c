"""Files that are never half written, and whose damage is noticed: a temporary name, a rename, a checksum.

A checkpoint, and any other file of tensors, is what torch or numpy write, a ZIP archive; its comment, which their
readers pass over, is the SHA-256 of all that stands before it.
"""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

CHECKPOINT, CONTROLLER, RECORD, CURVES = "checkpoint.pt", "controller.pt", "record.csv", "curves.png"
CONFIG = "run.toml"
OLD_CONFIG = "settings.json"
"""What settings were called before."""
VERSION = 3
"""Of the checkpoints that are written. 1 had no "update", 2 neither "version" nor a checksum; both can be read."""
KINDS: dict[str, type | tuple[type, ...]] = {
    "settings": dict,
    "weights": dict,
    "optimiser": dict,
    "records": list,
    "minibatch": int,
    "losses": torch.Tensor,
    "seconds": (int, float),
}
"""What a checkpoint holds."""
ADDED: dict[str, type | tuple[type, ...]] = {"update": dict, "version": int}
"""What checkpoints of earlier versions lack."""
SEAL = b"sha256 "
"""Begin of the comment that holds a checksum."""
SEAL_LENGTH = len(SEAL) + 64


class Damaged(ValueError):
    """A file is not as it was written; the message says which, and what is wrong with it."""


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a binary file that takes the place of `path` once everything is written, or leaves `path` as it was.

    Raises:
        OSError: It cannot be written; in one sentence, which names the file.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "numbers.txt"
    >>> with atomic_write(path) as file:
    ...     _ = file.write(b"1 2 3")
    >>> path.read_text()
    '1 2 3'
    """
    # in memory at first: what a library makes of a full disk is its own business
    content = io.BytesIO()
    yield content
    write_bytes(path, content.getvalue())


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a whole file at once, or leave it as it was.

    Raises:
        OSError: As `atomic_write`.
    """
    path = Path(path)
    # A fixed name: what a killed program leaves behind is overwritten by the next one.
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        kept = "; the file that was there is as it was" if os.path.exists(path) else ""
        # made of a text alone, it is shown without the number of the error
        raise type(error)(f"{path} cannot be written: {error.strerror}{kept}") from None


def sealed(archive: bytes) -> bytes:
    """Return a ZIP archive with its checksum as its comment."""
    body = archive[:-2] + SEAL_LENGTH.to_bytes(2, "little")  # the last thing before a comment is its length
    return body + SEAL + hashlib.sha256(body).hexdigest().encode()


def check_whole(path: str | Path, archive: bytes) -> None:
    """Raise `Damaged` if a file is not as it was written; nothing is said of what is no ZIP archive.

    A file without a checksum, of an earlier version or written by other programs, has those of its parts.
    """
    damage = _damage(archive)
    if damage:
        raise Damaged(f"{path} is damaged: {damage}; put a copy in its place, or delete it")


def _damage(archive: bytes) -> str:
    if not archive.startswith(b"PK"):
        return "" if archive.strip(b"\0") else f"its {len(archive)} bytes hold nothing"
    body, comment = archive[:-SEAL_LENGTH], archive[-SEAL_LENGTH:]
    if comment.startswith(SEAL):
        right = comment == SEAL + hashlib.sha256(body).hexdigest().encode()
        return "" if right else "its checksum is not that of its content"
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as parts:
            wrong = parts.testzip()
            if wrong is None and parts.comment:
                return "its checksum cannot be read"
    except Exception as error:  # whatever can go wrong with bytes that can be anything
        return f"it ends too early or lacks a part, {len(archive)} bytes are there ({error})"
    return f"the checksum of its part {wrong} is not that of its content" if wrong else ""


def save_tensors(path: str | Path, content: Any) -> None:
    """Write tensors, numbers, text, and containers of them, for `torch.load`, with a checksum.

    Raises:
        OSError: As `atomic_write`.
    """
    archive = io.BytesIO()
    torch.save(content, archive)
    write_bytes(path, sealed(archive.getvalue()))


def load_tensors(path: str | Path) -> Any:
    """Read what `save_tensors` wrote, or `torch.save`, without running any code that a file may hold.

    Raises:
        OSError: It cannot be read.
        Damaged: It is not as it was written.
        ValueError: It is something else.
    """
    archive = Path(path).read_bytes()
    check_whole(path, archive)
    try:
        return torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)
    except Exception:  # torch has many words for it, among them those of pickle, which is not run
        raise ValueError(f"{path} is no file of tensors of this program") from None


def save_checkpoint(folder: Path, content: dict[str, Any]) -> None:
    """Write a run's checkpoint: tensors, numbers, text, and containers of them only, so that loading runs no code."""
    save_tensors(folder / CHECKPOINT, {**content, "version": VERSION})


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """Read a run's checkpoint, of this version or an earlier one.

    Raises:
        FileNotFoundError: The folder holds none.
        Damaged: The file is not as it was written.
        ValueError: It is of a later version, or something else.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        raise FileNotFoundError(f"out: {folder} holds no {CHECKPOINT}, so there is nothing to resume")
    try:
        content = load_tensors(path)
    except Damaged as error:
        raise Damaged(f"out: {error}") from None
    except ValueError:
        content = None
    version = content.get("version", 0) if isinstance(content, dict) else 0
    if isinstance(version, int) and version > VERSION:
        raise ValueError(
            f"out: {path} is a checkpoint of version {version}, this program reads those up to {VERSION}: resume it "
            "with the program that wrote it, or a later one"
        )
    kinds = KINDS | ADDED
    if not isinstance(content, dict) or not KINDS.keys() <= content.keys() <= kinds.keys():
        raise ValueError(f"out: {path} is not a checkpoint of this program")
    for name, value in content.items():
        if not isinstance(value, kinds[name]):
            raise ValueError(f"out: {path} is not a checkpoint of this program: its {name} are {type(value).__name__}")
    return content


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
