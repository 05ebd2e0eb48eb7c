"""Files and command lines that hold anything at all: they are read, or refused in one line; no code in them runs.

800 examples, the same ones each time; WARP_PHYS_EXAMPLES=200000 is the long mode, see test_public_arguments.py.
"""

import contextlib
import io
import string
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import given

from controllers import MLP, actor_critic, commandline
from controllers.checkpoint import load_checkpoint, save_tensors
from controllers.config import read_config, write_config
from controllers.settings import Training
from demos import landscape, paper, study
from demos.weights import load_arrays, save_weights
from tests.contract.arguments import check_message
from tests.contract.entries import examples
from warp_phys import CartPole

VERSIONS = Path(__file__).parents[1] / "controllers" / "checkpoints"


@st.composite
def damaged(draw: Any, whole: bytes) -> bytes:
    """Bytes that are nearly those of a file, or have nothing to do with it."""
    data = bytearray(whole)
    match draw(st.sampled_from(["flips", "cut", "insert", "swap", "other", "append"])):
        case "flips":
            for place, bit in draw(st.lists(st.tuples(st.integers(0, len(data) - 1), st.integers(0, 7)), max_size=8)):
                data[place] ^= 1 << bit
        case "cut":
            data = data[: draw(st.integers(0, len(data)))]
        case "insert":
            place = draw(st.integers(0, len(data)))
            data[place:place] = draw(st.binary(max_size=16))
        case "swap":
            start, length = draw(st.integers(0, len(data))), draw(st.integers(0, 64))
            data[start : start + length] = bytes(length)
        case "other":
            data = bytearray(draw(st.binary(max_size=64)))
        case "append":
            data += draw(st.binary(max_size=16))
    return bytes(data)


@examples(200)
@given(st.data())
def test_checkpoints(tmp_path_factory, data):
    folder = FOLDER.get("checkpoints") or FOLDER.setdefault("checkpoints", tmp_path_factory.mktemp("checkpoints"))
    path = folder / "checkpoint.pt"
    old = data.draw(st.booleans())
    if "sealed" not in FOLDER:
        save_tensors(path, torch.load(VERSIONS / "version_2.pt", weights_only=True))
        FOLDER["sealed"] = path.read_bytes()
    whole = (VERSIONS / "version_2.pt").read_bytes() if old else FOLDER["sealed"]
    changed = data.draw(damaged(whole))
    path.write_bytes(changed)
    try:
        content = load_checkpoint(folder)
    except ValueError as error:
        check_message(error, str(path))
        assert changed != whole
        return
    assert changed == whole or old  # what a file without a checksum of the whole may still hold, it holds unchanged
    expected = torch.load(io.BytesIO(whole), weights_only=True)
    assert content["settings"] == expected["settings"] and content["records"] == expected["records"]
    for name, tensor in expected["weights"].items():
        assert torch.equal(content["weights"][name], tensor)


FOLDER: dict[str, Any] = {}
"""What is made once."""


@examples(200)
@given(st.data())
def test_weights(tmp_path_factory, data):
    folder = FOLDER.get("weights") or FOLDER.setdefault("weights", tmp_path_factory.mktemp("weights"))
    if "arrays" not in FOLDER:
        path = save_weights("cart", {"own": MLP(CartPole(), (3,), seed=0)}, folder)
        FOLDER["arrays"] = path.read_bytes()
    path, whole = folder / "cart.npz", FOLDER["arrays"]
    path.write_bytes(whole)
    expected = load_arrays("cart", folder)
    changed = data.draw(damaged(whole))
    path.write_bytes(changed)
    try:
        found = load_arrays("cart", folder)
    except ValueError as error:
        check_message(error, str(path))
        return
    assert changed == whole or found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name])


WORDS = st.sampled_from(
    ["system", "parameters", "steps", "inputs", "track", "memory",
     '"sine"', '["clock"]', '"position"',
     "flow", "hidden", "rate", "betas", "seed", "out", "poles", "dt", "=", "[", "]",
     "\n",     '"', "'",
     "1", "-1", "0.5", "nan", "inf", "true", '"cartpole"', '"R"', "[8, 8]", "{", "}", ",", "#", " ", "1e400", "é"]
)  # fmt: skip


@examples(220)
@given(st.one_of(st.lists(WORDS, max_size=12).map("".join), st.binary(max_size=40), st.text(max_size=40)))
def test_files_of_settings(tmp_path_factory, content):
    folder = FOLDER.get("settings") or FOLDER.setdefault("settings", tmp_path_factory.mktemp("settings"))
    path = folder / "run.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    try:
        given_settings = Training(**read_config(path))
    except (TypeError, ValueError) as error:
        check_message(error, "")
        return
    write_config(path, given_settings)
    assert Training(**read_config(path)) == given_settings


FLAGS = st.sampled_from(
    ["--system", "--poles", "--steps", "--flow", "--hidden", "--rate", "--betas", "--seed", "--out", "--resume",
     "--level", "--overwrite",
     "--config", "--clip", "--epochs", "--device", "--experiment", "--seeds", "--processes", "--list",
     "--start", "--bounds", "--cells", "--dt", "--shuffle", "--no-shuffle", "--inputs", "--track",
     "--memory", "--network", "--panel", "--actor", "--randomise", "--observe", "--limits", "--horizon", "--cluster",
     "-h", "--", "-1", "--quick", "--width"]
)  # fmt: skip
VALUES = st.sampled_from(
    ["cartpole", "quantum", "pole", "4", "0", "-1", "1.5", "nan", "inf", "1e400", "R", "C", "X", "", " ", "poles-4",
     "poles-9",     "cost-1", "target-3",
     "memory", "rules", "clock", "sine", "position", "stochastic", "gravity:9:10", "slurm",
     "none", "cuda:7", "gpu", "99999999999999999999", "8,8", "0.9", "/dev/null/x", "é", "\x00", "%s"]
)  # fmt: skip
PARSERS = {
    "controllers": commandline.parse,
    "actor-critic": actor_critic.parse,
    "paper": paper.parse,
    "study": study.parse,
    "landscape": landscape.parse,
}


@examples(180)
@given(
    st.sampled_from(sorted(PARSERS)),
    st.lists(st.one_of(FLAGS, VALUES, st.text(string.printable, max_size=6)), max_size=6),
)
def test_command_lines(tmp_path_factory, name, line):
    folder = FOLDER.get("lines") or FOLDER.setdefault("lines", tmp_path_factory.mktemp("lines"))
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            PARSERS[name](line)
        except SystemExit as end:
            assert end.code in (0, 2), (line, end.code)
            if end.code == 2:
                text = err.getvalue()
                assert text.startswith("python -m ") and ": error: " in text, (line, text)
                assert len(text) < 3000 and "Traceback" not in text
        else:
            assert not err.getvalue()
    assert not list(folder.iterdir()), (line, "a command line is read before anything is written")
