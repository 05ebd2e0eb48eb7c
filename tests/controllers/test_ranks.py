"""Training shared by two processes: the same update, the same record, files from one of them."""

import pytest
import torch
import torch.distributed as dist
from small_training import GIVEN, never, small

from controllers import train
from controllers.checkpoint import load_checkpoint
from controllers.training import Loop


def take_part(rank, folder):
    """Body of one of two processes: one update, then a training of one epoch stopped within the second."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    updates = {}
    for name, settings in cases().items():
        loop = Loop(settings)
        loop.update(loop.train_states[None, :8], never)
        updates[name] = torch.cat([parameter.grad.flatten() for parameter in loop.parameters])
    torch.save(updates, f"{folder}/updates{rank}.pt")
    with pytest.raises(ValueError, match="flow 'averaged' has a memory, which is for one process, got 2"):
        Loop(small(flow="averaged"))
    asked = iter(range(1000))
    # Only one of the two is asked to stop, by the user who pressed a key; both do.
    stop = (lambda: next(asked) >= 6) if rank == 1 else None
    train(small(out=f"{folder}/run"), stop=stop)
    train(small(out=f"{folder}/run"), resume=True)
    dist.destroy_process_group()


def cases():
    """Settings whose first update is compared."""
    return {
        "regular": small(flow="R"),
        "combined": small(flow="C"),
        "in parts": small(flow="C", accumulate=3),
        "given inputs": small(**GIVEN),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder with what two processes left."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(take_part, (str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("name", cases())
def test_two_ranks_make_the_update_of_one(name, folder):
    loop = Loop(cases()[name])
    loop.update(loop.train_states[None, :8], never)
    whole = torch.cat([parameter.grad.flatten() for parameter in loop.parameters])
    for rank in range(2):
        update = torch.load(folder / f"updates{rank}.pt", weights_only=True)[name]
        assert (update - whole).norm() < 1e-4 * whole.norm()


def test_two_ranks_record_what_one_does(folder):
    records = load_checkpoint(folder / "run")["records"]
    whole = train(small()).records
    assert len(records) == len(whole) == 4
    for values, record in zip(records, whole, strict=True):
        assert values[:4] == pytest.approx(tuple(record)[:4], rel=1e-3)
    assert {path.name for path in (folder / "run").iterdir()} == {
        "checkpoint.pt",
        "controller.pt",
        "curves.png",
        "record.csv",
        "run.toml",
    }
