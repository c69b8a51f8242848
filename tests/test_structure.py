"""What steps do, counted and not timed: kernels, waits for the device, operations, bytes.

The counts of toy steps are committed in tests/structure.json. Where a change is meant, renew them by

    python -m tests.test_structure

and say why in the commit. Kernels and bytes may exceed the committed counts by 3 % (torch versions differ in
what they fuse), operations by none. Waits are counted on the device "meta", where the model takes the path of
an accelerator, and none is allowed.
"""

import contextlib
import functools
import json
import sys
from pathlib import Path

import pytest
import torch
from pytorch_lightning.callbacks import Callback

from benchmarks.counting import Counter, gpt_step_flops
from benchmarks.training import Stepper
from taming.checkpoint import load_model
from taming.models.cond_transformer import Net2NetTransformer
from taming.models.vqgan import VQModel
from taming.modules.losses.lpips import LPIPS
from taming.modules.transformer.mingpt import GPT
from tests import tiny

COUNTS = Path(__file__).with_name("structure.json")
TOLERANCE = 1.03  # of kernels and bytes
SIDE, BATCH, CHANNELS, LAYERS, VOCAB = 32, 2, 32, 2, 64
DDCONFIG = {
    "double_z": False, "z_channels": 32, "resolution": SIDE, "in_channels": 3, "out_ch": 3, "ch": 32,
    "ch_mult": [1, 1, 2], "num_res_blocks": 1, "attn_resolutions": [16], "dropout": 0.0,
}
TOKENS = (SIDE // 4) ** 2
GPT_CONFIG = {
    "vocab_size": VOCAB, "block_size": TOKENS, "n_layer": LAYERS, "n_head": 2, "n_embd": CHANNELS,
}


def vqgan(device, disc_start, model=VQModel, **settings):
    """Build a small VQGAN with everything that a step of the paper has; LPIPS is over random features."""
    loss = {
        "target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
        "params": {"disc_start": disc_start, "disc_num_layers": 2, "disc_ndf": 16},
    }
    built = model(DDCONFIG, loss, VOCAB, 32, **settings)
    built.loss.perceptual_loss = LPIPS(random_trunk=True)
    built.learning_rate, built.gradient_clip_val = 1e-4, 1.0
    return built.train().to(device)


def transformer(device):
    """Build a small unconditional transformer over a VQGAN."""
    stage = {"ddconfig": DDCONFIG, "n_embed": VOCAB, "embed_dim": 32,
             "lossconfig": {"target": "taming.modules.losses.DummyLoss"}}
    model = Net2NetTransformer(
        {"target": "taming.modules.transformer.mingpt.GPT", "params": GPT_CONFIG},
        {"target": "taming.models.vqgan.VQModel", "params": stage}, "__is_unconditional__",
    )
    model.learning_rate, model.gradient_clip_val = 1e-4, 1.0
    return model.train().to(device)


def images(device):
    return {"image": torch.rand(BATCH, SIDE, SIDE, 3, device=device) * 2 - 1}


def cached(device):
    return {"codes": torch.zeros(BATCH, SIDE // 4, SIDE // 4, dtype=torch.int64, device=device)}


def stage1_before(device):
    return Stepper(vqgan(device, disc_start=1000)), images(device)


def stage1_on(device):
    return Stepper(vqgan(device, disc_start=0)), images(device)


def stage1_revived(device):
    return Stepper(vqgan(device, disc_start=0, revive_after=2)), images(device)


def stage2_images(device):
    return Stepper(transformer(device)), images(device)


def stage2_codes(device):
    return Stepper(transformer(device)), cached(device)


def decode_token(device):
    gpt = GPT(**GPT_CONFIG).eval().to(device)
    cache = gpt.new_cache(BATCH, TOKENS)
    prefix = torch.zeros(BATCH, 1, dtype=torch.int64, device=device)
    return torch.no_grad()(lambda tokens: gpt.extend(tokens, cache)), prefix


STEPS = {
    step.__name__: step
    for step in (stage1_before, stage1_on, stage1_revived, stage2_images, stage2_codes, decode_token)
}


@functools.cache
def count(name, device="cpu"):
    """Count the second step of a kind; the first makes what stays, such as the moments of the optimizer."""
    torch.manual_seed(0)
    step, batch = STEPS[name](device)
    step(batch)
    with Counter() as counter:
        step(batch)
    return counter


def counts(counter):
    return {
        "kernels": sum(counter.operators.values()), "flops": counter.total_flops,
        "peak_bytes": counter.peak_bytes,
    }


@pytest.fixture(scope="module")
def committed():
    return json.loads(COUNTS.read_text())


@pytest.mark.parametrize("name", STEPS)
def test_a_step_does_no_more_than_is_committed(name, committed):
    found, allowed = counts(count(name)), committed[name]
    assert found["flops"] <= allowed["flops"]
    assert found["kernels"] <= TOLERANCE * allowed["kernels"]
    assert found["peak_bytes"] <= TOLERANCE * allowed["peak_bytes"]


@pytest.mark.parametrize("name", STEPS)
def test_the_committed_counts_are_current(name, committed):
    """A step that does much less should lower the bound, else a later loss would pass."""
    found, allowed = counts(count(name)), committed[name]
    for key, value in allowed.items():
        assert value <= 1.1 * found[key], key


@pytest.fixture
def meta(monkeypatch):
    """Let "meta" pass for an accelerator: autocast is off, and the optimizer's one kernel is left out."""
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "adam", lambda *_, **__: None)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    return "meta"


@pytest.mark.parametrize("name", STEPS)
def test_nothing_in_a_step_waits_for_the_device(name, meta):
    """On "meta" there are no values: a step that asks for one fails, besides being counted."""
    counter = count(name, meta)
    assert not counter.waits
    assert counter.operators


@pytest.mark.gpu
@pytest.mark.parametrize("name", STEPS)
def test_nothing_in_a_step_waits_for_a_gpu(name):
    step, batch = STEPS[name]("cuda")
    step(batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class CountBatch(Callback):
    """Count from the start of the fourth batch to that of the fifth; the last callback of all."""

    waits = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        number = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        if number == 4:
            self.counter = Counter().__enter__()
        elif number == 5:
            self.counter.__exit__(None, None, None)
            CountBatch.waits = dict(self.counter.waits)


def test_the_trainer_and_its_callbacks_add_no_wait(tmp_path):
    """In a batch that is not logged: what waits on a CPU are the model's own checks, and nothing else."""
    words = ["lightning.callbacks.count.target=tests.test_structure.CountBatch",
             "data.params.train.params.length=12",
             "lightning.callbacks.last_checkpoint.params.every_n_batches=1000",
             "lightning.callbacks.image_logger.params.batch_frequency=1000"]
    run = tiny.train(tiny.write_vqgan(tmp_path), tmp_path, "counted", "--allow", "tests", "--max_steps", 6,
                     "--log_every_n_steps", 100, "--gradient_clip_val", 1.0, *words)
    model = load_model(run / "checkpoints" / "last.ckpt")[0].train()
    model.learning_rate, model.gradient_clip_val, model.batches_seen = 1e-4, 1.0, 10
    step, batch = Stepper(model), images("cpu")
    step(batch)
    with Counter() as counter:
        step(batch)
    assert CountBatch.waits == dict(counter.waits)


class ReadsItsLoss(VQModel):
    """A VQGAN with the fault that the tests above look for."""

    def check_finite(self, losses, batch_idx):
        super().check_finite(losses, batch_idx)
        losses["train/rec_loss"].item()


def test_an_item_in_a_step_is_found():
    step, batch = Stepper(vqgan("cpu", 0, model=ReadsItsLoss)), images("cpu")
    before = count("stage1_on").waits
    step(batch)
    with Counter() as counter:
        step(batch)
    assert counter.waits["_local_scalar_dense"] == before["_local_scalar_dense"] + 1


def test_an_item_in_a_step_fails_without_values(meta):
    with pytest.raises(RuntimeError, match="meta"):
        Stepper(vqgan("meta", 0, model=ReadsItsLoss))(images("meta"))


@pytest.mark.parametrize("wait", [
    lambda x: x.sum().item(), lambda x: bool((x > 0).any()), lambda x: x[x > 0], lambda x: x.nonzero(),
    lambda x: x.unique(), lambda x: x.masked_select(x > 0), lambda x: torch.equal(x, x + 1),
    lambda x: x.repeat_interleave(torch.ones(len(x), dtype=torch.int64)), lambda x: float(x[0]),
])
def test_waits_are_counted(wait):
    x = torch.rand(5)
    with Counter() as counter:
        wait(x)
    assert sum(counter.waits.values()) >= 1


def test_a_copy_to_the_cpu_waits_unless_told_otherwise():
    x = torch.rand(5, device="meta")
    target = torch.rand(5)
    for copy in (lambda: x.cpu(), lambda: target.copy_(x)):
        with Counter() as counter, pytest.raises((NotImplementedError, RuntimeError)):
            copy()
        assert sum(counter.waits.values()) == 1


def test_bytes_are_counted_while_they_are_alive():
    def work():
        a = torch.zeros(1000)  # 4,000 bytes, which a view does not double
        a.view(10, 100)
        b = a + 1
        del a
        c = b.double()  # 8,000 more than the 4,000 of b
        del b
        return c * 2  # 16,000 in all

    with Counter() as counter:
        result = work()
    assert counter.peak_bytes == 16_000
    assert counter.operators == {"zeros": 1, "add": 1, "_to_copy": 1, "mul": 1}
    del result


def test_memory_that_was_there_before_does_not_count():
    x = torch.zeros(1000)
    with Counter() as counter:
        x.add_(1)
        x.view(10, 100).sum()
    assert counter.peak_bytes < 100


def test_the_transformer_does_what_the_formula_says():
    counter = count("stage2_codes")
    expected = gpt_step_flops(LAYERS, CHANNELS, VOCAB, TOKENS, BATCH)
    assert counter.total_flops == pytest.approx(expected, rel=0.02)


def test_the_autoencoder_does_three_times_its_forward_pass():
    """One forward pass of each network, of LPIPS and D two or three; backward passes cost two, LPIPS one."""
    model, batch = vqgan("cpu", disc_start=0), images("cpu")
    x = batch["image"].permute(0, 3, 1, 2)

    def flops(function):
        with torch.no_grad(), Counter() as counter:
            function()
        return counter.total_flops

    autoencoder = flops(lambda: model.decode(model.encode(x)[0]))
    lpips = flops(lambda: model.loss.perceptual_loss(x, x))  # of both images
    discriminator = flops(lambda: model.loss.discriminator(x))
    # D: forward of three, backward to the input for the generator, to weights for two; the adaptive weight
    # goes back through LPIPS and D once more, and through the decoder's last layer
    expected = 3 * autoencoder + lpips + 2 * lpips / 2 + (3 + 2 + 4) * discriminator
    assert count("stage1_on").total_flops == pytest.approx(expected, rel=0.1)


def test_a_large_step_is_counted_without_computing_it():
    """1.4 billion weights, batch 16: 6 operations a weight and token, and the attention."""
    gpt = GPT(16384, 256, n_layer=48, n_head=24, n_embd=1536).to("meta")
    codes = torch.zeros(16, 256, dtype=torch.int64, device="meta")
    with Counter() as counter:
        gpt(codes, targets=codes)[1].backward()
    assert counter.total_flops == pytest.approx(gpt_step_flops(48, 1536, 16384, 256, 16), rel=0.02)
    assert counter.peak_bytes > 4 * sum(p.numel() for p in gpt.parameters())  # the gradients


if __name__ == "__main__":
    torch.set_num_threads(1)
    COUNTS.write_text(json.dumps({name: counts(count(name)) for name in STEPS}, indent=1) + "\n")
    sys.exit(print(f"written to {COUNTS.name}"))
