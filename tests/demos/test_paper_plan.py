"""The published experiments: which runs there are, with which settings, and which choices make no sense."""

import pytest
from small_runs import SMALL, changed, pretend, small_plan

from controllers.checkpoint import CONFIG
from demos import paper
from demos.__main__ import list_demos
from demos.experiments.plan import (
    BEGUN,
    DIVERGED,
    FAILED,
    FINISHED,
    WAITING,
    Run,
    State,
    check_plan,
    find_runs,
    make_plan,
)
from demos.experiments.pool import locked
from demos.experiments.published import EXPERIMENTS, parse_levels
from warp_phys import CartPole, Quantum, Repulsion


def test_the_whole_plan_is_every_combination_once():
    plan = paper.Paper().plan()
    names = [run.name for run in plan]
    assert len(names) == len(set(names)) == (4 + 4 + 3) * 4 * 3 * 3
    assert "cartpole/poles-4/combined/clip-none/seed-0" in names
    assert "repulsion/cost-0.001/stopped/clip-norm/seed-2" in names
    assert "quantum/target-5/modified/clip-value/seed-1" in names
    assert {run.settings.out for run in plan} == {f"paper/{name}" for name in names}


def test_every_experiment_begins_early_and_seeds_come_one_after_the_other():
    plan = paper.Paper().plan()
    assert [run.experiment for run in plan[:3]] == ["cartpole", "repulsion", "quantum"]
    seeds = [run.settings.seed for run in plan]
    assert seeds == sorted(seeds)


@pytest.mark.parametrize(
    ("name", "level", "system", "expected"),
    [
        ("cartpole", 4, CartPole(poles=4, dt=0.01), {"steps": 100, "when": "final", "control_cost": 0.0}),
        (
            "repulsion",
            0.01,
            Repulsion(drivers=2, evaders=4, dt=4 / 60),
            {"steps": 60, "when": "every", "control_cost": 0.01},
        ),
        (
            "quantum",
            5,
            Quantum(points=32, dt=1 / 16, target=5),
            {"steps": 128, "when": "every", "control_cost": 0.0},
        ),
    ],
)
def test_settings_are_those_published(name, level, system, expected):
    training = EXPERIMENTS[name].training(level)
    assert training.make_system() == system
    optimiser = {"rate": 1e-3, "betas": (0.9, 0.999), "epsilon": 1e-7, "clip": "none", "clip_at": 1.0}
    data = {"batch": 8, "train_states": 256, "test_states": 256, "epochs": 1000, "shuffle": False, "hidden": (100, 100)}
    wanted = expected | optimiser | data
    assert {key: getattr(training, key) for key in wanted} == wanted
    assert EXPERIMENTS[name].level_of(training) == level


def test_levels_get_harder_in_the_published_order():
    assert EXPERIMENTS["cartpole"].levels == (1, 2, 3, 4)
    assert EXPERIMENTS["repulsion"].levels == (1, 0.1, 0.01, 0.001)
    assert EXPERIMENTS["quantum"].levels == (3, 4, 5)


def test_shuffled_runs_stand_beside_the_others():
    (run,) = small_plan("out", "R", shuffle=True)
    assert run.settings.shuffle
    assert run.name == "cartpole/poles-1/regular/clip-none/seed-0-shuffled"


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("--experiment quantum --flow R --clip none --seeds 1", ["target-3", "target-4", "target-5"]),
        ("--level poles-2 --flow R --clip none --seeds 1", ["poles-2"]),
        ("--level poles-2,cost-1 --flow R --clip none --seeds 1", ["poles-2", "cost-1"]),
        ("--experiment cartpole --level 2 --level 4 --flow R --clip none --seeds 1", ["poles-2", "poles-4"]),
        ("--experiment repulsion --level 1e-2 --flow R --clip none --seeds 1", ["cost-0.01"]),
    ],
)
def test_levels_are_chosen_by_name_or_number(line, names, tmp_path):
    settings, _ = paper.parse([*line.split(), "--out", str(tmp_path / "new")])
    assert [run.name.split("/")[1] for run in settings.plan()] == names


def test_flags_may_be_repeated_listed_or_separated_by_commas(tmp_path):
    lines = ("--flow R --flow C", "--flow R C", "--flow R,C", "--flow regular --flow combined,R")
    for line in lines:
        settings, _ = paper.parse([*line.split(), "--level", "poles-1", "--seeds", "4,", "--out", str(tmp_path)])
        assert {run.settings.flow for run in settings.plan()} == {"regular", "combined"}
        assert {run.settings.seed for run in settings.plan()} == {4}
        assert len(settings.plan()) == 2 * 3


def test_the_quick_mode_is_other_defaults_that_flags_still_overrule(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick, _ = paper.parse(["--quick"])
    assert (quick.epochs, quick.train_states, quick.test_states, quick.out) == (100, 64, 64, "paper-quick")
    assert len(quick.plan()) == 11 * 4 * 3
    assert paper.parse(["--quick", "--epochs", "7"])[0].epochs == 7


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--experiment pole", "experiment must be one of cartpole, repulsion, quantum, got 'pole'"),
        ("--level 3", "level must be such as poles-4, cost-0.001, target-5, got '3'"),
        ("--experiment cartpole --level target-3", "level must be such as poles-4, got 'target-3'"),
        ("--level poles-nan", "level must be such as"),
        ("--level poles-1.5", "level must be a published one, poles-1, poles-2, poles-3, poles-4, got 'poles-1.5'"),
        ("--level poles-9", "level must be a published one, poles-1, poles-2, poles-3, poles-4, got 'poles-9'"),
        ("--level cost-0.5", "level must be a published one, cost-1, cost-0.1, cost-0.01, cost-0.001, got"),
        ("--flow Q", "flow 'Q' is unknown"),
        ("--flow", "leaves no run"),
        ("--clip hard", "clip must be one of none, value, norm, got 'hard'"),
        ("--seeds 0", "seeds must be a count of at least 1, got 0"),
        ("--seeds -1", "seeds"),
        ("--seeds 1.5", "seeds must be a count such as 3, or a list"),
        ("--epochs 0", "epochs must be an integer at least 1, got 0"),
        ("--train-states 9", "batch must divide train_states (9), got 8"),
        ("--processes -1", "processes must be an integer at least 0, got -1"),
        ("--device warp", "device must be cpu, cuda or cuda:<number>, got 'warp'"),
        ("--list --tables-only", "not allowed with argument"),
    ],
)
def test_mistakes_take_one_line_and_leave_nothing(line, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_status:
        paper.main(["--out", str(tmp_path / "new"), *line.split()])
    error = capsys.readouterr().err
    assert exit_status.value.code == 2
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_unknown_experiments_are_refused():
    with pytest.raises(ValueError, match="experiment must be one of"):
        parse_levels(["walker"], [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": 0.5}, "rate was 0.5, is 0.001; choose another out, or delete that folder"),
        ({"epochs": 4}, "have epochs 4 (cartpole/poles-1/regular/clip-none/seed-0), these would have 3"),
        ({"test_states": 16}, "test_states was 16, is 8"),
    ],
)
def test_a_folder_of_other_settings_is_refused(changes, message, tmp_path):
    first, second = small_plan(tmp_path)
    pretend(changed(first, **changes), [1.0, 0.9, 0.8])
    before = (first.folder / CONFIG).read_bytes()
    with pytest.raises(ValueError) as error:
        check_plan(tmp_path, [first, second])
    assert message in str(error.value)
    assert (first.folder / CONFIG).read_bytes() == before


def test_runs_of_other_sizes_do_not_share_a_folder(tmp_path):
    first, second = small_plan(tmp_path)
    pretend(changed(first, train_states=16), [1.0, 0.9, 0.8])
    with pytest.raises(ValueError, match="have train_states 16 .* these would have 8"):
        check_plan(tmp_path, [second])


def test_runs_are_found_again_in_the_order_of_the_publication(tmp_path):
    plan = small_plan(tmp_path, "CR", levels={"quantum": [4], "repulsion": [0.1, 1.0], "cartpole": [2]})
    for run in plan:
        pretend(run, [1.0] * 3)
    found = find_runs(tmp_path)
    assert [run.name.rsplit("/clip", 1)[0] for run in found] == [
        "cartpole/poles-2/regular",
        "cartpole/poles-2/combined",
        "repulsion/cost-1/regular",
        "repulsion/cost-1/combined",
        "repulsion/cost-0.1/regular",
        "repulsion/cost-0.1/combined",
        "quantum/target-4/regular",
        "quantum/target-4/combined",
    ]
    assert {run.name: run for run in found} == {run.name: run for run in plan}


def test_a_run_in_a_folder_of_another_name_is_told(tmp_path):
    (run,) = small_plan(tmp_path, "R")
    pretend(run, [1.0] * 3)
    run.folder.rename(run.folder.with_name("seed-1"))
    with pytest.raises(ValueError, match="seed-1 holds the run cartpole/poles-1/regular/clip-none/seed-0"):
        find_runs(tmp_path)


def test_files_that_are_not_ours_are_told(tmp_path):
    (run,) = small_plan(tmp_path, "R")
    pretend(run, [1.0] * 3)
    (run.folder / "outcome.json").write_text("{")
    with pytest.raises(ValueError, match=r"outcome\.json is not an outcome"):
        run.state()
    (run.folder / CONFIG).write_text("colour = 1\n")
    with pytest.raises(ValueError, match=r"run\.toml does not hold the settings of a run"):
        run.check()
    (run.folder / CONFIG).unlink()
    with pytest.raises(ValueError, match=r"seed-0 has record\.csv and no run\.toml"):
        run.check()
    (run.folder / "record.csv").unlink()
    run.conclude(State(FAILED, 0, "OSError: disk full"))
    run.check()  # it failed before it began, and is tried again


def test_levels_that_are_nearly_the_same_are_two_runs(tmp_path):
    runs = make_plan(tmp_path, {"repulsion": [0.1234567, 0.1234568]}, "R", ["none"], [0])
    assert [run.name.split("/")[1] for run in runs] == ["cost-0.1234567", "cost-0.1234568"]


def test_a_state_is_read_from_the_files(tmp_path):
    runs = small_plan(tmp_path, "RMSC")
    assert [run.state() for run in runs] == [State(WAITING)] * 4
    pretend(runs[0], [1.0] * 3)
    pretend(runs[1], [1.0] * 2, DIVERGED, "at step 3")
    pretend(runs[2], [1.0], "")
    (runs[2].folder / "checkpoint.pt").write_bytes(b"")
    pretend(runs[3], [1.0], FAILED, "OSError: disk full")
    states = [run.state() for run in runs]
    assert states == [
        State(FINISHED, 3),
        State(DIVERGED, 2, "at step 3"),
        State(BEGUN, 1),
        State(FAILED, 1, "OSError: disk full"),
    ]
    assert [state.counts for state in states] == [True, True, False, False]
    # A run that lost its record is not done.
    (runs[0].folder / "record.csv").unlink()
    assert runs[0].state() == State(WAITING)


def test_the_plan_is_listed_with_states(tmp_path, capsys):
    first, second = small_plan(tmp_path)
    pretend(first, [1.0] * 3)
    line = "--experiment cartpole --level 1 --flow R C --clip none --seeds 1 --epochs 3 --list".split()
    assert paper.main([*line, *SMALL, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].split() == ["finished", "3/3", first.name]
    assert said[1].split() == ["to", "do", "0/3", second.name]
    assert said[2] == "2 runs: 1 finished, 1 to do"
    assert not second.folder.exists()


def test_two_calls_do_not_work_in_one_folder(tmp_path, capsys):
    line = "--experiment cartpole --level 1 --flow R --clip none --seeds 1 --epochs 3".split()
    with locked(tmp_path / ".command"):
        assert paper.main([*line, *SMALL, "--out", str(tmp_path)]) == 2
    assert f"another call is at work in {tmp_path}" in capsys.readouterr().err
    assert not (tmp_path / "cartpole").exists()


def test_results_of_nothing_are_refused(tmp_path, capsys):
    assert paper.main(["--tables-only", "--out", str(tmp_path / "nowhere")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_runs_share_kernels_where_only_numbers_differ():
    def kernels(name, level, **changes):
        return Run(name, level, EXPERIMENTS[name].training(level, **changes)).kernels

    assert kernels("repulsion", 1.0, flow="R") == kernels("repulsion", 0.1, flow="C", seed=3)
    assert kernels("cartpole", 1) != kernels("cartpole", 2)
    assert kernels("quantum", 3) != kernels("quantum", 4)


def test_the_program_is_listed():
    assert list_demos()["paper"].startswith("The published experiments")
