"""The torch half: small networks, the training loop, its command line, checkpoints.

python -m controllers --system cartpole --poles 4 --flow combined --epochs 1000 --seed 0 --out out/run
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if find_spec("torch") is None:
    from warp_phys.interop.extras import require

    require("torch", "torch")  # it raises; where torch is there, Warp is not loaded yet

if TYPE_CHECKING:
    from controllers.exporting import export, load_controller
    from controllers.networks import GRU, MLP, GridCNN, Linear
    from controllers.settings import Training
    from controllers.training import train

__all__ = ["GRU", "MLP", "GridCNN", "Linear", "Training", "export", "load_controller", "train"]

_HOMES = {
    "GRU": "networks",
    "MLP": "networks",
    "GridCNN": "networks",
    "Linear": "networks",
    "Training": "settings",
    "export": "exporting",
    "load_controller": "exporting",
    "train": "training",
}


# Names load on first use: the command line program guards against Ctrl-C before it spends seconds importing torch.
def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
