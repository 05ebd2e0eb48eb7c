"""Long runs: `python -m tests.growth --count 10000 --case update systems`."""

import argparse
import importlib.util
import sys

import warp as wp

from tests.growth.cases import CASES, measure

BLOCKS, RESIDENT = 0.1, 100.0
"""Blocks and bytes for each time that count as growth: 1,000 and a megabyte in 10,000."""


def main() -> int:
    """Measure, print a table; returns 1 where something grows."""
    parser = argparse.ArgumentParser(description="Memory over many updates.")
    parser.add_argument("--count", type=int, default=10_000, help="How often in each window, after a warm-up.")
    parser.add_argument("--windows", type=int, default=1, help="The best one counts.")
    parser.add_argument("--case", nargs="*", choices=list(CASES), default=list(CASES))
    given = parser.parse_args()
    wp.config.log_level = wp.LOG_WARNING
    grows = False
    print("| what | blocks of Python, each | bytes of the process, each |\n| --- | ---: | ---: |")
    for name in given.case:
        if name in ("jax", "newton") and importlib.util.find_spec(name) is None:
            print(f"| {name} | not installed | |")
            continue
        growth = measure(CASES[name](), given.count, given.windows)
        grows |= growth.blocks > BLOCKS or growth.resident > RESIDENT
        print(f"| {name} | {growth.blocks:.4f} | {growth.resident:.1f} |", flush=True)
    return int(grows)


if __name__ == "__main__":
    sys.exit(main())
