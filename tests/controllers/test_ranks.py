"""Training shared by several processes: the same update, the same record, files from one of them, an end for all."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from small_training import GIVEN, never, small

from controllers import train
from controllers.checkpoint import load_checkpoint
from controllers.ranks import Ranks
from controllers.record import read_record
from controllers.training import Loop


def take_part(rank, world, folder):
    """Body of one of several processes: two updates, then a training of one epoch stopped within the second."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    torch.save({name: updates(settings) for name, settings in cases().items()}, f"{folder}/updates{rank}.pt")
    if world == 2:
        asked = iter(range(1000))
        # Only one of the two is asked to stop, by the user who pressed a key; both do.
        stop = (lambda: next(asked) >= 6) if rank == 1 else None
        train(replace(RUN, out=f"{folder}/run"), stop=stop)
        train(replace(RUN, out=f"{folder}/run"), resume=True)
    dist.destroy_process_group()


RUN = small(flow="averaged", precision="float64")


def cases():
    """Settings whose first updates are compared: nine rows, which two and four processes do not share evenly."""
    settings = small(batch=9, train_states=18, precision="float64")
    flows = {flow: replace(settings, flow=flow) for flow in FLOWS}
    more = {"in parts": replace(settings, flow="C", accumulate=2)}
    return flows | more | {"given inputs": small(**GIVEN, batch=9, train_states=18, precision="float64")}


FLOWS = ("R", "M", "C", "geometric", "averaged", "either")


def updates(settings):
    """The first two updates, one after the other, and the averages of a flow with a memory."""
    loop, found = Loop(settings), []
    for states in loop.train_states.unflatten(0, (2, 1, 9)):
        loop.update(states, never)
        found += [parameter.grad.flatten() for parameter in loop.parameters]
    return torch.cat([*found, *(mean.flatten() for mean in loop.step.state_dict()["means"].values())])


@pytest.fixture(scope="module", params=[2, 4])
def world(request, tmp_path_factory):
    """Number of processes, and the folder with what they left."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(take_part, (request.param, str(folder)), nprocs=request.param)
    return request.param, folder


def test_ranks_make_the_updates_of_one(world):
    count, folder = world
    found = [torch.load(folder / f"updates{rank}.pt", weights_only=True) for rank in range(count)]
    for name, settings in cases().items():
        whole = updates(settings)
        for ranks in found:
            assert torch.equal(ranks[name], found[0][name])  # or the weights would drift apart
            assert (ranks[name] - whole).norm() < 1e-9 * whole.norm(), name


def test_ranks_record_what_one_does(world):
    count, folder = world
    if count != 2:
        pytest.skip("two are enough")
    records = load_checkpoint(folder / "run")["records"]
    whole = train(RUN).records
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


def test_means_over_uneven_shares(monkeypatch):
    ranks = Ranks()
    ranks.rank, ranks.world = 1, 2
    rows = torch.arange(5.0)
    assert ranks.share(rows).tolist() == [1.0, 3.0]
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.add_(rows[::2].mean() * 3 / 5))
    mean = ranks.share(rows).mean()
    ranks.average(mean)
    assert float(mean) == pytest.approx(2.0)


FLAGS = "--poles 1 --dt 0.02 --steps 20 --hidden 8 --batch 8 --train-states 32 --test-states 16".split()


def launched(world, *arguments):
    """A training by torchrun, in a session of its own."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), *filter(None, sys.path)])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    return subprocess.Popen(
        [*command, "-m", "controllers", *FLAGS, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def rank_of(process):
    """The rank of a process, by its environment; None where it has none."""
    try:
        entries = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((int(entry[5:]) for entry in entries if entry.startswith(b"RANK=")), None)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_the_others_and_any_number_goes_on(killed, tmp_path):
    out = tmp_path / "run"
    program = launched(2, "--flow", "averaged", "--epochs", "100000", "--checkpoint-every", "1", "--out", str(out))
    try:
        while not (out / "checkpoint.pt").exists():
            assert program.poll() is None, program.stderr.read()
            time.sleep(0.05)
        children = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
        (victim,) = [child for child in children if rank_of(child) == killed]
        begun = time.monotonic()
        os.kill(int(victim), signal.SIGKILL)
        said = program.communicate(timeout=60)[1]
        assert time.monotonic() - begun < 60.0
    finally:
        program.kill()
        program.wait()
    assert program.returncode != 0
    assert f"The training ended: rank {1 - killed} of 2 has lost the others" in said
    assert "To go on, with any number of ranks:" in said
    epochs = len(load_checkpoint(out)["records"])
    assert epochs >= 1
    settings = small(flow="averaged", hidden=(8,), checkpoint_every=1, out=str(out), epochs=epochs + 1)
    trained = train(settings, resume=True)
    assert [record.epoch for record in trained.records] == list(range(1, epochs + 2))
    if killed == 0:  # and with several again
        program = launched(2, "--resume", "--flow", "averaged", "--epochs", str(epochs + 2), "--out", str(out))
        said = program.communicate(timeout=300)[1]
        assert program.returncode == 0, said
        assert len(read_record(out / "record.csv")) == epochs + 2
