"""Files of a run outlive full disks, kills at any moment and read-only folders; damage is named, old versions load."""

import contextlib
import os
import pickle
import resource
import signal
import stat
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from small_training import small

from controllers import MLP, Linear, Training, exporting, train
from controllers.checkpoint import (
    CHECKPOINT,
    CONTROLLER,
    VERSION,
    Damaged,
    atomic_write,
    load_checkpoint,
    load_tensors,
    save_checkpoint,
    save_tensors,
)
from controllers.config import write_config
from demos.weights import load_arrays, load_weights, save_weights
from warp_phys import CartPole

VERSIONS = Path(__file__).parent / "checkpoints"


def content_of(number: int) -> dict:
    """A checkpoint's content that says in every part which one it is; 200 kB."""
    return {
        "settings": {"seed": number},
        "weights": {"w": torch.full((25_000,), float(number))},
        "optimiser": {"step": number},
        "update": {},
        "records": [(number,)],
        "minibatch": number,
        "losses": torch.full((25_000,), float(number)),
        "seconds": float(number),
    }


def number_in(folder: Path) -> int:
    """Which content a checkpoint holds; fails where it is a mixture."""
    content = load_checkpoint(folder)
    number = content["minibatch"]
    assert content["settings"] == {"seed": number} and content["seconds"] == number
    assert (content["weights"]["w"] == number).all() and (content["losses"] == number).all()
    return number


@contextlib.contextmanager
def disk_of(size: int):
    """No file may become larger: to a program it looks as a full disk does, but for the number of the error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 1, 4096, 150_000])
def test_a_disk_that_fills_leaves_the_old_checkpoint_and_one_sentence(size, tmp_path):
    save_checkpoint(tmp_path, content_of(1))
    with disk_of(size), pytest.raises(OSError) as error:
        save_checkpoint(tmp_path, content_of(2))
    message = str(error.value)
    assert message.startswith(f"{tmp_path / CHECKPOINT} cannot be written: File too large; the file that was there")
    assert error.value.__cause__ is None and error.value.__suppress_context__
    assert number_in(tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]


def test_a_training_on_a_full_disk_ends_with_that_sentence(tmp_path):
    settings = small(out=str(tmp_path / "run"), epochs=1)
    train(small(epochs=1))  # compiles
    with disk_of(6000), pytest.raises(OSError, match=r"run/checkpoint\.pt cannot be written: File too large$"):
        train(settings)
    assert (tmp_path / "run" / "run.toml").exists()


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file/a cannot be written: (Not a directory|File exists)"):
        save_tensors(tmp_path / "file" / "a", {})
    with pytest.raises(OSError, match="cannot be written: Is a directory"):
        save_tensors(tmp_path, {})
    if os.geteuid() != 0:  # who may do anything is stopped by no permission
        closed = tmp_path / "closed"
        closed.mkdir()
        closed.chmod(stat.S_IRUSR | stat.S_IXUSR)
        with pytest.raises(PermissionError, match="closed/a cannot be written: Permission denied"):
            save_tensors(closed / "a", {})


def in_child(act) -> int:
    """Run a function in a fork; return its process."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a fork of many threads may wait for ever
        try:
            act()
        finally:
            os._exit(0)
    return child


@pytest.mark.parametrize("name", ["fsync", "replace", "open"])
def test_a_kill_at_each_step_of_writing(name, tmp_path, monkeypatch):
    save_checkpoint(tmp_path, content_of(1))

    def killed(*_arguments, **_options):
        os.kill(os.getpid(), signal.SIGKILL)

    def act():
        monkeypatch.setattr("builtins.open" if name == "open" else f"os.{name}", killed)
        save_checkpoint(tmp_path, content_of(2))

    _, status = os.waitpid(in_child(act), 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert number_in(tmp_path) == 1
    save_checkpoint(tmp_path, content_of(3))
    assert number_in(tmp_path) == 3 and len(list(tmp_path.iterdir())) == 1


def test_kills_at_any_moment(tmp_path):
    generator, last = np.random.default_rng(0), 0
    save_checkpoint(tmp_path, content_of(0))
    for _ in range(8):

        def act(begin=last + 1):
            for number in range(begin, begin + 10_000):
                save_checkpoint(tmp_path, content_of(number))

        child = in_child(act)
        time.sleep(generator.uniform(0.02, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        number = number_in(tmp_path)
        assert number >= last
        last = number
    assert last > 0


@pytest.fixture
def archive(tmp_path) -> bytes:
    """A checkpoint as bytes."""
    save_checkpoint(tmp_path, content_of(1))
    return (tmp_path / CHECKPOINT).read_bytes()


def refused(folder: Path, data: bytes) -> str:
    """Return how a checkpoint of these bytes is refused."""
    (folder / CHECKPOINT).write_bytes(data)
    with pytest.raises(ValueError, match=f"^out: {folder / CHECKPOINT} is ") as error:
        load_checkpoint(folder)
    assert error.value.__suppress_context__ or error.value.__context__ is None
    return str(error.value)


def test_every_flipped_byte_is_noticed(archive, tmp_path):
    generator = np.random.default_rng(0)
    places = {
        *range(0, 64),
        *range(len(archive) - 128, len(archive)),
        *generator.integers(len(archive), size=64).tolist(),
    }
    for place in sorted(places):
        data = bytearray(archive)
        data[place] ^= 1 << int(generator.integers(8))
        message = refused(tmp_path, bytes(data))
        assert "is damaged: " in message or place < 2, (place, message)


def test_sixty_four_flipped_bytes(archive, tmp_path):
    data = np.frombuffer(archive, np.uint8).copy()
    data[np.random.default_rng(1).integers(len(data), size=64)] ^= 255
    assert "is damaged: its checksum is not that of its content" in refused(tmp_path, data.tobytes())


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_what_is_cut_short(share, archive, tmp_path):
    message = refused(tmp_path, archive[: int(share * len(archive))])
    assert "is damaged: " in message and f"{int(share * len(archive))} bytes" in message
    assert "is damaged: its 4096 bytes hold nothing" in refused(tmp_path, bytes(4096))  # as after a crash of the system


def test_damage_of_a_file_without_a_checksum(tmp_path):
    archive = (VERSIONS / "version_2.pt").read_bytes()
    weights = torch.load(VERSIONS / "version_2.pt", weights_only=True)["weights"]
    place = archive.index(weights["0.weight"].numpy().tobytes())
    for shift in (0, 5):
        data = bytearray(archive)
        data[place + shift] ^= 4
        assert "is damaged: the checksum of its part version_2/data/" in refused(tmp_path, bytes(data))
    assert "is damaged: it ends too early" in refused(tmp_path, archive[:-100])


class Malicious:
    """Code that a pickle would run: it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "made",
    [
        lambda code: [1, 2],
        lambda code: {"weights": 1},
        lambda code: {**content_of(1), "settings": 3},
        lambda code: {**content_of(1), "losses": [1.0]},
        lambda code: {**content_of(1), "more": 1},
        lambda code: {**content_of(1), "update": code},
    ],
    ids=["list", "part", "settings", "losses", "more", "code"],
)
def test_foreign_files(made, tmp_path):
    never = tmp_path / "never"
    content = made(Malicious(never))
    torch.save(content, tmp_path / CHECKPOINT, pickle_protocol=2)
    assert "is not a checkpoint of this program" in refused(tmp_path, (tmp_path / CHECKPOINT).read_bytes())
    assert "is not a checkpoint of this program" in refused(tmp_path, pickle.dumps(content, 2))
    assert not never.exists()


def test_a_checkpoint_that_does_not_fit_its_settings(tmp_path):
    settings = small(out=str(tmp_path), epochs=1)
    train(settings)
    content = load_checkpoint(tmp_path)
    save_checkpoint(tmp_path, {**content, "weights": {"w": torch.ones(3)}})
    with pytest.raises(
        ValueError, match="out: the checkpoint does not fit its own settings: Error.* for MLP: Missing key"
    ):
        train(settings, resume=True)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_checkpoints_of_earlier_versions_go_on(version, tmp_path):
    (tmp_path / CHECKPOINT).write_bytes((VERSIONS / f"version_{version}.pt").read_bytes())
    content = load_checkpoint(tmp_path)
    assert ("version" in content, "update" in content) == (version >= 3, version >= 2)
    settings = Training(**{**content["settings"], "out": str(tmp_path), "epochs": 3})
    trained = train(settings, resume=True)
    assert [record.epoch for record in trained.records] == [1, 2, 3]
    assert [tuple(record) for record in trained.records[:2]] == content["records"]
    assert load_checkpoint(tmp_path)["version"] == VERSION


def test_a_checkpoint_of_a_later_version(tmp_path):
    torch.save({"version": VERSION + 1, "something": "else"}, tmp_path / CHECKPOINT)
    message = refused(tmp_path, (tmp_path / CHECKPOINT).read_bytes())
    assert f"of version {VERSION + 1}, this program reads those up to {VERSION}" in message


def test_exports_have_a_checksum_and_remain_what_others_read(tmp_path):
    settings = small(out=str(tmp_path), epochs=1)
    trained = train(settings)
    path = tmp_path / CONTROLLER
    for weights in (torch.load(path, weights_only=True), load_tensors(path)):
        assert torch.equal(weights["0.weight"], trained.controller.state_dict()["0.weight"])
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(Damaged, match=r"controller\.pt is damaged: its checksum is not that of its content"):
        load_tensors(path)


@pytest.fixture
def quick_export(monkeypatch):
    """Exports whose content is made at once: what is tried is how it is written."""
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: None)
    monkeypatch.setattr(torch.export, "save", lambda _, buffer, **__: buffer.write(b"new" * 10_000))
    monkeypatch.setattr(exporting, "_compare", lambda *_: None)
    return lambda path: exporting.export(Linear(CartPole()), path, CartPole())


def test_exports_outlive_full_disks_and_closed_folders(quick_export, tmp_path):
    path = tmp_path / "controller.pt2"
    path.write_bytes(b"old")
    with disk_of(4096), pytest.raises(OSError, match=r"pt2 cannot be written: File too large; the file that was there"):
        quick_export(path)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(OSError, match="pt2 cannot be written: (Not a directory|File exists)"):
        quick_export(path / "controller.pt2")
    quick_export(path)
    assert path.read_bytes() == b"new" * 10_000


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_exports_outlive_a_kill(name, quick_export, tmp_path, monkeypatch):
    path = tmp_path / "controller.pt2"
    path.write_bytes(b"old")
    monkeypatch.setattr(f"os.{name}", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    _, status = os.waitpid(in_child(lambda: quick_export(path)), 0)
    assert os.WTERMSIG(status) == signal.SIGKILL and path.read_bytes() == b"old"


def test_what_load_controller_finds_damaged(tmp_path):
    path = tmp_path / CONTROLLER
    with pytest.raises(FileNotFoundError):
        exporting.load_controller(tmp_path)
    write_config(tmp_path / "run.toml", small())
    save_tensors(path, [torch.ones(3)])
    with pytest.raises(ValueError, match=r"controller\.pt is not of the network that run\.toml describes"):
        exporting.load_controller(tmp_path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(Damaged, match=r"controller\.pt is damaged: it ends too early"):
        exporting.load_controller(tmp_path)
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"controller\.pt is no file of tensors"):
        exporting.load_controller(tmp_path)
    (tmp_path / "run.toml").write_text("steps = [")
    with pytest.raises(ValueError, match=r"run\.toml is not a file of settings"):
        exporting.load_controller(tmp_path)


def test_weights_of_demos(tmp_path):
    system = CartPole()
    path = save_weights("cart", {"own": MLP(system, (3,), seed=0)}, tmp_path)
    with np.load(path) as file:
        assert len(file.files) == 4
    load_weights("cart", "own", MLP(system, (3,)), tmp_path)
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"cart\.npz is damaged: its checksum"):
        load_weights("cart", "own", MLP(system, (3,)), tmp_path)
    with pytest.raises(ValueError, match=r"cart\.npz is damaged: its checksum"):
        load_arrays("cart", tmp_path)


def test_what_fails_inside_is_not_called_a_full_disk(tmp_path):
    with pytest.raises(FileNotFoundError, match="elsewhere"), atomic_write(tmp_path / "a") as file:
        file.write(b"half")
        Path("elsewhere").read_bytes()
    assert not list(tmp_path.iterdir())
