"""The training loop: what one update is, what a record says, what repeats bit by bit."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_training import never, same_bits, small, without_seconds

from controllers import MLP, train
from controllers.record import read_record
from controllers.settings import derive_seeds
from controllers.training import Loop
from warp_phys import Diverged
from warp_phys.interop.torch import Rollout
from warp_phys.interop.torch.optimiser import clip_gradients

TINY_RATE = 1e-30  # leaves float32 weights as they are


def gradients_of(loop):
    return torch.cat([parameter.grad.flatten() for parameter in loop.parameters])


def test_clip_value_bounds_each_component():
    gradients = [torch.tensor([3.0, -0.5]), torch.tensor([[-2.0, 1.0]])]
    clip_gradients(gradients, "value", 1.5)
    assert torch.equal(gradients[0], torch.tensor([1.5, -0.5]))
    assert torch.equal(gradients[1], torch.tensor([[-1.5, 1.0]]))


def test_clip_norm_bounds_the_norm_of_all_together():
    gradients = [torch.tensor([3.0, 0.0]), torch.tensor([[-4.0]])]
    clip_gradients(gradients, "norm", 1.0)
    torch.testing.assert_close(gradients[0], torch.tensor([0.6, 0.0]))
    torch.testing.assert_close(gradients[1], torch.tensor([[-0.8]]))


@pytest.mark.parametrize("clip", ["none", "value", "norm"])
@pytest.mark.parametrize("values", [[0.0, 0.0], [0.3, -0.4]])
def test_clipping_leaves_small_gradients_alone(clip, values):
    gradient = torch.tensor(values)
    clip_gradients([gradient], clip, 1.0)
    assert torch.equal(gradient, torch.tensor(values))


def test_clipping_comes_last_in_an_update(device):
    plain, clipped = (Loop(small(device=device, clip=clip, clip_at=1e-3)) for clip in ("none", "value"))
    for loop in (plain, clipped):
        loop.rollout.observe = ("modified", "regular")
        loop.update(loop.train_states[None, :8], never)
    expected = gradients_of(plain).clamp(-1e-3, 1e-3)
    assert gradients_of(plain).abs().max() > 2e-3
    torch.testing.assert_close(gradients_of(clipped), expected, rtol=1e-4, atol=1e-7)
    assert clipped.report.norm == pytest.approx(plain.report.norm, rel=1e-4)


@pytest.mark.parametrize("flow", ["R", "C"])
def test_parts_of_a_minibatch_add_up_to_its_update(flow, device):
    updates = []
    for accumulate in (1, 3):
        loop = Loop(small(device=device, flow=flow, accumulate=accumulate))
        loop.update(loop.train_states[None, :8], never)
        updates.append((gradients_of(loop), loop.losses[0]))
    (whole, loss), (parts, loss_of_parts) = updates
    assert whole.norm() > 1e-3
    assert (whole - parts).norm() < 1e-4 * whole.norm()
    torch.testing.assert_close(loss, loss_of_parts)


def test_record_tells_the_losses(device):
    settings = small(device=device, epochs=1, rate=TINY_RATE)
    (record,) = train(settings).records
    seeds, system = derive_seeds(settings.seed), settings.make_system()
    controller = MLP(system, settings.hidden, seed=seeds.weights).to(device)
    rollout = Rollout(system, controller, steps=settings.steps, device=device)
    with torch.no_grad():
        train_loss = float(system.loss(*rollout(system.sample(32, seed=seeds.train_states))))
        test_loss = float(system.loss(*rollout(system.sample(16, seed=seeds.test_states))))
    assert train_loss != pytest.approx(test_loss, rel=1e-4)
    assert record.train_loss == pytest.approx(train_loss, rel=1e-5)
    assert record.minibatch_loss == pytest.approx(train_loss, rel=1e-5)
    assert record.test_loss == pytest.approx(test_loss, rel=1e-5)
    assert (record.epoch, record.rate) == (1, TINY_RATE)
    assert record.seconds > 0


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("flow", ["regular", "stopped", "combined"])
def test_record_tells_cosine_agreement_and_norm_of_the_last_update(flow, accumulate, device):
    settings = small(device=device, epochs=1, rate=TINY_RATE, flow=flow, accumulate=accumulate)
    trained = train(settings)
    seeds, system = derive_seeds(settings.seed), settings.make_system()
    rows = system.sample(32, seed=seeds.train_states)[-8:]
    updates = {}
    for name in ("modified", "regular", flow):
        controller = MLP(system, settings.hidden, seed=seeds.weights).to(device)
        system.loss(*Rollout(system, controller, settings.steps, name, device)(rows)).backward()
        updates[name] = torch.cat([parameter.grad.flatten() for parameter in controller.parameters()]).double()
    modified, regular = updates["modified"], updates["regular"]
    cosine = float(modified @ regular / modified.norm() / regular.norm())
    record = trained.records[-1]
    assert cosine < 0.9999
    assert record.cosine == pytest.approx(cosine, abs=1e-4)
    assert record.agreement == pytest.approx(float((modified.sign() == regular.sign()).double().mean()), abs=5e-3)
    assert record.update_norm_squared == pytest.approx(float(updates[flow].square().sum()), rel=1e-3)


def test_training_learns(device):
    records = train(small(device=device, epochs=30, rate=3e-3, steps=40)).records
    assert records[-1].test_loss < 0.9 * records[0].test_loss
    assert records[-1].minibatch_loss < 0.9 * records[0].minibatch_loss


def test_one_seed_decides_every_bit():
    one, same, other = (train(small(seed=seed, shuffle=True)) for seed in (1, 1, 2))
    assert same_bits(one.controller, same.controller)
    assert without_seconds(one.records) == without_seconds(same.records)
    assert not same_bits(one.controller, other.controller)


def test_shuffling_draws_another_order_every_epoch():
    loop = Loop(small(shuffle=True))
    first = loop.order()
    loop.records.append(None)
    second = loop.order()
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(32))
    assert not torch.equal(first, second)
    assert torch.equal(Loop(small()).order(), torch.arange(32))


def test_a_learning_rate_that_falls():
    settings = small(schedule="cosine", rate=2e-3)
    rates = [record.rate for record in train(settings).records]
    assert rates == pytest.approx([1e-3 * (1 + np.cos(np.pi * epoch / 4)) for epoch in range(4)], rel=1e-12)
    first = replace(settings, schedule="constant")  # of which the first epoch is the same
    assert train(settings).records[0].train_loss == train(first).records[0].train_loss
    assert train(settings).records[1].train_loss != train(first).records[1].train_loss
    assert {record.rate for record in train(first).records} == {2e-3}


def test_a_learning_rate_that_falls_knows_its_epochs(tmp_path):
    settings = small(out=str(tmp_path), schedule="cosine")
    train(settings)
    with pytest.raises(ValueError, match="epochs was 4, is 6"):
        train(replace(settings, epochs=6), resume=True)


@pytest.mark.parametrize("flow", ["combined", "averaged"])
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("minibatches", [0, 3, 8, 10])
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(minibatches, graph, flow, tmp_path):
    settings = small(out=str(tmp_path / "run"), shuffle=True, clip="norm", flow=flow, schedule="cosine")
    asked = iter(range(1000))
    assert Loop(small(), graph).step._graph == graph
    stopped = train(settings, stop=lambda: next(asked) >= minibatches, graph=graph)
    assert not stopped.finished
    assert len(stopped.records) == minibatches // 4
    resumed = train(settings, resume=True, graph=graph)
    whole = train(small(shuffle=True, clip="norm", flow=flow, schedule="cosine"))
    assert resumed.finished
    assert same_bits(resumed.controller, whole.controller)
    assert without_seconds(resumed.records) == without_seconds(whole.records)
    assert resumed.records[-1].seconds > (stopped.records[-1].seconds if stopped.records else 0)


def test_a_checkpoint_of_an_earlier_version_can_be_resumed(tmp_path):
    """Which had no flow with a memory, and one learning rate."""
    settings = small(out=str(tmp_path))
    asked = iter(range(1000))
    train(settings, stop=lambda: next(asked) >= 6)
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    del content["update"], content["settings"]["schedule"]
    torch.save(content, tmp_path / "checkpoint.pt")
    assert same_bits(train(settings, resume=True).controller, train(small()).controller)


def test_a_finished_run_can_be_prolonged(tmp_path):
    out = str(tmp_path)
    train(small(out=out, epochs=2))
    longer = train(small(out=out, epochs=4), resume=True)
    assert same_bits(longer.controller, train(small(epochs=4)).controller)


def test_a_thread_can_train_and_be_stopped():
    stop, results = threading.Event(), []

    def progress(record):
        if record.epoch == 2:
            stop.set()

    thread = threading.Thread(target=lambda: results.append(train(small(epochs=1000), stop=stop, progress=progress)))
    thread.start()
    thread.join(60)
    assert [record.epoch for record in results[0].records] == [1, 2]
    assert not results[0].finished


def test_a_divergence_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    settings = small(out=str(tmp_path), checkpoint_every=2)
    update = Loop.update

    def diverge(loop, states, stop):
        if len(loop.records) == 3:
            raise Diverged(5, [0])
        update(loop, states, stop)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "update", diverge)
        with pytest.raises(Diverged):
            train(settings)
    assert read_record(tmp_path / "record.csv")["epoch"].tolist() == [1, 2, 3]
    resumed = train(settings, resume=True)
    assert same_bits(resumed.controller, train(small()).controller)
    assert np.isfinite(read_record(tmp_path / "record.csv")["test_loss"]).tolist() == [True] * 4
