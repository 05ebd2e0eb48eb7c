"""Studies: what is run, what is left, what the tables say; and the networks of the study of memory."""

import math

import pytest
import torch

from demos import study as command
from demos.experiments import memory
from demos.experiments.study import Line, Panel, Point, Study, Trial, load, perform, summarise, write_results
from warp_phys import CartPole, Diverged

LOSSES = {("easy", "a"): 0.01, ("easy", "b"): 0.4, ("hard", "a"): 0.3}


def fall(panel, line, epochs, seed):
    """A run whose loss falls to 1, 2, … times a number as the seed is; line b diverges with seed 1."""

    def train(stop, progress):
        for epoch in range(epochs):
            if stop():
                return False
            if line == "b" and seed == 1 and epoch == 3:
                raise Diverged(7, (0,))
            progress(Point(1.0 if epoch < 5 else LOSSES[panel, line] * (seed + 1), 0.5, float(epoch)))
        return True

    return Trial(panel, line, seed, epochs, train)


STUDY = Study(
    title="A study",
    panels={
        "easy": Panel("Easy", ("a", "b"), 30, reached=0.5, failed=0.35),
        "hard": Panel("Hard", ("a",), 20, reached=0.5, failed=0.35),
    },
    lines={"a": Line("A", "#0072B2", "-"), "b": Line("B", "#D55E00", "--")},
    make=fall,
    share="done",
)


def go():
    """Never stop."""
    return False


def test_each_seed_is_done_before_the_next():
    plan = STUDY.plan([0, 1])
    names = ["easy/a/seed-0", "easy/b/seed-0", "hard/a/seed-0", "easy/a/seed-1", "easy/b/seed-1", "hard/a/seed-1"]
    assert [trial.name for trial in plan] == names
    assert [trial.epochs for trial in plan[:3]] == [30, 30, 20]
    assert [trial.name for trial in STUDY.plan([4], ["hard"], 7)] == ["hard/a/seed-4"]
    with pytest.raises(ValueError, match="panel must be one of easy, hard, got 'other'"):
        STUDY.plan([0], ["other"])


def test_tables_say_what_the_runs_did(tmp_path):
    plan = STUDY.plan([0, 1])
    assert all(perform(trial, tmp_path, go) for trial in plan)
    outcomes = [load(trial, tmp_path) for trial in plan]
    text = summarise(STUDY, outcomes)
    # a loss that falls in epoch 6 has been reached when the first window is full
    assert "| A | 0.01 | 0.02 | 0.015 | 0 of 2 | 20 | 50% |" in text
    assert "| B | 0.4 | inf | inf | 2 of 2 | – | 25% |" in text
    assert "| A | 0.3 | 0.6 | 0.45 | 1 of 2 | – | 50% |" in text
    assert outcomes[4].diverged and math.isinf(outcomes[4].final) and len(outcomes[4].points) == 3
    paths = write_results(STUDY, outcomes, tmp_path, "made")
    assert [path.name for path in paths] == ["made-epochs.csv", "made-runs.csv", "made.md", "made.png"]
    assert len(paths[0].read_text().splitlines()) == 1 + 30 + 30 + 20 + 30 + 3 + 20
    assert paths[1].read_text().splitlines()[5] == "easy,b,1,3,1,inf,inf,0,2"
    assert paths[3].read_bytes()[:4] == b"\x89PNG"


def test_a_stopped_run_leaves_nothing(tmp_path):
    trial, calls = fall("easy", "a", 30, 0), []
    assert not perform(trial, tmp_path, lambda: calls.append(0) or len(calls) > 3)
    assert load(trial, tmp_path) is None and not list(tmp_path.rglob("*.csv"))


def test_files_of_other_runs_are_refused(tmp_path):
    perform(fall("easy", "a", 30, 0), tmp_path, go)
    with pytest.raises(ValueError, match="holds 30 epochs, the run shall have 20; choose another out"):
        load(fall("easy", "a", 20, 0), tmp_path)
    (tmp_path / "easy/a/seed-0.csv").write_text("epoch,loss\n1,2\n")
    with pytest.raises(ValueError, match="is not what this program wrote: its columns are not epoch, test_loss"):
        load(fall("easy", "a", 30, 0), tmp_path)


def test_the_command_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "STUDIES", {"made": STUDY})
    arguments = ["made", "--seeds", "1", "--out", str(tmp_path)]
    assert command.main([*arguments, "--panel", "hard"]) == 0
    assert command.main([*arguments, "--list"]) == 0
    states = [line.split()[0] for line in capsys.readouterr().out.splitlines()[-3:]]
    assert states == ["to", "to", "finished"]
    assert command.main(arguments) == 0
    assert "1 of 2: easy/a/seed-0" in capsys.readouterr().err
    assert command.main([*arguments[:2], "2,", *arguments[3:], "--panel", "hard"]) == 0
    assert "| method | 0 | 2 | median |" in (tmp_path / "made.md").read_text()  # runs of all calls
    assert command.main([*arguments, "--epochs", "9"]) == 2
    assert "choose another out" in capsys.readouterr().err


def test_the_table_of_runs_grows_run_by_run(tmp_path, monkeypatch, capsys):
    done = []

    def fails(trial, *rest):
        if len(done) == 2:
            raise OSError("no space left")
        done.append(trial.name)
        return perform(trial, *rest)

    monkeypatch.setattr(command, "STUDIES", {"made": STUDY})
    monkeypatch.setattr(command, "perform", fails)
    assert command.main(["made", "--seeds", "1", "--out", str(tmp_path)]) == 2
    assert len((tmp_path / "made-runs.csv").read_text().splitlines()) == 1 + 2
    assert "no space left" in capsys.readouterr().err


def test_methods_can_be_chosen():
    assert [trial.name for trial in STUDY.plan([0], lines=["b"])] == ["easy/b/seed-0"]
    with pytest.raises(ValueError, match="method must be one of a, b, got 'c'"):
        STUDY.plan([0], lines=["c"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["memory", "--panel", "gru"], "panel must be one of gru-hold, mlp-hold"),
        (["memory", "--seeds", "x"], "seeds must be a count"),
        (["rules", "--epochs", "-1"], "epochs must be an integer at least 0"),
        (["other"], "invalid choice: 'other'"),
    ],
)
def test_mistakes_get_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        command.main(arguments)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_every_study_names_its_lines():
    for study in command.STUDIES.values():
        for trial in study.plan([0]):
            assert trial.line in study.lines and trial.panel in study.panels
            assert trial.epochs == study.panels[trial.panel].epochs


@pytest.mark.parametrize("network", ["gru", "lstm", "mlp"])
@pytest.mark.parametrize("name", list(memory.TASKS))
def test_controllers_see_positions_only(network, name):
    task = memory.TASKS[name]
    controller = memory.NETWORKS[network](task)
    x = torch.as_tensor(task.system.sample(4))
    other = x.clone()
    other[:, 1::2] += 1.0
    given = [torch.randn(4, controller.memory)] if controller.memory else []
    outputs = [controller(rows, *given) for rows in (x, other)]
    for a, b in zip(*(out if given else (out,) for out in outputs), strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=0.0)
    seeing = memory.NETWORKS["velocities"](task)
    assert not torch.equal(seeing(x), seeing(other))


def test_share_counts_who_stays_up():
    states = torch.full((6, 3, 6), math.pi)
    states[3:, :2, 2::2] = 0.1
    states[4, 1, 4] = 0.6  # one pole of the second is out for a moment
    assert memory.share_held(states, 3) == pytest.approx(1 / 3)
    assert memory.share_held(states, 1) == pytest.approx(2 / 3)


def test_memory_is_trained_the_same_way_twice(monkeypatch):
    small = memory.Task("small", CartPole(poles=1, dt=0.05), 6, 2, 10.0, 2, failed=1.0)
    monkeypatch.setattr(memory, "TASKS", {"hold": small})
    runs: list[list[Point]] = []
    for _ in range(2):
        points: list[Point] = []
        assert memory.make_trial("gru-hold", "combined-memory-0", 2, 0).train(go, points.append)
        runs.append(points)
    losses = [[point.test_loss for point in points] for points in runs]
    assert losses[0] == losses[1] and losses[0][1] < losses[0][0]
