"""Settings of a training: checks, seeds, and the command line that is made from them."""

from dataclasses import fields

import pytest

from controllers.commandline import field_help, main, parse
from controllers.settings import Training, derive_seeds
from warp_phys import CartPole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be an integer at least 1, got 0"),
        ({"epochs": 1.5}, "epochs must be an integer at least 1, got 1.5"),
        ({"batch": True}, "batch must be an integer at least 1, got True"),
        ({"batch": 7}, r"batch must divide train_states \(256\), got 7"),
        ({"accumulate": 9}, r"accumulate must be at most batch \(8\), got 9"),
        ({"seed": -1}, "seed must be an integer at least 0, got -1"),
        ({"rate": 0.0}, "rate must be a number above 0, got 0.0"),
        ({"rate": float("nan")}, "rate must be a number above 0, got nan"),
        ({"betas": (0.9, 1.0)}, "betas must be a number at least 0 and below 1, got 1.0"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"clip": "both"}, "clip must be one of none, value, norm, got 'both'"),
        ({"clip_at": -1.0}, "clip_at must be a number above 0, got -1.0"),
        ({"when": "never"}, "when must be one of final, every, got 'never'"),
        ({"precision": "float16"}, "precision must be one of float32, float64, got 'float16'"),
        ({"hidden": (0,)}, "hidden must be widths from 1 to 65536"),
        ({"activation": "cosine"}, "activation must be one of"),
        ({"flow": "X"}, "flow"),
        ({"system": "teapot"}, "system must be one of .*cartpole.*, got 'teapot'"),
        ({"parameters": {"wheels": 4}}, "cartpole has no parameter 'wheels'; its parameters are poles"),
        ({"parameters": {"poles": 0}}, "poles"),
        ({"inputs": ("clock", "clock")}, "inputs must name each once, of clock, noise, sine, steps, got 'clock'"),
        ({"inputs": ("wind",)}, "inputs must name each once, of clock, noise, sine, steps, got 'wind'"),
        ({"inputs": "clock"}, "inputs must be a sequence of names, such as .*, got 'clock'"),
        ({"inputs": ("sine", "steps"), "track": "position"}, "inputs may have one reference, got sine and steps"),
        ({"inputs": ("sine",)}, "track must name the component .* that shall follow the reference sine"),
        ({"track": "position"}, "track needs a reference among inputs, sine or steps, got track 'position'"),
        ({"inputs": ("sine",), "track": "place"}, "track must be .* of position, velocity, angle 1, .*, got 'place'"),
        ({"inputs": ("sine",), "track": 1}, "track must be text"),
        ({"tracking_cost": -1.0}, "tracking_cost must be a number at least 0, got -1.0"),
        ({"amplitude": 0.0}, "amplitude must be a number above 0, got 0.0"),
        ({"period": 0}, "period must be an integer at least 1, got 0"),
        ({"memory": -1}, "memory must be an integer at least 0 and below 65537, got -1"),
        ({"memory": 8, "network": "dense"}, "a network dense remembers nothing, got memory 8"),
        ({"network": "gru"}, "network gru needs memory, its units, got memory 0"),
        ({"system": "quantum", "inputs": ("clock",)}, "inputs are not for a network grid-cnn"),
        ({"device": "abacus"}, "device must be"),
        ({"device": "cuda:99"}, "device must be one that is present"),
    ],
)
def test_errors_name_the_setting(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Training(**arguments)


def test_settings_are_equal_however_they_are_written():
    assert Training(flow="C", hidden=[3, 4], parameters={}) == Training(
        flow="combined", hidden=(3, 4), parameters={"poles": CartPole().poles}
    )


def test_near_seeds_share_nothing():
    drawn = [number for seed in range(100) for number in derive_seeds(seed)]
    assert len(set(drawn)) == 500


def test_command_line_without_flags_gives_the_defaults():
    assert parse([]).settings == Training()


def test_command_line_has_a_flag_for_every_setting():
    given = {
        "steps": 7,
        "when": "every",
        "control_cost": 0.5,
        "flow": "modified",
        "network": "gru",
        "memory": 6,
        "inputs": ("clock", "sine"),
        "track": "angle 2",
        "tracking_cost": 0.25,
        "amplitude": 0.75,
        "period": 20,
        "hidden": (5, 6, 7),
        "activation": "relu",
        "init": "zero-last",
        "precision": "float64",
        "epochs": 9,
        "batch": 4,
        "accumulate": 2,
        "train_states": 12,
        "test_states": 3,
        "shuffle": True,
        "rate": 0.01,
        "schedule": "cosine",
        "betas": (0.8, 0.99),
        "epsilon": 1e-8,
        "clip": "norm",
        "clip_at": 2.0,
        "seed": 3,
        "device": "cpu",
        "threads": 2,
        "out": "elsewhere",
        "checkpoint_every": 5,
    }
    assert {*given, "system", "parameters"} == {entry.name for entry in fields(Training)}
    line = ["--system", "cartpole", "--poles", "3", "--dt", "0.02", "--gravity", "1.6"]
    for name, value in given.items():
        values = value if isinstance(value, tuple) else () if value is True else (value,)
        line += ["--" + name.replace("_", "-"), *map(str, values)]
    expected = Training(system="cartpole", parameters={"poles": 3, "dt": 0.02, "gravity": 1.6}, **given)
    assert parse(line).settings == expected
    assert parse([*line, "--no-shuffle"]).settings.shuffle is False
    assert parse(["--hidden"]).settings.hidden == ()


def test_help_tells_every_docstring(capsys):
    with pytest.raises(SystemExit) as exit_status:
        main(["--help"])
    assert exit_status.value.code == 0
    shown = "".join(capsys.readouterr().out.split())
    for kind in (Training, CartPole):
        texts = field_help(kind)
        for name in {entry.name for entry in fields(kind)} - {"parameters"}:
            assert len(texts[name]) > 10
            assert "".join(texts[name].split()) in shown, name


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--clip", "both"], "clip must be one of none, value, norm, got 'both'"),
        (["--poles", "two"], "argument --poles: invalid int value: 'two'"),
        (["--poles", "0"], "poles"),
        (["--wheels", "4"], "unrecognized arguments: --wheels 4"),
        (["--epoch", "4"], "unrecognized arguments: --epoch 4"),
        (["--flow", "averaged", "--accumulate", "2"], "accumulate must be 1 with flow 'averaged', which has a memory"),
        (["--system", "teapot"], "system must be one of"),
        (["--inputs", "steps"], "track must name the component of the state that shall follow the reference steps"),
        (["--network", "dense", "--memory", "8"], "memory needs network gru or auto"),
        (["--resume", "--overwrite", "--out", "{run}"], "nothing to resume"),
    ],
)
def test_mistakes_in_the_command_line_take_one_line(line, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_status:
        main([word.format(run=tmp_path) for word in line])
    error = capsys.readouterr().err
    assert exit_status.value.code == 2
    assert message in error
    assert error.count("\n") == 1
