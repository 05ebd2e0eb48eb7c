"""Runs small enough for a test, and runs that were never trained."""

from dataclasses import replace

import numpy as np

from controllers.checkpoint import CONFIG, RECORD
from controllers.config import write_config
from controllers.record import Record, write_record
from demos.experiments.plan import DIVERGED, FINISHED, State, make_plan

SMALL = ["--train-states", "8", "--test-states", "8"]


def small_plan(out, flows="RC", epochs=3, **changes):
    """Runs of the cart with one pole."""
    choice = {"levels": {"cartpole": [1]}, "clips": ["none"], "seeds": [0]} | changes
    return make_plan(out, flows=flows, epochs=epochs, train_states=8, test_states=8, **choice)


def records(losses):
    """Records with these test losses; every column has other numbers."""
    return [
        Record(epoch, 10 * loss, 2 * loss, loss, 0.1 * epoch, -0.5, 0.75, 1e-3, 0.25 * epoch)
        for epoch, loss in enumerate(map(float, losses), 1)
    ]


def pretend(run, losses, word=FINISHED, reason=""):
    """Leave the files of a run that had these test losses."""
    write_record(run.folder / RECORD, records(losses))
    write_config(run.folder / CONFIG, run.settings)
    if word:
        run.conclude(State(word, len(losses), reason))


def pretended_results(out, epochs=20):
    """A folder of made-up runs: returns {run name: test losses}; see the body for those that are not finished."""
    plan = small_plan(
        out, "RC", epochs, levels={"cartpole": [1, 2]}, clips=["none", "value"], seeds=[0, 1, 2], shuffle=False
    )
    made = {}
    for number, run in enumerate(plan):
        losses = np.random.default_rng(number).uniform(0.5, 1.5, epochs)
        word, reason = FINISHED, ""
        if run.name.startswith("cartpole/poles-2/regular/clip-none/") and run.settings.seed > 0:
            losses, word, reason = losses[: 5 * run.settings.seed], DIVERGED, "step 7, samples 0, 3"
        elif run.name == "cartpole/poles-1/combined/clip-value/seed-2":
            losses, word = losses[:4], ""
        pretend(run, losses, word, reason)
        made[run.name] = losses
    return made


def changed(run, **changes):
    """The run with other settings in the same folder."""
    return replace(run, settings=replace(run.settings, **changes))
