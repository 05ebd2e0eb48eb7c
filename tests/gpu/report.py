"""What tests/gpu/run.sh prints: the device, and one table of what its steps have left; the table needs no package."""

import csv
import os
import re
import sys
from pathlib import Path


def describe_device() -> str:
    """Return name, memory and driver of the first device, and the versions of what computes on it."""
    import torch
    import warp as wp

    wp.config.log_level = wp.LOG_WARNING
    wp.init()
    versions = f"torch {torch.__version__}, warp {wp.__version__}"
    if not torch.cuda.is_available() or not wp.get_cuda_devices():
        return f"cpu; {versions}"
    found = torch.cuda.get_device_properties(0)
    memory, driver = found.total_memory / 2**30, wp.get_cuda_driver_version()
    return (
        f"{found.name}, {memory:.1f} GiB, compute capability {found.major}.{found.minor}, "
        f"CUDA driver {'.'.join(map(str, driver))}; {versions}"
    )


def table(out: Path) -> str:
    """Return the table of what the steps have left in a folder, whole or not."""
    lines = ["| step | end | seconds | |", "| --- | --- | ---: | --- |"]
    steps = out / "steps.csv"
    for name, end, seconds in csv.reader(steps.read_text().splitlines()) if steps.exists() else ():
        log = out / f"{name}.log"
        said = [line for line in log.read_text(errors="replace").splitlines() if line] if log.exists() else []
        if name == "tests":  # libraries may have the last word
            said = [line for line in said if re.search(r"\d+ (passed|failed|skipped|error)", line)] or said
        last = said[-1] if said and (name in ("device", "tests") or end != "passed") else ""
        lines.append(f"| {name} | {end} | {seconds} | {re.sub('=+', '', last).replace('|', '/').strip()} |")
    tests = out / "tests.log"
    if tests.exists():
        ends = re.findall(r"^(?:FAILED|ERROR) .*", tests.read_text(errors="replace"), re.MULTILINE)
        lines += ["", *(f"- {end}" for end in ends)] if ends else []
    results = out / "benchmarks" / "results.md"
    if results.exists():
        lines += ["", results.read_text().strip()]
    return "\n".join(lines)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["device"]:
            text = describe_device()
            print(text, flush=True)
            if text.startswith("cpu;") and os.environ.get("WARP_PHYS_GPU_DRY") != "1":
                sys.exit("there is no CUDA device that both torch and Warp see; --dry runs without one")
        case ["table", folder]:
            print(table(Path(folder)))
        case _:
            sys.exit("python -m tests.gpu.report device, or table FOLDER")
