"""Averages of weights (EMA): values, checkpoints, resumed runs, validation, exports, several processes."""

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import nn

from taming.checkpoint import load_model, read_checkpoint
from taming.checkpoint.content_hash import content_hash
from taming.checkpoint.convert import convert, extract
from taming.models.averages import WeightAverages
from taming.models.base import ImageModel
from taming.models.transgan import TransGAN
from taming.models.vqgan import VQModel
from taming.training.command import main
from tests.ranks import main_on_ranks
from tests.tiny import curves, resume, train, trouble, write_transformer, write_vqgan

STEPS = 6  # one epoch and a half: a validation lies between
EMA = ["model.ema_decay=0.9"]


def last(run):
    return read_checkpoint(run / "checkpoints" / "last.ckpt")


class Scalar(ImageModel):
    """One weight, which batch k sets to k; a tied name, a buffer, and a whole number."""

    def __init__(self):
        super().__init__()
        self.part = nn.Linear(1, 1, bias=False)
        self.tied = self.part
        self.register_buffer("running", torch.zeros(()))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.seen = []  # the weight in validation
        self.learning_rate = 1.0

    def training_step(self, batch, batch_idx):
        self.manual_backward(0.0 * self.part.weight.sum())
        if self.gradients_complete():
            self.optimizers().step()
            self.batches_seen += 1
            with torch.no_grad():
                self.part.weight.fill_(self.batches_seen)
            self.running.fill_(2.0 * self.batches_seen)
            self.count += 1

    def validation_step(self, batch, batch_idx):
        values = self.part.weight, self.tied.weight, self.running, self.count
        self.seen.append(tuple(float(value) for value in values))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def fit(model, batches, folder, **arguments):
    trainer = pl.Trainer(**{
        "accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder,
        "num_sanity_val_steps": 0, **arguments,
    })
    data = torch.utils.data.DataLoader(torch.zeros(batches, 1), batch_size=1)
    trainer.fit(model, data, data)
    return trainer


def averaged(values, decay, warmup):
    """The average after each of some values, by the formula."""
    mean, found = values[0], [values[0]]
    for n, value in enumerate(values[1:], start=1):
        d = min(decay, (1 + n) / (10 + n)) if warmup else decay
        mean = d * mean + (1 - d) * value
        found.append(mean)
    return found


@pytest.mark.parametrize("warmup", [False, True])
def test_values_follow_the_formula_and_are_validated(tmp_path, warmup):
    model = Scalar()
    model.keep_averages(0.3, warmup)
    fit(model, 6, tmp_path, val_check_interval=2)
    want = averaged([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 0.3, warmup)
    assert [seen[0] for seen in model.seen[::6]] == pytest.approx([want[1], want[3], want[5]])
    for weight, tied, running, _ in model.seen:
        assert weight == tied and running == pytest.approx(2 * weight)  # buffers too
    assert [seen[3] for seen in model.seen[::6]] == [2, 4, 6]  # whole numbers are not averaged
    assert float(model.part.weight) == 6.0  # training went on with the trained weight
    assert model.averages.updates == model.batches_seen == 6
    with model.averaged_weights():
        assert float(model.part.weight) == pytest.approx(want[-1])
        with model.averaged_weights(False):
            assert float(model.part.weight) == 6.0
        assert float(model.part.weight) == pytest.approx(want[-1])
    assert float(model.part.weight) == 6.0


def test_steps_are_counted_not_batches(tmp_path):
    model = Scalar()
    model.keep_averages(0.5, warmup=False)
    model.accumulate_grad_batches = 2
    fit(model, 5, tmp_path)
    assert model.averages.updates == model.batches_seen == 3
    assert float(model.averages.weights["part.weight"]) == pytest.approx(averaged([1, 2, 3], 0.5, False)[-1])


def test_no_averages_before_the_first_step_nor_unless_asked_for(tmp_path):
    model = Scalar()
    fit(model, 2, tmp_path)
    assert model.averages is None and model.seen[0][0] == 2.0
    model = Scalar()
    model.keep_averages(0.9)
    before = float(model.part.weight)
    fit(model, 1, tmp_path, num_sanity_val_steps=1)
    assert model.seen[0][0] == pytest.approx(before)


class SaveAnywhere(Callback):
    """Save at moments at which callbacks may do so."""

    def __init__(self, folder):
        self.folder = folder

    def save(self, trainer, name):
        trainer.save_checkpoint(self.folder / f"{name}.ckpt")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.save(trainer, f"batch{batch_idx}")  # before the model's own hook

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.save(trainer, "validation")

    def on_validation_end(self, trainer, pl_module):
        self.save(trainer, "end")


def test_checkpoints_hold_both_whenever_they_are_written(tmp_path):
    model = Scalar()
    model.keep_averages(0.5, warmup=False)
    trainer = fit(model, 3, tmp_path, callbacks=[SaveAnywhere(tmp_path)])
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    want = averaged([1, 2, 3], 0.5, False)
    for name, step in (("batch0", 0), ("batch1", 1), ("validation", 2), ("end", 2), ("weights", 2)):
        content = read_checkpoint(tmp_path / f"{name}.ckpt")
        assert float(content["state_dict"]["part.weight"]) == step + 1, name
        kept = content["ema"]["weights"]
        assert float(kept["part.weight"]) == float(kept["tied.weight"]) == pytest.approx(want[step]), name
        assert content["ema"]["updates"] == step + 1 and "count" not in kept
    assert float(model.part.weight) == 3.0


@pytest.fixture(scope="module")
def vqgan(tmp_path_factory):
    """The YAML of a tiny VQGAN, and a run with averages that was never stopped."""
    folder = tmp_path_factory.mktemp("ema")
    yaml = write_vqgan(folder)
    return yaml, train(yaml, folder, "whole", "--max_steps", STEPS, *EMA)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stopped", "SIGTERM", "SIGTERM in validation"])
def test_a_resumed_run_has_the_same_averages_to_the_last_bit(vqgan, tmp_path, how):
    yaml, whole = vqgan
    if how == "stopped":
        part = train(yaml, tmp_path, "part", "--max_steps", 3, *EMA)
    else:
        when = {"at": 4} if how == "SIGTERM" else {"validation": 1}
        words = ["--max_steps", STEPS, *trouble(kind="SIGTERM", **when), *EMA]
        part = train(yaml, tmp_path, "part", *words, status=143)
        if how != "SIGTERM":  # the averages were in place of the weights, which are not the same
            content = last(part)
            key = "decoder.conv_out.weight"
            assert not torch.equal(content["state_dict"][key], content["ema"]["weights"][key])
    resume(part, "--max_steps", STEPS)
    one, other = last(whole), last(part)
    assert one["ema"]["updates"] == other["ema"]["updates"] == one["batches_seen"] == STEPS
    for kind in (lambda content: content["state_dict"], lambda content: content["ema"]["weights"]):
        assert all(torch.equal(kind(other)[key], value) for key, value in kind(one).items())
    ours, theirs = ([row for row in curves(run) if "val/rec_loss" in row] for run in (whole, part))
    assert ours[-1] == theirs[-1]  # of the averages


@pytest.mark.slow
def test_inference_uses_the_averages_and_can_do_without(vqgan, tmp_path):
    _, run = vqgan
    content = last(run)
    names = content["ema"]["weights"].keys()
    assert "quantize.embedding.weight" in names and not any(name.startswith("loss.") for name in names)
    ema, trained = load_model(run)[0], load_model(run, ema=False)[0]
    for model, wanted in ((ema, content["ema"]["weights"]), (trained, content["state_dict"])):
        assert all(torch.equal(model.state_dict()[name], wanted[name]) for name in names)
    assert content_hash(ema) != content_hash(trained)
    key = "loss.discriminator.main.0.weight"
    assert torch.equal(ema.state_dict()[key], content["state_dict"][key])  # is not averaged

    convert(run, tmp_path / "exported")
    convert(run, tmp_path / "trained.ckpt", ema=False)
    assert content_hash(load_model(tmp_path / "exported")[0]) == content_hash(ema)
    assert content_hash(load_model(tmp_path / "trained.ckpt")[0]) == content_hash(trained)
    extract(run, tmp_path / "decoder.ckpt", "decoder")
    got = read_checkpoint(tmp_path / "decoder.ckpt")["state_dict"]["conv_out.weight"]
    assert torch.equal(got, content["ema"]["weights"]["decoder.conv_out.weight"])

    words = content["config"]["model"]["params"]
    fresh = VQModel(**words, ckpt_path=str(run))
    assert content_hash(fresh) == content_hash(ema)
    start = VQModel(**words, ckpt_path=str(run), ignore_keys=["decoder."])
    assert torch.equal(start.encoder.conv_in.weight, ema.encoder.conv_in.weight)
    assert not torch.equal(start.decoder.conv_in.weight, ema.decoder.conv_in.weight)


@pytest.mark.slow
def test_the_second_stage_takes_the_averages_of_the_first_and_has_its_own(vqgan, tmp_path):
    yaml = write_transformer(tmp_path, vqgan[1])
    run = train(yaml, tmp_path, "prior", "--max_steps", 2, "model.ema_decay=0.5", "model.ema_warmup=false")
    content = last(run)
    names = content["ema"]["weights"].keys()
    assert names and all(name.startswith("transformer.") for name in names)
    first, key = last(vqgan[1])["ema"]["weights"], "encoder.conv_in.weight"
    assert torch.equal(content["state_dict"][f"first_stage_model.{key}"], first[key])
    model = load_model(run)[0]
    assert torch.equal(model.transformer.head.weight, content["ema"]["weights"]["transformer.head.weight"])
    assert content_hash(model.first_stage_model) == content_hash(load_model(vqgan[1])[0])


def test_a_model_in_memory_is_saved_with_its_averages(tmp_path):
    small = dict(double_z=False, z_channels=8, resolution=16, in_channels=3, out_ch=3, ch=8, ch_mult=[1, 1],
                 num_res_blocks=1, attn_resolutions=[], num_groups=4)
    model = VQModel(small, {"target": "taming.modules.losses.DummyLoss"}, 8, 4)
    model.keep_averages(0.5, warmup=False)
    with torch.no_grad():
        for step in (1, 2):
            model.decoder.conv_out.bias.fill_(step)
            model.batches_seen = step
            model.update_averages()
            model.update_averages()  # once a step, however often it is asked for
    VQModel.from_pretrained(model.save_pretrained(tmp_path / "model"))
    loaded = VQModel.from_pretrained(tmp_path / "model")
    assert loaded.decoder.conv_out.bias.tolist() == [1.5] * 3
    assert model.decoder.conv_out.bias.tolist() == [2.0] * 3


def test_averages_that_do_not_belong_to_the_weights_are_an_error(tmp_path):
    content = {"state_dict": {"weight": torch.ones(2)}, "ema": {"weights": {"weight": torch.ones(3)}}}
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="averages in the checkpoint do not belong to its weights: 'weight'"):
        load_model(tmp_path / "x.ckpt", config={"model": {"target": "taming.models.vqgan.VQModel"}})
    kept = {"updates": 1, "weights": {"weight": torch.ones(2), "other": torch.ones(1)}}
    with pytest.raises(ValueError, match="other parts or shapes: other.*model.ema_decay=null"):
        WeightAverages(0.5).load_state_dict(kept, {"weight": torch.ones(2)})


def test_what_is_switched_on_or_off_in_between(caplog):
    model = Scalar()
    model.on_load_checkpoint({"batches_seen": 5})
    model.keep_averages(0.5)
    model.batches_seen = 6
    model.update_averages()
    assert model.averages.updates == 1
    content = {"state_dict": {}}
    model.on_save_checkpoint(content)
    model.keep_averages(None)
    model.on_load_checkpoint(content)
    assert "averages of weights are left out: set model.ema_decay" in caplog.text


@pytest.mark.parametrize(("word", "message"), [
    ("model.ema_decay=1.0", "ema_decay: 1.0 must be a number from 0 to below 1"),
    ("model.ema_decay=-0.1", "ema_decay: -0.1 must be a number from 0 to below 1"),
    ("model.ema_decay=high", "ema_decay: 'high' must be a number from 0 to below 1"),
    ("model.ema_warmup=false", "model.ema_warmup is there, but not model.ema_decay"),
    ("model.params.ema_decay=0.9", "the key model.params.ema_decay (did you mean model.ema_decay"),
    ("model.ema_decy=0.9", "nothing reads the key model.ema_decy (did you mean model.ema_decay"),
    ("data.ema_decay=0.9", "nothing reads the key data.ema_decay"),
])
def test_bad_settings(tmp_path, capfd, word, message):
    assert main(["-b", str(write_vqgan(tmp_path)), "-l", str(tmp_path), "--dry-run", word]) == 1
    assert message in capfd.readouterr().err


def test_transgan_has_its_own():
    with pytest.raises(ValueError, match="set model.params.ema_decay instead"):
        TransGAN.keep_averages(TransGAN.__new__(TransGAN), 0.9)


@pytest.mark.slow
def test_all_processes_keep_the_same_averages(tmp_path):
    words = ["-b", write_vqgan(tmp_path), "-t", "-l", tmp_path / "logs", "--max_steps", 3, *EMA]
    words += ["data.params.batch_size=1", "lightning.callbacks.record.target=tests.tiny.Record"]
    main_on_ranks(2, *words, f"lightning.callbacks.record.params.folder={tmp_path}")
    first, second = (torch.load(tmp_path / f"averages_2_{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(first[key], value) for key, value in second.items())
    run = next((tmp_path / "logs").glob("*_vqgan"))
    assert all(torch.equal(first[key], value) for key, value in last(run)["ema"]["weights"].items())
    weights = torch.load(tmp_path / "weights_2_1.pt", weights_only=True)
    assert not torch.equal(first["decoder.conv_out.bias"], weights["decoder.conv_out.bias"])
