"""A budget of processor time: when it ends training, and where it takes the schedules."""

import math
from types import SimpleNamespace

import pytest

from taming.training.callbacks import Budget
from taming.training.callbacks import budget as budget_module
from tests.tiny import curves, resume, train, write_vqgan

NAME = "lightning.callbacks.budget"


class Clock:
    now = 0.0

    def process_time(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(budget_module, "time", clock)
    return clock


def batches(callback, clock, count, seconds, between=0.0):
    """Train batches of so many seconds; return the number that schedules saw, and which terms were on."""
    loss = SimpleNamespace(discriminator_iter_start=60, gen_start=80)
    trainer = SimpleNamespace(should_stop=False)
    model = SimpleNamespace(scheduler=lambda batch: batch, loss=loss, batches_seen=0)
    callback.on_fit_start(trainer, model)
    callback.on_train_start(trainer, model)
    seen = []
    while not trainer.should_stop and len(seen) < count:
        clock.now += between  # loading, validation
        callback.on_train_batch_start(trainer, model, None, 0)
        is_on = [model.batches_seen >= each for each in (loss.discriminator_iter_start, loss.gen_start)]
        seen.append((model.scheduler(model.batches_seen), *is_on))
        clock.now += seconds
        model.batches_seen += 1
        callback.on_train_batch_end(trainer, model, None, None, 0)
    callback.on_fit_end(trainer, model)
    assert (loss.discriminator_iter_start, loss.gen_start) == (60, 80)
    return seen


def test_training_ends_when_the_time_of_its_steps_is_spent(clock):
    callback = Budget(planned_batches=100, cpu_minutes=0.5)
    seen = batches(callback, clock, 100, seconds=3.0, between=7.0)
    assert len(seen) == 10  # 30 seconds of steps; the time between them is free
    assert [round(step) for step, *_ in seen] == list(range(0, 100, 10))  # of the 100 planned ones
    assert [on for _, on, _ in seen].index(True) == 6 and [on for *_, on in seen].index(True) == 8


def test_a_budget_of_batches_stretches_the_schedules_as_well(clock):
    seen = batches(Budget(planned_batches=100, batches=200), clock, 999, seconds=1.0)
    assert len(seen) == 200 and seen[50][0] == 25 and seen[199][0] == 99.5


def test_a_run_goes_on_with_the_rest_of_its_budget(clock):
    first, second = (Budget(planned_batches=100, cpu_minutes=0.5) for _ in range(2))
    batches(first, clock, 7, seconds=3.0)
    second.load_state_dict(first.state_dict())
    seen = batches(second, clock, 100, seconds=3.0)
    assert len(seen) == 3 and math.isclose(seen[0][0], 70)
    assert second.state_dict()["begun"]["discriminator_iter_start"] == 6  # that of the first start


@pytest.mark.parametrize("params", [{}, {"cpu_minutes": 1.0, "batches": 5}])
def test_one_budget_is_wanted(params):
    with pytest.raises(ValueError, match="give one of both"):
        Budget(planned_batches=10, **params)


def test_a_run_of_the_command_keeps_to_its_budget_and_remembers_it(tmp_path):
    words = [f"{NAME}.target=taming.training.callbacks.Budget", f"{NAME}.params.planned_batches=20",
             f"{NAME}.params.batches=5", "lightning.callbacks.image_logger=null"]
    run = train(write_vqgan(tmp_path), tmp_path, "first", "--max_steps", "-1", *words)
    rates = [float(row["train/lr"]) for row in curves(run) if "train/lr" in row]
    assert len(rates) == 5 and rates[1] > 2 * rates[0] and rates[4] < 0.5 * max(rates)  # the cosine's end
    resume(run)
    assert sum("train/lr" in row for row in curves(run)) == 5  # nothing is left
