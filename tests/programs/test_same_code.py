"""The code of a program is the same in every process: what was compiled once is found again in the cache."""

import hashlib
import os
import subprocess
import sys

import numpy as np

from warp_phys.programs import block_code, native_code
from warp_phys.programs.operations import OPERATIONS
from warp_phys.programs.reading import Reading


def texts():
    """Return all code of a program that has every operation there is, between two layers."""
    reading = Reading(4, 3)
    v = reading.dense(reading.states(), reading.tensor(np.ones((8, 4)), (8, 4)), reading.tensor(np.ones(8), (8,)))
    total = v
    for name, operation in OPERATIONS.items():
        numbers = 1 + max((i for i in range(4) if f"{{{i}}}" in str(operation)), default=-1)
        made = reading.elementwise(
            name, [total if k == 0 else v for k in range(len(operation.adjoints))], *[0.5] * numbers
        )
        total = reading.elementwise("add", [total, made])
    program, _ = reading.finish(reading.dense(total, reading.tensor(np.ones((2, 8)), (2, 8))))
    found = block_code.evaluate_lines(program, "float", 4, "m") + block_code.pull_lines(program, "float", 4)
    found += block_code.contract_lines(program, "float", 4, "m") + block_code.pack_lines(program, "float")
    for make in ("evaluate_lines", "pull_lines", "contract_lines", "pack_lines"):
        found += getattr(native_code, make)(program, "float")
    return found


def test_the_code_does_not_depend_on_the_seed_of_hashes():
    """Sets of strings are gone through in another order in each process."""
    command = [sys.executable, "-m", "tests.programs.test_same_code"]
    runs = [
        subprocess.run(
            command, env={**os.environ, "PYTHONHASHSEED": str(seed)}, capture_output=True, text=True, check=True
        )
        for seed in (1, 2, 3)
    ]
    lines = {run.stdout.splitlines()[-1] for run in runs}
    assert len(lines) == 1, lines
    assert int(lines.pop().split()[1]) > 500


if __name__ == "__main__":
    LINES = texts()
    print(hashlib.sha256("\n".join(LINES).encode()).hexdigest(), len(LINES))
