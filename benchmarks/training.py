"""How fast both stages train, beside the steps of 2021 and the machine's floor."""

import argparse
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks import training_2021 as old
from benchmarks.parts import F16, GPTS, NO_LOSS, ROOT, Row, Runs, compare, pick, row
from benchmarks.sampling import sizes
from taming.config import instantiate_from_config, load_config
from taming.models.cond_transformer import Net2NetTransformer
from taming.models.vqgan import VQModel
from taming.modules.losses.lpips import LPIPS

RATE = 4.5e-6
NEVER = 10**9  # batches
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


def build_vqgan(options: argparse.Namespace, with_loss: bool = True, codes: int = 1024) -> VQModel:
    """Build the f = 16 VQGAN of `imagenet_vqgan`, with LPIPS over random features, or a small one."""
    torch.manual_seed(0)
    ch = pick(options, "ch", 128, 32)
    ddconfig = {**F16, "ch": ch, "z_channels": 2 * ch, "resolution": pick(options, "pixels", 256, 64)}
    loss = {
        "target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
        "params": {"disc_start": 0, "disc_weight": 0.8},
    }
    model = VQModel(ddconfig, loss if with_loss else NO_LOSS, codes, 2 * ch, legacy=True)
    if with_loss:
        model.loss.perceptual_loss = LPIPS(random_trunk=True)
    model.learning_rate = RATE
    return model.to(options.device)


def build_transformer(options: argparse.Namespace, size: str) -> Net2NetTransformer:
    """Build an unconditional transformer over the VQGAN."""
    layers, heads, channels = GPTS[size]
    ch, pixels = pick(options, "ch", 128, 32), pick(options, "pixels", 256, 64)
    stage = {"ddconfig": {**F16, "ch": ch, "z_channels": 2 * ch, "resolution": pixels}, "n_embed": 1024,
             "embed_dim": 2 * ch, "lossconfig": NO_LOSS}
    tokens = options.tokens or (pixels // 16) ** 2
    gpt = {"vocab_size": 1024, "block_size": tokens, "n_layer": layers, "n_head": heads, "n_embd": channels}
    torch.manual_seed(0)
    model = Net2NetTransformer(
        {"target": "taming.modules.transformer.mingpt.GPT", "params": gpt},
        {"target": "taming.models.vqgan.VQModel", "params": stage}, "__is_unconditional__",
    )
    model.learning_rate = RATE
    return model.to(options.device).train()


class Stepper:
    """Takes training steps of a model of ours, by its own `training_step`, without a Trainer's loops.

    What the step asks of the trainer is here: optimizers, backward, and the hooks before each optimizer's
    step. Logged values are dropped.

    Args:
        model: on its device, with a learning rate.
    """

    def __init__(self, model: Any):
        self.model, self.batches = model, 0
        made = model.configure_optimizers()
        self.optimizers: Sequence[torch.optim.Optimizer] = made[0] if isinstance(made, tuple) else [made]
        for optimizer in self.optimizers:
            optimizer.register_step_pre_hook(lambda each, *_: model.on_before_optimizer_step(each))

    def __call__(self, batch: dict[str, Tensor], dtype: torch.dtype | None = None) -> None:
        """Take one step, with autocast to `dtype` unless it is None."""
        model = self.model
        # read at each call, since several of these may share a model
        model._trainer = SimpleNamespace(
            world_size=1, is_last_batch=False, global_step=self.batches,
            precision_plugin=SimpleNamespace(scaler=None),
            strategy=SimpleNamespace(reduce_boolean_decision=lambda flag, all: flag),
        )
        several = len(self.optimizers) > 1
        model.optimizers = lambda: self.optimizers if several else self.optimizers[0]
        model.manual_backward = lambda loss: loss.backward()
        model.log = model.log_dict = lambda *_, **__: None
        model._watched = {}
        device = next(model.parameters()).device.type
        with torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None):
            model.training_step(batch, self.batches)
        self.batches += 1


def compile_parts(options: argparse.Namespace, *parts: nn.Module) -> None:
    """Compile modules in place if asked; the names of their weights stay."""
    if options.compile:
        for part in parts:
            part.compile()


# ---- the parts


def autoencoder(options: argparse.Namespace) -> list[Row]:
    """Images to codes and back through the f = 16 VQGAN: forward and backward, encoding, decoding."""
    batch, side = pick(options, "batch", 2, 1), pick(options, "pixels", 256, 64)
    model = build_vqgan(options, with_loss=False).train()
    compile_parts(options, model.encoder, model.decoder)
    images = torch.rand(batch, side, side, 3, device=options.device) * 2 - 1
    x = images.permute(0, 3, 1, 2)  # channels-last memory, as in training

    def learn(dtype: torch.dtype | None) -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(options.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            rec, loss = model(x)
            (rec.float().square().mean() + loss).backward()

    def learn_2021() -> None:
        model.zero_grad(set_to_none=True)
        z_q, loss, _ = old.quantize(model, old.encode(model, x.contiguous()))
        (old.decode(model, z_q).square().mean() + loss).backward()

    ways: dict[str, Callable[[], object]] = {"2021 float32": learn_2021}
    ways |= {name: partial(learn, dtype) for name, dtype in PRECISIONS.items()}
    what = f"forward and backward, {side} pixels, batch {batch}"
    rows = compare(options, ways, what=what, unit="images", amount=batch, against="2021 float32")
    model.eval().zero_grad(set_to_none=True)
    codes = torch.zeros(batch, side // 16, side // 16, dtype=torch.int64, device=options.device)
    with torch.no_grad():
        ways = {"encode": partial(model.encode, x), "decode": partial(model.decode_code, codes)}
        what = f"{side} pixels, batch {batch}, float32"
        return rows + compare(options, ways, what=what, unit="images", amount=batch)


def stage1(options: argparse.Namespace) -> list[Row]:
    """A step of the VQGAN with LPIPS, before and after the discriminator begins."""
    on_gpu = options.device.type == "cuda"
    batch, side = pick(options, "batch", 32 if on_gpu else 2, 1), pick(options, "pixels", 256, 64)
    model = build_vqgan(options).train()
    batch_of_images = {"image": torch.rand(batch, side, side, 3, device=options.device) * 2 - 1}
    step_2021 = old.Stage1Step(model, RATE)
    stepper = Stepper(model)
    compile_parts(options, model.encoder, model.decoder, model.loss.discriminator)

    def learn(dtype: torch.dtype | None, start: int) -> None:
        model.loss.discriminator_iter_start = model.loss.gen_start = start
        stepper(batch_of_images, dtype)

    rows: list[Row] = []
    for name, factor, start in (("before the discriminator", 0.0, NEVER), ("discriminator on", 1.0, 0)):
        ways: dict[str, Callable[[], object]] = {
            "2021 float32": partial(step_2021, batch_of_images["image"], factor),
        }
        ways |= {each: partial(learn, dtype, start) for each, dtype in PRECISIONS.items()}
        what = f"{name}, {side} pixels, batch {batch}"
        rows += compare(options, ways, what=what, unit="images", amount=batch, against="2021 float32")
    return rows


def stage2(options: argparse.Namespace) -> list[Row]:
    """A step of the transformer over 256 codes: from images, and from cached codes."""
    on_gpu = options.device.type == "cuda"
    batch, side = pick(options, "batch", 32 if on_gpu else 4, 2), pick(options, "pixels", 256, 64)
    rows: list[Row] = []
    for size in sizes(options):
        model = build_transformer(options, size)
        compile_parts(options, *model.transformer.blocks)
        images = {"image": torch.rand(batch, side, side, 3, device=options.device) * 2 - 1}
        codes = {"codes": torch.randint(1024, (batch, side // 16, side // 16), device=options.device)}
        ways: dict[str, Callable[[], object]] = {}
        if not on_gpu or size != "1.4B":  # whose memory is for one set of moments
            ways["2021 float32, images"] = partial(old.Stage2Step(model, RATE), images["image"])
        stepper = Stepper(model)
        for source, given in (("images", images), ("codes", codes)):
            for name, dtype in PRECISIONS.items():

                ways[f"{name}, {source}"] = partial(stepper, given, dtype)
        tokens = codes["codes"][0].numel()
        rows += compare(
            options, ways, what=f"{size}, {tokens} tokens, batch {batch}", unit="tokens",
            amount=batch * tokens, against=next(iter(ways)),
        )
        del model, stepper, ways
    return rows


class Stopwatch(pl.Callback):
    """Seconds of each training batch, without the loading of its data."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def demo(options: argparse.Namespace) -> list[Row]:
    """A step of each stage at the sizes of `make demo`, by Lightning's trainer, discriminator on."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # advice for real trainings
    rows = []
    first = load_config(ROOT / "configs/demo/vqgan.yaml")
    second = load_config(ROOT / "configs/demo/transformer.yaml")
    stage = {"target": first.model.target, "params": {**first.model.params, "lossconfig": NO_LOSS}}
    second.model.params.first_stage_config = stage
    for name, config in (("stage 1", first), ("stage 2", second)):
        model = instantiate_from_config(config.model)
        model.learning_rate, model.batches_seen = 1e-4, 10**6  # the discriminator began before that
        data, steps = config.data.params, (2 if options.quick else 3 * options.repeats) + 2
        size = data.batch_size
        data.train.params.update(length=size * steps, cache=False)
        watch = Stopwatch()
        trainer = pl.Trainer(
            accelerator="gpu" if options.device.type == "cuda" else "cpu", devices=1, max_epochs=1,
            precision=config.lightning.trainer.precision, callbacks=[watch], logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )
        trainer.fit(model, DataLoader(instantiate_from_config(data.train), size))
        runs = Runs(watch.seconds[2:])
        what = f"{name} step of the demo, {data.train.params.size} pixels, batch {size}, {trainer.precision}"
        rows.append(row(what, runs, images_per_s=size / runs.median))
    return rows


PARTS = {"autoencoder": autoencoder, "stage1": stage1, "stage2": stage2, "demo": demo}
