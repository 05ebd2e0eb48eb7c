"""The command line program: signals, exit statuses, resuming, progress."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from small_training import small, without_seconds

from controllers import train
from controllers.checkpoint import load_checkpoint
from controllers.commandline import Parser, main, stop_on_signals
from controllers.progress import Progress
from controllers.record import Record, read_record
from controllers.training import Loop
from warp_phys import Diverged

FLAGS = "--poles 1 --dt 0.02 --steps 20 --hidden 16 16 --batch 8 --train-states 32 --test-states 16".split()


SHORT = [*FLAGS, "--epochs", "2"]


@contextlib.contextmanager
def started(*arguments):
    """The program as a user starts it; what it says on standard error can be read."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), *filter(None, sys.path)])}
    command = [sys.executable, "-m", "controllers", *FLAGS, *arguments]
    program = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        yield program
    finally:
        program.kill()
        program.wait()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_everything_and_the_run_goes_on_to_the_same_bits(number, status, tmp_path):
    out = str(tmp_path / "a run")
    with started("--epochs", "1000000", "--out", out) as program:
        assert any(line.startswith("epoch 1/1000000") for line in program.stderr)
        program.send_signal(number)
        said = program.communicate(timeout=30)[1]
    assert program.returncode == status, said
    assert "Traceback" not in said
    assert f"python -m controllers --resume --out '{out}'" in said
    checkpoint = load_checkpoint(tmp_path / "a run")
    epochs = len(checkpoint["records"])
    assert epochs >= 1
    assert len(read_record(tmp_path / "a run" / "record.csv")) == epochs
    assert main(["--resume", "--out", out, "--epochs", str(epochs + 1)]) == 0
    whole = train(small(epochs=epochs + 1))
    weights = torch.load(tmp_path / "a run" / "controller.pt", weights_only=True)
    assert all(torch.equal(weights[name], value) for name, value in whole.controller.state_dict().items())
    resumed = [Record(*values) for values in load_checkpoint(tmp_path / "a run")["records"]]
    assert without_seconds(resumed) == without_seconds(whole.records)


def test_a_divergence_is_told_without_a_traceback(tmp_path, capsys):
    assert main([*FLAGS, "--dt", "1e30", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "The training diverged" in said
    assert "Traceback" not in said
    assert "There is no checkpoint yet" in said
    assert "on_divergence" not in said


def test_a_divergence_after_a_checkpoint_says_what_is_kept(tmp_path, capsys, monkeypatch):
    update = Loop.update

    def diverge(loop, states, stop):
        if loop.records:
            raise Diverged(5, [0], maskable=True)
        update(loop, states, stop)

    monkeypatch.setattr(Loop, "update", diverge)
    assert main([*FLAGS, "--epochs", "2", "--checkpoint-every", "1", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert f"The last checkpoint and the record are kept in {tmp_path}." in said
    assert "on_divergence" not in said


def test_a_run_in_the_way_is_told(tmp_path, capsys):
    arguments = [*FLAGS, "--epochs", "1", "--out", str(tmp_path)]
    assert main(arguments) == 0
    capsys.readouterr()
    assert main(arguments) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("python -m controllers: error: out: ")
    assert "already holds a run" in said
    assert main([*arguments, "--overwrite"]) == 0


def test_handlers_are_given_back_and_a_second_signal_ends_at_once(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop_on_signals() as (stop, received):
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        assert received == [signal.SIGINT]
        assert not ended
        signal.raise_signal(signal.SIGINT)
        assert ended == [130]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_another_thread_installs_no_handlers():
    before, seen = signal.getsignal(signal.SIGINT), []

    def body():
        with stop_on_signals():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_folder_that_cannot_be_written_is_told(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert main([*FLAGS, "--epochs", "1", "--out", str(tmp_path / "file")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("python -m controllers: error: ")
    assert str(tmp_path / "file") in said


@pytest.mark.parametrize(
    ("wrong", "status", "message"),
    [
        (Diverged(3, [0]), 1, "prog: error: the training diverged: the trajectory leaves the finite numbers at step 3"),
        (
            OSError(28, "No space left on device", "a.png"),
            2,
            "prog: error: [Errno 28] No space left on device: 'a.png'",
        ),
    ],
)
def test_a_parser_answers_what_goes_wrong_in_a_run(wrong, status, message, capsys):
    with pytest.raises(SystemExit) as ended, Parser(prog="prog").answering("the training"):
        raise wrong
    error = capsys.readouterr().err
    assert ended.value.code == status and error.startswith(message) and error.count("\n") == 1


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def test_progress_is_a_bar_in_a_terminal_and_lines_elsewhere():
    record = Record(1, 0.5, 0.25, 0.125, 1.0, 0.5, 0.5, 1e-3, 1.0)
    streams = Terminal(), io.StringIO()
    for stream in streams:
        progress = Progress(4, stream, every=0.0, name="R")
        for epoch in (3, 4):  # resumed after the second
            progress(record._replace(epoch=epoch))
        progress.close()
    bar, lines = (stream.getvalue() for stream in streams)
    assert bar.startswith("\rR: ") and "4/4" in bar and "loss 2.500e-01, test 1.250e-01" in bar
    assert bar.count("\n") == 1
    assert "\r" not in lines
    assert [line[:12] for line in lines.splitlines()] == ["R: epoch 3/4", "R: epoch 4/4"]
    assert lines.endswith("00:00 left\n")


LOGGED = []


def test_numbers_go_to_a_function(tmp_path):
    LOGGED.clear()
    assert main([*SHORT, "--out", "", "--log", f"{__name__}:remember"]) == 0
    assert [record.epoch for record in LOGGED] == [1, 2]


def remember(record):
    LOGGED.append(record)


def test_numbers_go_to_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason='needs pip install "warp_phys[tensorboard]"')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = str(tmp_path / "run")
    assert main([*SHORT, "--out", out, "--log", "tensorboard"]) == 0
    assert main(["--resume", "--out", out, "--epochs", "3", "--log", "tensorboard"]) == 0
    found = EventAccumulator(out)
    found.Reload()
    losses = found.Scalars("test_loss")
    assert [event.step for event in losses] == [1, 2, 3]
    values = read_record(f"{out}/record.csv")["test_loss"]
    np.testing.assert_allclose([event.value for event in losses], values, rtol=1e-6)


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ("wandb", "log must be tensorboard, or a function as module:name, got 'wandb'"),
        ("nowhere:f", "log: nowhere:f cannot be had: No module named 'nowhere'"),
        ("math:pi", "log must be a function, got math:pi, which is of type float"),
        ("tensorboard", "log tensorboard needs the folder of a run in out, got an empty out"),
    ],
)
def test_logs_that_cannot_be_had(log, message, capsys):
    with pytest.raises(SystemExit) as status:
        main([*SHORT, "--out", "", "--log", log])
    error = capsys.readouterr().err
    assert status.value.code == 2 and message in error and error.count("\n") == 1
