"""The runs of the published experiments: resumed after a kill, never done twice, failures on record, time left."""

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from small_runs import SMALL, changed, records, small_plan

from controllers.checkpoint import load_checkpoint
from controllers.record import Record
from controllers.training import train
from demos import paper
from demos.experiments.plan import BEGUN, DIVERGED, FAILED, FINISHED, WAITING, State
from demos.experiments.pool import hire, locked, perform, receive, run_all
from demos.experiments.progress import Clock, Display
from demos.experiments.results import load_result

EPOCHS = 200


def curve(folder):
    """All that a run has on record but the time it took."""
    return [Record(*values)._replace(seconds=0.0) for values in load_checkpoint(folder)["records"]]


@pytest.fixture(scope="module")
def in_one_go():
    """Records of the run with flow C, made without files and without a stop."""
    (run,) = small_plan("", "C", epochs=EPOCHS)
    return [record._replace(seconds=0.0) for record in train(replace(run.settings, out="")).records]


def files(folder):
    """Every file of a run with its time of writing."""
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


class Silent:
    """A listener that keeps what it is told."""

    def __init__(self):
        self.told = []

    def begun(self, run):
        self.told.append(("begun", run.name))

    def recorded(self, run, record):
        pass

    def ended(self, run, state):
        self.told.append((state.word, run.name))

    def waited(self):
        pass


def never():
    return False


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_everything_to_go_on_with(number, status, tmp_path, in_one_go):
    out = tmp_path / "out"
    first, second = small_plan(out, epochs=EPOCHS)
    line = ["--experiment", "cartpole", "--level", "1", "--flow", "R", "C", "--clip", "none", "--seeds", "1"]
    line += [*SMALL, "--epochs", str(EPOCHS), "--processes", "1", "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), *filter(None, sys.path)])}
    command = [sys.executable, "-m", "demos.paper", *line]
    program = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    try:
        while not (second.folder / "checkpoint.pt").exists():
            assert program.poll() is None, program.stderr.read()
            time.sleep(0.002)
        early = (second.folder / "checkpoint.pt").stat().st_ino
        # A terminal sends Ctrl-C to the whole group, a queue of jobs its own signal.
        os.killpg(program.pid, number)
        # This waits until nobody holds the other end any more, so for the process of the run as well.
        said = program.communicate(timeout=60)[1]
    finally:
        program.kill()
        program.wait()
    assert program.returncode == status, said
    assert (second.folder / "checkpoint.pt").stat().st_ino != early  # saved once more, as it was when the signal came
    assert "Stopped with 1 of 2 runs done; everything is saved." in said
    assert "Traceback" not in said
    assert first.state() == State(FINISHED, EPOCHS)
    assert second.state().word == BEGUN
    assert 20 <= second.state().epochs < EPOCHS
    before = files(first.folder)
    assert paper.main(line) == 0
    assert files(first.folder) == before
    assert second.state() == State(FINISHED, EPOCHS)
    assert curve(second.folder) == in_one_go
    assert {"epochs.csv", "runs.csv", "summary.csv", "summary.md", "cartpole.png"} <= {p.name for p in out.iterdir()}


def test_a_killed_process_costs_one_run_which_then_goes_on(tmp_path, in_one_go):
    plan = small_plan(tmp_path, "CR", epochs=EPOCHS)
    plan[1] = changed(plan[1], epochs=3)

    class Killer(Silent):
        def recorded(self, run, record):
            if run is plan[0] and record.epoch == 30:
                (child,) = multiprocessing.active_children()
                os.kill(child.pid, signal.SIGKILL)

    listener = Killer()
    ended = run_all(plan, tmp_path, 1, listener, threading.Event())
    assert listener.told == [
        ("begun", plan[0].name),
        (FAILED, plan[0].name),
        ("begun", plan[1].name),
        (FINISHED, plan[1].name),
    ]
    assert ended[plan[0].name].word == FAILED
    assert ended[plan[0].name].reason == "its process ended with status -9"
    assert ended[plan[1].name] == State(FINISHED, 3)
    state = plan[0].state()
    assert state.word == BEGUN
    assert 20 <= state.epochs < EPOCHS
    assert perform(plan[0], never, lambda record: None) == State(FINISHED, EPOCHS)
    assert curve(plan[0].folder) == in_one_go


@pytest.mark.parametrize(
    ("asked", "number", "word", "reason"),
    [
        (True, signal.SIGTERM, BEGUN, ""),
        (True, signal.SIGKILL, FAILED, "its process ended with status -9"),
        (False, signal.SIGTERM, FAILED, "its process ended with status -15"),
    ],
)
def test_a_process_ended_by_the_signal_that_stops_the_program_has_not_failed(tmp_path, asked, number, word, reason):
    (run,) = small_plan(tmp_path, "R")
    worker, stop = replace(hire(tmp_path), run=run), threading.Event()
    if asked:
        stop.set()
    os.kill(worker.process.pid, number)
    assert receive(worker, Silent(), stop) == State(word, 0, reason)


def test_a_divergence_is_a_result_and_is_on_record(tmp_path):
    (run,) = small_plan(tmp_path, "R")
    run = changed(run, parameters={"poles": 1, "dt": 1e30})
    state = perform(run, never, lambda record: None)
    assert state.word == DIVERGED
    assert state.counts
    assert "finite" in state.reason
    assert run.state() == state
    assert json.loads((run.folder / "outcome.json").read_text())["word"] == DIVERGED
    assert load_result(run).final == float("inf")


def test_another_failure_is_told_and_tried_again(tmp_path):
    (run,) = small_plan(tmp_path, "R")
    run.folder.mkdir(parents=True)
    (run.folder / "checkpoint.pt").write_bytes(b"something else")
    state = perform(run, never, lambda record: None)
    assert state.word == FAILED
    assert not state.counts
    assert state.reason.startswith("ValueError: out: ")
    assert state.reason.endswith("is not a checkpoint of this program")
    assert run.state() == state
    (run.folder / "checkpoint.pt").unlink()
    assert perform(run, never, lambda record: None) == run.state() == State(FINISHED, 3)


def test_a_run_that_is_asked_to_stop_is_begun(tmp_path):
    (run,) = small_plan(tmp_path, "R")
    seen = []
    assert perform(run, lambda: len(seen) == 2, seen.append) == State(BEGUN, 2)
    assert run.state() == State(BEGUN, 2)
    assert perform(run, never, seen.append) == State(FINISHED, 3)
    assert [record.epoch for record in seen] == [1, 2, 3]


def test_failed_runs_decide_the_exit_status(tmp_path, monkeypatch, capsys):
    line = "--experiment cartpole --level 1 --flow R C --clip none --seeds 1 --epochs 3".split()
    line += [*SMALL, "--out", str(tmp_path)]
    first, second = small_plan(tmp_path)

    def pretended(runs, out, processes, listener, stop):
        assert [run.name for run in runs] == [first.name, second.name]
        return {first.name: State(DIVERGED, 1, "far"), second.name: State(word, 1, "odd")}

    monkeypatch.setattr(paper, "run_all", pretended)
    word = FAILED
    assert paper.main(line) == 1
    assert f"Failed, and tried again the next time: {second.name}" in capsys.readouterr().err
    word = DIVERGED
    assert paper.main(line) == 0


def test_a_lock_is_exclusive_or_shared(tmp_path):
    path = tmp_path / "lock"
    with locked(path, shared=True), locked(path, shared=True):
        with pytest.raises(BlockingIOError), locked(path):
            pass
    with locked(path), pytest.raises(BlockingIOError), locked(path, shared=True, patience=0.1):
        pass
    with locked(path):
        pass


def plan_of_two_speeds():
    """Two runs of the cart, one of quantum control, 11 epochs each."""
    plan = small_plan("", "R", epochs=11, levels={"cartpole": [1, 2], "quantum": [3]})
    return {f"{run.experiment} {run.level}": run for run in plan}


def test_the_time_left_knows_that_experiments_differ():
    plan = plan_of_two_speeds()
    fast, other, slow = plan["cartpole 1"], plan["cartpole 2"], plan["quantum 3"]
    clock = Clock([(run, 0) for run in plan.values()], processes=2)
    assert clock.estimate() is None
    clock.begun(fast, now=100.0)
    # The first epoch, in which kernels are compiled, says nothing.
    clock.recorded(fast, records([1.0])[0]._replace(seconds=50.0))
    assert clock.estimate() is None
    clock.recorded(fast, records([1.0] * 2)[1]._replace(seconds=52.0))
    left = clock.estimate()
    # 9 epochs of this run and 11 of the other one at 2 s, by two processes; but 11 epochs follow one another.
    assert left.seconds == pytest.approx(max((9 + 11) * 2.0 / 2, 11 * 2.0))
    assert not left.whole
    clock.begun(slow, now=110.0)
    clock.recorded(slow, records([1.0])[0]._replace(seconds=1.0))
    clock.recorded(slow, records([1.0] * 2)[1]._replace(seconds=101.0))
    left = clock.estimate()
    assert left.whole
    assert left.seconds == pytest.approx(9 * 100.0)
    # The run took 60 s, 2 of them in epochs after its first: what a run takes besides is 58 s.
    clock.ended(fast, now=160.0)
    assert clock.estimate().seconds == pytest.approx(9 * 100.0 + 58.0)
    clock.ended(slow, now=200.0)
    # The other one took nothing besides.
    assert clock.estimate().seconds == pytest.approx(11 * 2.0 + 58.0 / 2)
    clock.ended(other, now=200.0)
    assert clock.estimate().seconds == 0.0


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def show(stream, monkeypatch):
    """A display that has seen a run finish and another one diverge."""
    monkeypatch.setenv("COLUMNS", "60")
    plan, clock = list(plan_of_two_speeds().values()), iter(range(0, 10000, 40))
    states = [State(WAITING), State(BEGUN, 5), State(FINISHED, 11)]
    display = Display(list(zip(plan, states, strict=True)), 2, stream, now=lambda: float(next(clock)))
    display.begun(plan[0])
    for record in records([1.0] * 4):
        display.recorded(plan[0], record)
    display.ended(plan[0], State(FINISHED, 11))
    display.begun(plan[1])
    display.ended(plan[1], State(DIVERGED, 6, "at step 3"))
    display.close()
    return plan


def test_progress_is_a_line_now_and_then(monkeypatch):
    stream = io.StringIO()
    plan = show(stream, monkeypatch)
    lines = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue()
    # 1 + 5 + 11 of 33 epochs.
    assert lines[0] == "runs 1/3  epochs 17/33  1 running  timing the first runs"
    assert lines[1].startswith("runs 1/3  epochs 18/33  1 running  ")
    assert f"{plan[1].name} diverged after 6 epochs: at step 3" in lines
    assert lines[-1] == "runs 3/3  epochs 33/33  0 running  1 diverged"


def test_progress_is_one_refreshed_line_in_a_terminal(monkeypatch):
    stream = Terminal()
    plan = show(stream, monkeypatch)
    shown = stream.getvalue().split("\r")
    assert stream.getvalue().count("\n") == 2
    assert f"\x1b[K{plan[1].name} diverged after 6 epochs: at step 3\n" in shown
    assert shown[-1].startswith("█" * 20 + "  runs 3/3  epochs 33/33")
    # Nothing is longer than the terminal is wide.
    assert all(len(text.replace("\x1b[K", "").rstrip("\n")) < 60 for text in shown if "epochs:" not in text)
