"""Runs of the published experiments as jobs: the same results, one job a run, a stop that loses nothing."""

import signal
import sys
import threading
import time
from dataclasses import replace

import pytest
from small_runs import SMALL, small_plan

from controllers.checkpoint import load_checkpoint
from controllers.record import Record
from controllers.training import train
from demos import paper
from demos.experiments.cluster import Job, read_options, run_on_cluster
from demos.experiments.plan import BEGUN, FAILED, FINISHED, State
from demos.experiments.pool import locked

LINE = ["--experiment", "cartpole", "--level", "1", "--flow", "R", "C", "--clip", "none", "--seeds", "1", *SMALL]


class Heard:
    """A listener that keeps what it is told."""

    def __init__(self):
        self.begun_runs, self.ends, self.epochs = [], {}, {}

    def begun(self, run):
        self.begun_runs.append(run.name)

    def recorded(self, run, record):
        self.epochs[run.name] = record.epoch

    def ended(self, run, state):
        self.ends[run.name] = state

    def waited(self):
        pass


def curve(records):
    """All that is on record but the time it took."""
    return [Record(*values)._replace(seconds=0.0) for values in records]


def test_jobs_leave_what_processes_leave(tmp_path, capsys):
    out = tmp_path / "out"
    line = [*LINE, "--epochs", "3", "--processes", "2", "--cluster", "local", "--out", str(out)]
    assert paper.main([*line, "--cluster-options", "timeout_min=10"]) == 0
    assert "2 of 2 runs to do in jobs (local)" in capsys.readouterr().err
    for run in small_plan(out):
        assert run.state() == State(FINISHED, 3)
        assert curve(load_checkpoint(run.folder)["records"]) == curve(train(replace(run.settings, out="")).records)
    assert {"epochs.csv", "runs.csv", "summary.csv", "summary.md", "cartpole.png"} <= {p.name for p in out.iterdir()}


def test_a_stop_has_jobs_save(tmp_path):
    (run,), stop, heard = small_plan(tmp_path, "C", epochs=100_000), threading.Event(), Heard()

    def stop_when_begun():
        while not (run.folder / "checkpoint.pt").exists() and not stop.is_set():
            time.sleep(0.05)
        stop.set()

    watcher = threading.Thread(target=stop_when_begun)
    watcher.start()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a shell
    try:
        ended = run_on_cluster([run], tmp_path, "local", 1, {"timeout_min": 5}, heard, stop)
    finally:
        signal.signal(signal.SIGINT, before)
        stop.set()
        watcher.join()
    state = ended[run.name]
    assert state.word == BEGUN
    assert heard.begun_runs == [run.name]
    assert state.epochs == len(load_checkpoint(run.folder)["records"])
    with locked(tmp_path / ".processes"):  # nobody is at it any more
        pass


def test_one_job_a_run(tmp_path):
    (run,) = small_plan(tmp_path, "R", epochs=2)
    with locked(run.folder / ".job"):
        assert Job(run, str(tmp_path))() == State(BEGUN, 0, "another job is at this run")
    assert Job(run, str(tmp_path))() == State(FINISHED, 2)
    before = (run.folder / "checkpoint.pt").stat().st_mtime_ns
    assert Job(run, str(tmp_path)).checkpoint().function() == State(FINISHED, 2)
    assert (run.folder / "checkpoint.pt").stat().st_mtime_ns == before


def test_a_job_that_fails_is_told(tmp_path):
    class Broken(type(small_plan("", "R")[0])):
        def state(self):
            raise RuntimeError("a machine that is out of order")

    (run,), heard = small_plan(tmp_path, "R"), Heard()
    broken = Broken(run.experiment, run.level, run.settings)
    ended = run_on_cluster([broken], tmp_path, "local", 1, {}, heard, threading.Event())
    assert ended[run.name].word == FAILED
    assert "a machine that is out of order" in ended[run.name].reason


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cluster", "moon"], "cluster must be one of slurm, local, got 'moon'"),
        (["--cluster-options", "a=1"], "cluster-options need a cluster"),
        (["--cluster", "local", "--cluster-options", "a"], "cluster-options must be name=value"),
    ],
)
def test_mistakes(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        paper.main([*LINE, "--out", str(tmp_path / "out"), *flags])
    assert message in capsys.readouterr().err


def test_unknown_options_and_no_slurm(tmp_path, monkeypatch, capsys):
    line = [*LINE, "--epochs", "1", "--out", str(tmp_path / "out")]
    assert paper.main([*line, "--cluster", "local", "--cluster-options", "moon=1"]) == 2
    assert "cluster local: " in capsys.readouterr().err
    monkeypatch.setenv("PATH", "")
    assert paper.main([*line, "--cluster", "slurm"]) == 2
    assert "cluster slurm: " in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert paper.main([*line, "--cluster", "local"]) == 2
    assert 'submitit is not installed: pip install "warp_phys[cluster]"' in capsys.readouterr().err


def test_options():
    assert read_options(["timeout_min=60", "slurm_partition=gpu", "x=a=b"]) == {
        "timeout_min": 60,
        "slurm_partition": "gpu",
        "x": "a=b",
    }
