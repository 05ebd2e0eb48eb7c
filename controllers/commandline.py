"""The command line program; its flags are the fields of `Training` and of the chosen system."""

import os
import shlex
import signal
import sys
import threading
import typing
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch

from controllers.checkpoint import CHECKPOINT, CONFIG, load_checkpoint
from controllers.config import field_help, read_config
from controllers.log import Log, TensorBoard, make_log
from controllers.progress import Progress
from controllers.ranks import Ranks, RanksLost, launched_ranks
from controllers.settings import Training
from controllers.training import train
from warp_phys import Diverged, quiet
from warp_phys.systems import SYSTEMS


class Parser(ArgumentParser):
    """An argument parser that answers a mistake with one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    @contextmanager
    def answering(self, what: str = "the run") -> Iterator[None]:
        """Answer what goes wrong inside with one line: status 1 where it diverges, 2 where a file cannot be had."""
        try:
            yield
        except Diverged as error:
            self.exit(1, f"{self.prog}: error: {what} diverged: {error}\n")
        except OSError as error:
            self.error(str(error))


@dataclass(frozen=True)
class Command:
    """What a command line asks for."""

    settings: Training
    resume: bool
    overwrite: bool
    log: Log | None = None


def parse(arguments: Sequence[str]) -> Command:
    """Read a command line; exits with status 2 and one line where it makes no sense."""
    options: dict[str, Any] = {"prog": "python -m controllers", "allow_abbrev": False}
    first = Parser(add_help=False, **options)
    for name in ("--system", "--out", "--config"):
        first.add_argument(name)
    first.add_argument("--resume", action="store_true")
    glance = first.parse_known_args(arguments)[0]
    try:
        described = read_config(glance.config) if glance.config is not None else {}
        out = described.get("out", Training.out) if glance.out is None else glance.out
        saved = _saved(Path(out)) if glance.resume else {}
    except (OSError, ValueError, TypeError) as error:
        first.error(str(error))
    name = glance.system or described.get("system") or saved.get("system", Training.system)
    if name not in SYSTEMS:
        first.error(f"system must be one of {', '.join(SYSTEMS)}, got {name!r}")
    parser = Parser(description="Train a neural controller through an unrolled simulation.", **options)
    add_flags(parser.add_argument_group("training"), Training)
    own_flags = add_flags(parser.add_argument_group(f"parameters of {name}"), SYSTEMS[name], taken=FLAGS)
    files = parser.add_argument_group("files")
    text = "Take what is not given here from a file, such as the run.toml of an earlier run."
    files.add_argument("--config", metavar="FILE", help=text)
    files.add_argument("--resume", action="store_true", help="Continue the run in out, as its run.toml describes it.")
    files.add_argument("--overwrite", action="store_true", help="Replace the run in out.")
    text = "Send each epoch's numbers to TensorBoard (files in out), or to a function, as module:name."
    files.add_argument("--log", metavar="{tensorboard,MODULE:NAME}", help=text)
    given = vars(parser.parse_args(arguments))
    resume, overwrite, _ = given.pop("resume"), given.pop("overwrite"), given.pop("config")
    log = given.pop("log")
    if resume and overwrite:
        parser.error("resume and overwrite exclude each other")
    given["parameters"] = {own: given.pop(flag) for flag, own in own_flags.items() if flag in given}
    try:
        settings = Training(**_merged(saved, described, given))
        return Command(settings, resume, overwrite, make_log(log, settings.out) if log else None)
    except (ImportError, ValueError, TypeError) as error:
        parser.error(str(error))


def _saved(folder: Path) -> dict[str, Any]:
    """The settings of the run in a folder: its file, which may have been edited, else its checkpoint's."""
    saved = load_checkpoint(folder)["settings"]
    return read_config(folder / CONFIG) if (folder / CONFIG).exists() else saved


def _merged(*layers: dict[str, Any]) -> dict[str, Any]:
    """Settings of which each layer overrides those before; the parameters of another system count no more."""
    merged: dict[str, Any] = {"system": Training.system, "parameters": {}}
    for layer in layers:
        parameters = merged["parameters"] if layer.get("system", merged["system"]) == merged["system"] else {}
        merged |= layer | {"parameters": parameters | layer.get("parameters", {})}
    return merged


FLAGS = frozenset(entry.name for entry in fields(Training)) | {"config", "resume", "overwrite", "log", "help"}


def add_flags(group: Any, kind: type, taken: Container[str] = ()) -> dict[str, str]:
    """Add one flag per field of a dataclass, "system-" before a name that is taken; returns {argument: field}."""
    texts, hints, names = field_help(kind), typing.get_type_hints(kind), {}
    for entry in fields(kind):
        options = flag_options(hints[entry.name])
        if options is None:
            continue
        flag = f"system_{entry.name}" if entry.name in taken else entry.name
        text = texts.get(entry.name, "")
        if entry.default is not MISSING:
            shown = " ".join(map(str, entry.default)) if isinstance(entry.default, tuple) else str(entry.default)
            text += f" (default: {shown or 'none'})"
        # Only what is given ends up in the arguments: defaults have one home, the dataclass.
        group.add_argument(f"--{flag.replace('_', '-')}", default=SUPPRESS, help=text.replace("%", "%%"), **options)
        names[flag] = entry.name
    return names


def flag_options(hint: Any) -> dict[str, Any] | None:
    """How argparse reads a field of this type; None where a command line cannot hold it.

    >>> flag_options(tuple[float, float])
    {'type': <class 'float'>, 'metavar': 'FLOAT', 'nargs': 2}
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is bool:
        return {"action": BooleanOptionalAction}
    if origin is Literal:
        return {"metavar": "{" + ",".join(parts) + "}"}
    if origin is tuple and (options := flag_options(parts[0])):
        return options | {"nargs": "*" if parts[-1] is Ellipsis else len(parts)}
    # A parameter that may be an array or a number is a number here.
    plain = next((part for part in (hint, *parts) if part in (int, float, str)), None)
    return {"type": plain, "metavar": plain.__name__.upper()} if plain and origin not in (tuple, dict) else None


@contextmanager
def stop_on_signals() -> Iterator[tuple[threading.Event, list[int]]]:
    """Turn SIGINT or SIGTERM into an event; the same once more ends the program at once. Main thread only."""
    stop, received = threading.Event(), list[int]()

    def handle(number: int, _frame: object) -> None:
        if number in received:
            # Files are renamed into place, so there is no moment at which this leaves a broken one.
            os._exit(128 + number)
        received.append(number)
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop, received
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop, received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status.

    0 done, 1 diverged, 2 a mistake in the arguments, 3 another process of the training was lost, 130 and 143 stopped by
    SIGINT and SIGTERM, with all saved.
    """
    command = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        quiet()
    except OSError as error:  # there is no place for kernels
        print(f"python -m controllers: error: {error}", file=sys.stderr)
        return 2
    if command.settings.threads:
        torch.set_num_threads(command.settings.threads)
    with stop_on_signals() as (stop, received), launched_ranks(command.settings.device) as device:
        return run(replace(command, settings=replace(command.settings, device=device)), stop, received)


def run(command: Command, stop: threading.Event, received: list[int]) -> int:
    """Train, and tell how it ended."""
    settings, leads = command.settings, Ranks().leads
    progress = Progress(settings.epochs) if leads else None
    say = (lambda text: print(text, file=sys.stderr)) if leads else (lambda text: None)
    again = f"python -m controllers --resume --out {shlex.quote(settings.out)}"
    say("Preparing; the first run of a system compiles its kernels …")
    try:
        trained = train(
            settings,
            resume=command.resume,
            overwrite=command.overwrite,
            stop=stop,
            progress=progress,
            log=command.log,
            graph=True,
        )
    except (ImportError, OSError, ValueError) as error:
        say(f"python -m controllers: error: {error}")
        return 2
    except (Diverged, RanksLost) as error:  # told by any rank: the others may be gone
        kept = settings.out and (Path(settings.out) / CHECKPOINT).exists()
        lost = isinstance(error, RanksLost)
        told = f"The training ended: {error}." if lost else f"The training diverged: {error}."
        if kept:
            told += f"\nThe last checkpoint and the record are kept in {settings.out}."
            told += f" To go on, with any number of ranks:\n    {again}" if lost else ""
        else:
            told += "\nThere is no checkpoint yet."
        print(f"\n{told}", file=sys.stderr)
        return 3 if lost else 1
    finally:
        for tell in (progress, command.log):
            if isinstance(tell, (Progress, TensorBoard)):
                tell.close()
    if trained.finished:
        say(f"Done: {len(trained.records)} epochs, files in {settings.out or 'no folder'}.")
        return 0
    say(f"Stopped after {len(trained.records)} whole epochs, everything is saved. To go on:\n    {again}")
    return 128 + received[0] if received else 0
