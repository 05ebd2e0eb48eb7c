"""Where the records of a training go besides its own files: TensorBoard, or any function."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from controllers.record import Record
from warp_phys.interop.extras import require

Log = Callable[[Record], None]


class TensorBoard:
    """Writes each record that it is called with for TensorBoard: `train(settings, log=TensorBoard("out/run"))`.

    A training that is resumed goes on where it stands: what was written of later epochs is taken back.

    Args:
        folder: Where to; `tensorboard --logdir` takes it, or a folder above it.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        require("tensorboard", "tensorboard")
        self.folder = str(folder)
        self._writer: Any = None

    def __call__(self, record: Record) -> None:
        """Write all numbers of an epoch."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415, it takes a second

            self._writer = SummaryWriter(self.folder, purge_step=record.epoch)
        for name, value in record._asdict().items():
            if name != "epoch":
                self._writer.add_scalar(name, value, record.epoch)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()


def make_log(text: str, folder: str) -> Log:
    """What a command line asks for: "tensorboard", or a function as module:name.

    Args:
        text: The word, or the function.
        folder: Folder of the run, for TensorBoard.

    Raises:
        ValueError, ImportError: There is no such thing, or TensorBoard has no folder to write to.

    >>> make_log("builtins:print", "") is print
    True
    """
    if text == "tensorboard":
        if not folder:
            raise ValueError("log tensorboard needs the folder of a run in out, got an empty out")
        return TensorBoard(folder)
    module, _, name = text.partition(":")
    if not (module and name):
        raise ValueError(f"log must be tensorboard, or a function as module:name, got {text!r}")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"log: {text} cannot be had: {error}") from None
    if not callable(found):
        raise ValueError(f"log must be a function, got {text}, which is of type {type(found).__name__}")
    return found
