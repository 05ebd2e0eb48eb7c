"""Files of a run: nothing is lost, nothing is half written, other programs read them."""

import csv

import numpy as np
import pytest
import torch
from small_training import same_bits, small, without_seconds

from controllers import MLP, Training, train
from controllers.checkpoint import atomic_write, load_checkpoint
from controllers.config import read_config
from controllers.record import Record, read_record, write_record


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run: its folder, its settings, what it returned."""
    folder = tmp_path_factory.mktemp("run")
    settings = small(out=str(folder), flow="M")
    return folder, settings, train(settings)


def test_a_run_leaves_its_files_and_nothing_else(run):
    folder, settings, trained = run
    assert {path.name for path in folder.iterdir()} == {
        "checkpoint.pt",
        "controller.pt",
        "curves.png",
        "record.csv",
        "run.toml",
    }
    content = read_config(folder / "run.toml")
    assert Training(**content) == settings
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_controller_can_be_loaded(run):
    folder, settings, trained = run
    controller = MLP(settings.make_system(), settings.hidden)
    controller.load_state_dict(torch.load(folder / "controller.pt", weights_only=True))
    assert same_bits(controller, trained.controller)


def test_numpy_and_csv_read_the_record_to_the_last_digit(run):
    folder, _, trained = run
    table = np.genfromtxt(folder / "record.csv", delimiter=",", names=True)
    assert table.dtype.names == Record._fields
    with open(folder / "record.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(table) == 4
    for row, entry, record in zip(rows, table, trained.records, strict=True):
        assert tuple(float(row[name]) for name in Record._fields) == tuple(record)
        assert tuple(entry) == tuple(record)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_read_record_gives_one_entry_per_epoch(count, tmp_path):
    records = [Record(epoch, 0.1 + epoch, 1 / 3, 1e-30, 2.0, float("nan"), 0.5, 1e-3, 7.0) for epoch in range(count)]
    write_record(tmp_path / "record.csv", records)
    table = read_record(tmp_path / "record.csv")
    assert table.shape == (count,)
    assert table["train_loss"].tolist() == [1 / 3] * count
    assert np.isnan(table["cosine"]).all()


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "numbers"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="in the middle"), atomic_write(path) as file:
        file.write(b"half of the new")
        raise RuntimeError("in the middle")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["numbers"]


def test_a_run_is_not_overwritten_by_accident(tmp_path):
    settings = small(out=str(tmp_path), epochs=1)
    first = train(settings)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match="already holds a run .*record.csv.*resume.*overwrite"):
        train(small(out=str(tmp_path), epochs=1, seed=1))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    second = train(small(out=str(tmp_path), epochs=1, seed=1), overwrite=True)
    assert not same_bits(first.controller, second.controller)
    assert load_checkpoint(tmp_path)["settings"]["seed"] == 1


def test_overwriting_spares_the_users_own_files(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    train(small(out=str(tmp_path), epochs=1))
    train(small(out=str(tmp_path), epochs=1), overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_resuming_needs_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint.pt"):
        train(small(out=str(tmp_path)), resume=True)
    with pytest.raises(ValueError, match="out"):
        train(small(out=""), resume=True)


@pytest.mark.parametrize("content", [b"not a checkpoint", b"something else"])
def test_resuming_needs_a_checkpoint_of_ours(content, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(ValueError, match="is not a checkpoint of this program"):
        train(small(out=str(tmp_path)), resume=True)
    torch.save({"weights": 1}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="is not a checkpoint of this program"):
        train(small(out=str(tmp_path)), resume=True)


def test_resuming_lists_the_settings_that_differ(run):
    folder, settings, _ = run
    changed = small(out=str(folder), flow="M", rate=0.5, batch=16, threads=2, epochs=9)
    with pytest.raises(ValueError, match="batch was 8, is 16; rate was 0.001, is 0.5") as error:
        train(changed, resume=True)
    assert "threads was" not in str(error.value)


def test_resuming_cannot_unlearn(run):
    folder, *_ = run
    with pytest.raises(ValueError, match="epochs must be at least 4"):
        train(small(out=str(folder), flow="M", epochs=3), resume=True)


def test_resuming_a_finished_run_changes_nothing(run):
    folder, settings, trained = run
    again = train(settings, resume=True)
    assert again.finished
    assert same_bits(again.controller, trained.controller)
    assert without_seconds(again.records) == without_seconds(trained.records)
