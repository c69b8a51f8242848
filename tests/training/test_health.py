"""Health: each fault is found when it is there, said once, written into the curves, and acted on as told."""

import copy
from types import SimpleNamespace

import pytest
import torch

from taming.metrics import CodebookUsage
from taming.modules.dvae.relaxation import GumbelSoftmax
from taming.modules.losses.vqperceptual import VQLPIPSWithDiscriminator
from taming.modules.vqvae.quantize import EMAVectorQuantizer, GumbelQuantize, VectorQuantizer2
from taming.training.callbacks import Health, Unhealthy
from taming.training.callbacks.health import restart_codes


class Curves:
    def __init__(self):
        self.rows = []

    def log_metrics(self, metrics, step):
        self.rows.append((step, metrics))


class Model(torch.nn.Module):
    """The parts of a VQGAN that Health looks at and changes."""

    def __init__(self, **loss):
        super().__init__()
        self.encoder = torch.nn.Conv2d(3, 4, 1)
        self.loss = VQLPIPSWithDiscriminator(
            disc_start=0, perceptual_weight=0.0, disc_num_layers=1, disc_ndf=8, **loss
        )
        self.quantize = VectorQuantizer2(6, 4, beta=0.25)
        self.val_codes = CodebookUsage(6)
        self.batches_seen, self.skipped_batches, self.device = 0, 0, torch.device("cpu")


def a_trainer(model, **metrics):
    optimizers = [
        torch.optim.Adam(model.encoder.parameters(), lr=1.0),
        torch.optim.Adam(model.loss.discriminator.parameters(), lr=1.0),
    ]
    loop = SimpleNamespace(_batches_that_stepped=7)
    return SimpleNamespace(
        callback_metrics={name.replace("__", "/"): torch.tensor(value) for name, value in metrics.items()},
        strategy=SimpleNamespace(reduce=lambda value, reduce_op: value), optimizers=optimizers,
        loggers=[Curves()], fit_loop=SimpleNamespace(epoch_loop=loop), is_global_zero=True,
        sanity_checking=False, state=SimpleNamespace(fn="fit"),
    )


def advance(health, trainer, model, batches):
    for _ in range(batches):
        model.batches_seen += 1
        health.on_train_batch_end(trainer, model, None, None, 0)


def rates(trainer):
    return [optimizer.param_groups[0].get("lr_factor", 1.0) for optimizer in trainer.optimizers]


FAULTS = [("adaptive_weight", {"train__d_weight": 2000.0}), ("discriminator", {"train__disc_loss": 0.01})]


@pytest.mark.parametrize(("fault", "metrics"), FAULTS)
def test_a_lasting_fault_is_said_once_and_is_in_the_curves_until_it_is_over(caplog, fault, metrics):
    model = Model()
    trainer, health = a_trainer(model, **metrics), Health(every_n_batches=4, patience=3)
    health.on_train_start(trainer, model)
    advance(health, trainer, model, 11)
    assert caplog.text == "" and trainer.loggers[0].rows == []
    advance(health, trainer, model, 40)
    assert caplog.text.count("health: after 12 batches") == caplog.text.count("health: after") == 1
    trainer.callback_metrics = {"train/d_weight": torch.tensor(1.0), "train/disc_loss": torch.tensor(0.9)}
    advance(health, trainer, model, 40)
    assert trainer.loggers[0].rows == [(7, {f"health/{fault}": 1.0}), (7, {f"health/{fault}": 0.0})]


def test_a_passing_fault_is_none(caplog):
    model = Model()
    trainer, health = a_trainer(model), Health(every_n_batches=1, patience=3)
    health.on_train_start(trainer, model)
    for weight in [2000.0, 2000.0, 1.0] * 5:
        trainer.callback_metrics["train/d_weight"] = torch.tensor(weight)
        advance(health, trainer, model, 1)
    assert caplog.text == ""


@pytest.mark.parametrize(("fault", "metrics"), FAULTS)
def test_a_fault_without_an_action_is_not_looked_for(caplog, fault, metrics):
    model = Model()
    trainer, health = a_trainer(model, **metrics), Health(every_n_batches=1, patience=1, **{fault: None})
    health.on_train_start(trainer, model)
    advance(health, trainer, model, 5)
    assert caplog.text == "" and trainer.loggers[0].rows == []


@pytest.mark.parametrize(("fault", "metrics"), FAULTS)
def test_stop_raises_in_all_processes(fault, metrics):
    model = Model()
    trainer, health = a_trainer(model, **metrics), Health(every_n_batches=1, patience=2, **{fault: "stop"})
    with pytest.raises(Unhealthy, match=f"after 2 batches .*health.params.{fault} says") as caught:
        advance(health, trainer, model, 5)
    assert caught.value.on_all_ranks  # so that they save together


def test_lower_bounds_the_adaptive_weight_and_a_resumed_run_keeps_the_bound(caplog):
    model = Model()
    options = {"adaptive_weight": "lower", "every_n_batches": 1, "patience": 2, "d_weight_max": 50.0}
    trainer, health = a_trainer(model, train__d_weight=60.0), Health(**options)
    advance(health, trainer, model, 2)
    assert model.loss.disc_weight_max == 50.0 and "bounded at 50.0" in caplog.text
    resumed, again = Model(), Health(**options)
    again.load_state_dict(copy.deepcopy(health.state_dict()))
    again.on_train_start(trainer, resumed)
    assert resumed.loss.disc_weight_max == 50.0


def test_lower_halves_the_rate_of_a_discriminator_that_has_won_each_time():
    model = Model()
    options = {"discriminator": "lower", "every_n_batches": 1, "patience": 2}
    trainer, health = a_trainer(model, train__disc_loss=0.0), Health(**options)
    advance(health, trainer, model, 5)
    assert rates(trainer) == [1.0, 0.25]


@pytest.mark.parametrize("use_actnorm", [True, False])
def test_restart_initialises_the_discriminator_alike_everywhere(use_actnorm):
    starts = []
    for seed in range(2):  # two processes with random numbers of their own
        torch.manual_seed(seed)
        model = Model(use_actnorm=use_actnorm)
        trainer = a_trainer(model, train__disc_loss=0.0)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        model.loss.discriminator(torch.randn(2, 3, 16, 16))
        before, numbers = copy.deepcopy(model.loss.discriminator.state_dict()), torch.get_rng_state()
        advance(Health(discriminator="restart", every_n_batches=1, patience=1), trainer, model, 1)
        state = model.loss.discriminator.state_dict()
        assert torch.equal(torch.get_rng_state(), numbers)
        assert not torch.equal(state["main.0.weight"], before["main.0.weight"])
        assert state["main.0.weight"].std() == pytest.approx(0.02, rel=0.2)  # weights_init
        assert len(trainer.optimizers[0].state) > 0 and len(trainer.optimizers[1].state) == 0
        if use_actnorm:
            assert state["main.3.initialized"] == 0
        else:
            assert torch.equal(state["main.3.running_mean"], torch.zeros(16))
            starts.append(state)
    assert use_actnorm or all(torch.equal(starts[0][key], starts[1][key]) for key in starts[0])


@pytest.mark.parametrize(("action", "rate", "skips"), [
    ("warn", 1.0, False), ("skip", 1.0, True), ("lower", 0.5, True),
])
def test_batches_that_the_model_left_out(caplog, action, rate, skips):
    model = Model()
    trainer, health = a_trainer(model), Health(non_finite=action)
    health.on_train_start(trainer, model)
    assert model.skips_losses == skips
    for skipped in (0, 1, 0, 0):
        model.skipped_batches = skipped
        advance(health, trainer, model, 1)
    assert rates(trainer) == [rate, rate]
    assert caplog.text.count("a loss or gradient is not finite") == 1
    assert [row["health/non_finite"] for _, row in trainer.loggers[0].rows] == [1.0, 0.0]


def test_dead_codes(caplog):
    model = Model()
    trainer, health = a_trainer(model, val__codebook_usage_percent=3.0), Health()
    trainer.sanity_checking = True
    health.on_validation_end(trainer, model)
    assert caplog.text == ""
    trainer.sanity_checking = False
    health.on_validation_end(trainer, model)
    health.on_validation_end(trainer, model)
    assert caplog.text.count("3 % of the codes are in use (usage_min: 5.0)") == 1


@pytest.mark.parametrize("kind", [VectorQuantizer2, EMAVectorQuantizer])
def test_restarted_codes_lie_beside_used_ones_and_these_stay(kind):
    model = Model()
    model.quantize = kind(6, 4, 0.25)
    with torch.no_grad():
        model.quantize.embedding.weight.normal_()
    before = model.quantize.embedding.weight.detach().clone()
    model.val_codes.update(torch.tensor([1, 1, 4]))
    assert restart_codes(model) == 4
    after = model.quantize.embedding.weight.detach()
    assert torch.equal(after[[1, 4]], before[[1, 4]])
    distances = torch.cdist(after[[0, 2, 3, 5]], before[[1, 4]]).amin(1)
    assert (0 < distances).all() and (distances < 0.2).all()
    restart = after.clone()
    with torch.no_grad():
        model.quantize.embedding.weight.copy_(before)
    restart_codes(model)  # the same in every process: a function of the batch number
    assert torch.equal(model.quantize.embedding.weight, restart)


def test_nothing_is_copied_where_no_code_was_counted():
    model = Model()
    before = model.quantize.embedding.weight.detach().clone()
    assert restart_codes(model) == 0 and torch.equal(model.quantize.embedding.weight, before)


@pytest.mark.parametrize(("options", "message"), [
    ({"discriminator": "skip"}, "health.discriminator: 'skip' is unknown; choose warn, lower, restart, stop"),
    ({"codes": "lower"}, "health.codes: 'lower' is unknown; choose warn, restart, stop or null"),
    ({"patience": 0}, "health.patience must be at least 1, got 20 and 0"),
])
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Health(**options)


def test_an_action_that_the_model_has_no_part_for_is_named_at_the_start():
    model = Model()
    for quantizer, message in (
        (torch.nn.Identity(), "health.codes: restart needs a codebook of vectors"),
        (GumbelQuantize(4, 4, 6), "GumbelQuantize chooses codes by logits, .*: raise kl_weight"),
        (GumbelSoftmax(6), "GumbelSoftmax chooses codes by logits, .*: raise kl_weight"),
    ):
        model.quantize = quantizer
        with pytest.raises(ValueError, match=message):
            Health(codes="restart").on_train_start(a_trainer(model), model)
    trainer, model.loss = a_trainer(model), torch.nn.Identity()
    with pytest.raises(ValueError, match="health.discriminator: lower needs a loss with a discriminator"):
        Health(discriminator="lower").on_train_start(trainer, model)
    Health().on_train_start(trainer, model)
