"""What the command lines of all demos share: files are checked before anything runs, what goes wrong takes a line."""

import importlib

import pytest

from demos import diagnose, outputs, train_weights
from demos.outputs import PICTURES, check_file, check_folder
from warp_phys import Diverged


def test_what_can_be_written_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.png").touch()
    for name in ("new.png", "OLD.PNG", "old.png", "a/b/new.svg", tmp_path / "c" / "new.pdf"):
        check_file("save", name, PICTURES)
    for name in (".", "a/b", tmp_path):
        check_folder("out", name)
    assert [path.name for path in tmp_path.iterdir()] == ["old.png"]


def test_what_cannot_be_written(tmp_path, monkeypatch):
    file, folder, link = tmp_path / "file", tmp_path / "folder.png", tmp_path / "link"
    file.touch()
    folder.mkdir()
    link.symlink_to(tmp_path / "nowhere")
    place = "must be where files can be written, got"
    for name, message in (
        ("a.xyz", "save must end in .png, .pdf, .svg, got 'a.xyz'"),
        ("a", "save must end in .png, .pdf, .svg, got 'a'"),
        (folder, f"save must name a file, got '{folder}', which is a folder"),
        (file / "a.png", f"save {place} '{file / 'a.png'}', but {file} is no folder"),
        (file / "b" / "a.png", f"save {place} '{file / 'b' / 'a.png'}', but {file} is no folder"),
    ):
        with pytest.raises(ValueError) as caught:
            check_file("save", name, PICTURES)
        assert str(caught.value) == message
    for name, message in (
        ("", "out must name a folder, got an empty name"),
        (file, f"out {place} '{file}', but {file} is no folder"),
        (link / "a", f"out {place} '{link / 'a'}', but {link} is no folder"),
        (tmp_path / ("a" * 300), f"out {place} '{tmp_path / ('a' * 300)}': File name too long"),
    ):
        with pytest.raises(ValueError) as caught:
            check_folder("out", name)
        assert str(caught.value) == message
    monkeypatch.setattr(outputs.os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path} is not open to this user"):
        check_folder("out", tmp_path / "a")


@pytest.mark.parametrize(
    ("name", "flag", "path"),
    [
        ("diagnose", "--save", "file/a.png"),
        ("landscape", "--save", "file/a.png"),
        ("newton_control", "--save", "file/a.png"),
        ("cartpole", "--save", "file/a.png"),
        ("paper", "--out", "file"),
        ("swingup", "--out", "file"),
        ("train_weights", "--out", "file"),
    ],
)
def test_demos_refuse_it_before_they_run(name, flag, path, tmp_path, monkeypatch, capsys):
    if name == "newton_control":
        pytest.importorskip("newton")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"demos.{name}").main([flag, path])
    said, error = capsys.readouterr()
    assert ended.value.code == 2 and not said
    assert error.startswith(
        f"python -m demos.{name}: error: {flag[2:]} must be where files can be written, got '{path}'"
    )
    assert error.count("\n") == 1


def diverge(*arguments):
    """As a training may."""
    raise Diverged(3, [0])


@pytest.mark.parametrize(
    ("demo", "function", "line", "message"),
    [
        (
            diagnose,
            "compute",
            ["--save", "a.png"],
            "the run diverged: the trajectory leaves the finite numbers at step 3",
        ),
        (train_weights, "make_controller", ["herd"], "the training of herd R diverged: the trajectory leaves"),
    ],
    ids=["diagnose", "train_weights"],
)
def test_a_divergence_takes_one_line(demo, function, line, message, monkeypatch, capsys):
    monkeypatch.setattr(demo, function, diverge)
    with pytest.raises(SystemExit) as ended:
        demo.main(line)
    error = capsys.readouterr().err
    assert ended.value.code == 1 and f": error: {message}" in error and error.count("\n") == 1
