"""A run as a file: it comes back as it was, it is read by eye, flags override it, mistakes are named."""

import tomllib
from dataclasses import fields

import pytest
from small_training import small

from controllers import Training, train
from controllers.checkpoint import load_checkpoint
from controllers.commandline import field_help, main, parse
from controllers.config import read_config, write_config
from warp_phys.systems import SYSTEMS


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_file_gives_back_what_was_written(system, tmp_path):
    settings = Training(
        system=system, flow="R", hidden=(), shuffle=True, rate=1 / 3, epsilon=1e-300, betas=(0.1, 0.2), out='a "b"\\ü'
    )
    write_config(tmp_path / "run.toml", settings)
    assert Training(**read_config(tmp_path / "run.toml")) == settings
    assert parse(["--config", str(tmp_path / "run.toml")]).settings == settings


def test_it_explains_each_line(tmp_path):
    write_config(tmp_path / "run.toml", Training())
    text = (tmp_path / "run.toml").read_text(encoding="utf-8")
    words = " ".join(text.replace("# ", "").split())
    for kind in (Training, SYSTEMS["cartpole"]):
        for name in {entry.name for entry in fields(kind)} - {"parameters"}:
            assert field_help(kind)[name] in words
    assert max(map(len, text.splitlines())) <= 100
    assert tomllib.loads(text)["parameters"]["gravity"] == 9.8


def test_flags_override_it(tmp_path):
    file = tmp_path / "part.toml"
    file.write_text('steps = 7\nflow = "M"\nhidden = [3, 4]\n[parameters]\npoles = 3\ndt = 0.02\n')
    line = ["--config", str(file)]
    parameters = {"poles": 3, "dt": 0.02}
    assert parse(line).settings == Training(steps=7, flow="M", hidden=(3, 4), parameters=parameters)
    changed = parse([*line, "--flow", "R", "--poles", "2", "--hidden", "5"]).settings
    assert changed == Training(steps=7, flow="R", hidden=(5,), parameters=parameters | {"poles": 2})
    other = parse([*line, "--system", "quantum", "--target", "2"]).settings
    assert other == Training(system="quantum", steps=7, flow="M", hidden=(3, 4), parameters={"target": 2})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz = 7", "unknown field 'stepz'; did you mean 'steps'?"),
        ("colour = 7", "unknown field 'colour'; known are system, parameters, steps"),
        ("[parameters]\npole = 2", "unknown field 'parameters.pole'; did you mean 'poles'?"),
        ('steps = "7"', "steps must be an integer, got '7'"),
        ("steps = 7.0", "steps must be an integer, got 7.0"),
        ("steps = true", "steps must be an integer, got True"),
        ("rate = false", "rate must be a number, got False"),
        ("shuffle = 1", "shuffle must be true or false, got 1"),
        ("out = 1", "out must be text, got 1"),
        ('clip = "both"', "clip must be one of none, value, norm, got 'both'"),
        ("clip = [1]", "clip must be one of none, value, norm, got [1]"),
        ("hidden = 100", "hidden must be a list of integers, got 100"),
        ("hidden = [1.5]", "hidden must be a list of integers, got [1.5]"),
        ("betas = [0.9]", "betas must be a list of 2 numbers, got [0.9]"),
        ("parameters = 3", "parameters must be a table, got 3"),
        ("[parameters]\npoles = 2.5", "parameters.poles must be an integer, got 2.5"),
        ('[parameters]\ndt = "fast"', "parameters.dt must be a number, got 'fast'"),
        ("steps = 0", "steps must be an integer at least 1, got 0"),
        ('system = "teapot"', "system must be one of"),
        ("system = 3", "system must be text, got 3"),
        ("steps 7", "is not a file of settings"),
        ("\udcff", "is not a file of settings"),
        (None, "No such file"),
    ],
)
def test_mistakes_are_named_in_one_line(text, message, tmp_path, capsys):
    file = tmp_path / "run.toml"
    if text is not None:
        file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(SystemExit) as status:
        main(["--config", str(file)])
    error = capsys.readouterr().err
    assert status.value.code == 2
    assert message in error and error.count("\n") == 1


def test_a_run_is_repeated_and_resumed_by_its_file(tmp_path):
    first = train(small(out=str(tmp_path / "first"), epochs=2))
    file = tmp_path / "first" / "run.toml"
    assert main(["--config", str(file), "--out", str(tmp_path / "second")]) == 0
    second = load_checkpoint(tmp_path / "second")
    assert second["settings"] == load_checkpoint(tmp_path / "first")["settings"] | {"out": str(tmp_path / "second")}
    for name, value in first.controller.state_dict().items():
        assert (second["weights"][name] == value).all()
    # What its file says now decides how it goes on.
    file.write_text(file.read_text(encoding="utf-8").replace("epochs = 2", "epochs = 3"), encoding="utf-8")
    assert main(["--resume", "--out", str(tmp_path / "first")]) == 0
    assert len(load_checkpoint(tmp_path / "first")["records"]) == 3
    assert main(["--resume", "--config", str(file), "--epochs", "4"]) == 0
    whole = train(small(epochs=4))
    weights = load_checkpoint(tmp_path / "first")["weights"]
    assert all((weights[name] == value).all() for name, value in whole.controller.state_dict().items())


def test_an_edit_that_makes_another_run_is_refused(tmp_path, capsys):
    train(small(out=str(tmp_path), epochs=1))
    file = tmp_path / "run.toml"
    file.write_text(file.read_text(encoding="utf-8").replace("batch = 8", "batch = 4"), encoding="utf-8")
    assert main(["--resume", "--out", str(tmp_path)]) == 2
    assert "batch was 8, is 4" in capsys.readouterr().err
