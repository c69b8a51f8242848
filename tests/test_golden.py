"""Both stages against the values of an independent implementation: forward, gradients, steps of training.

Each file holds a state dict (state/), inputs (in/) and outputs (out/), all float32, computed on a CPU.
"""

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from taming.models.cond_transformer import Net2NetTransformer
from taming.models.vqgan import GumbelVQ, VQModel
from taming.modules.losses.segmentation import BCELoss, BCELossWithQuant
from taming.modules.losses.vqperceptual import VQLPIPSWithDiscriminator, hinge_d_loss, vanilla_d_loss
from taming.modules.transformer.mingpt import GPT, sample_with_past
from taming.modules.vqvae.quantize import VectorQuantizer2
from taming.sampling import sample_tokens

GOLDEN = Path(__file__).parent / "golden"
DDCONFIG = dict(
    double_z=False, z_channels=16, resolution=32, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 2, 2],
    num_res_blocks=1, attn_resolutions=[8], dropout=0.0,
)
DUMMY = {"target": "taming.modules.losses.DummyLoss"}
STAGE = dict(ddconfig=DDCONFIG, lossconfig=DUMMY, n_embed=48, embed_dim=8)
GPT_ARGS = dict(vocab_size=40, block_size=24, n_layer=3, n_head=4, n_embd=32)
NET2NET = dict(
    transformer_config={
        "target": "taming.modules.transformer.mingpt.GPT",
        "params": dict(vocab_size=48, block_size=130, n_layer=2, n_head=2, n_embd=16),
    },
    first_stage_config={"target": "taming.models.vqgan.VQModel", "params": STAGE},
)
COORD = {"target": "taming.modules.misc.coord.CoordStage", "params": dict(n_embed=48, down_factor=4)}
ZCURVE = {"target": "taming.modules.transformer.permuter.ZCurve", "params": dict(H=8, W=8)}


def read(name):
    """Split a case into (state, inputs, outputs)."""
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    return tuple(
        {k.removeprefix(part): v for k, v in tensors.items() if k.startswith(part)}
        for part in ("state/", "in/", "out/")
    )


def close(got, want):
    torch.testing.assert_close(torch.as_tensor(got).detach(), want, rtol=2e-4, atol=2e-4)


def net2net(name, **arguments):
    """A model with the weights of the case `name`, and the first stage of the case vqmodel: all of them."""
    model = Net2NetTransformer(**NET2NET, **arguments)
    first = {f"first_stage_model.{k}": v for k, v in read("vqmodel")[0].items()}
    model.load_state_dict({**read(name)[0], **first})
    return model


def fit(model, batches):
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(model.train(), DataLoader(batches, batch_size=None))


def assert_moved_alike(start, got, want):
    """Compare how far training moved a tensor with how far it should have."""
    assert (got - want).norm() < 0.02 * (want - start).norm()


@torch.no_grad()
def test_vqmodel():
    state, given, want = read("vqmodel")
    model = VQModel(**STAGE).eval()
    model.load_state_dict(state)
    close(model.quant_conv(model.encoder(given["x"])), want["prequant"])
    quant, loss, (_, _, indices) = model.encode(given["x"])
    assert torch.equal(indices, want["indices"])
    close(quant, want["quant"])
    close(loss, want["emb_loss"])
    close(model.decode(quant), want["decoded"])
    close(model.quantize.get_codebook_entry(indices, shape=(2, 8, 8, 8)), want["codebook_entry"])
    reconstruction, diff = model(given["x"])
    close(reconstruction, want["forward_rec"])
    close(diff, want["forward_diff"])
    close(model.decode_code(indices.view(2, 8, 8)), want["decoded"])


@pytest.mark.parametrize("legacy", [True, False])
def test_vector_quantizer(legacy):
    state, given, want = read(f"vector_quantizer_legacy_{str(legacy).lower()}")
    quantizer = VectorQuantizer2(20, 8, beta=0.25, legacy=legacy, sane_index_shape=True)
    quantizer.load_state_dict(state)
    z = given["z"].requires_grad_()
    z_q, loss, (_, _, indices) = quantizer(z)
    (loss + z_q.square().mean()).backward()
    assert torch.equal(indices, want["indices"])
    close(z_q, want["z_q"])
    close(loss, want["loss"])
    torch.testing.assert_close(z.grad, want["grad_z"])
    torch.testing.assert_close(quantizer.embedding.weight.grad, want["grad_embedding"])


@torch.no_grad()
@pytest.mark.parametrize(("name", "n_unmasked"), [("gpt", 0), ("gpt_unmasked", 5)])
def test_gpt(name, n_unmasked):
    state, given, want = read(name)
    gpt = GPT(**GPT_ARGS, n_unmasked=n_unmasked).eval()
    gpt.load_state_dict(state)
    logits, loss = gpt(given["idx"], targets=given["targets"])
    close(logits, want["logits"])
    close(loss, want["loss"])
    close(gpt(given["idx"], embeddings=given["embeddings"])[0], want["logits_with_embeddings"])


def test_gpt_greedy():
    state, given, want = read("gpt_greedy")
    gpt = GPT(**GPT_ARGS).eval()
    gpt.load_state_dict(state)
    assert torch.equal(sample_tokens(gpt, given["start"], 20, greedy=True), want["greedy"])
    assert torch.equal(sample_with_past(given["start"], gpt, 20, sample_logits=False), want["greedy"])


@torch.no_grad()
def test_net2net_coord():
    _, given, want = read("net2net_coord")
    model = net2net("net2net_coord", cond_stage_config=COORD, cond_stage_key="coord").eval()
    logits, target = model(given["x"], given["c"])
    quant, codes = model.encode_to_z(given["x"])
    _, condition = model.encode_to_c(given["c"])
    assert torch.equal(codes, want["z_indices"]) and torch.equal(target, want["target"])
    assert torch.equal(condition, want["c_indices"])
    close(logits, want["logits"])
    close(F.cross_entropy(logits.flatten(0, 1), target.flatten()), want["loss"])
    close(model.decode_to_img(codes, quant.shape), want["decoded"])
    assert torch.equal(model.sample(codes[:, :10], condition, steps=6), want["greedy_6_after_10"])


@torch.no_grad()
def test_net2net_unconditional_in_z_order():
    _, given, want = read("net2net_unconditional")
    unconditional = dict(cond_stage_config="__is_unconditional__", cond_stage_key="image", sos_token=3)
    model = net2net("net2net_unconditional", **unconditional, permuter_config=ZCURVE).eval()
    logits, target = model(given["x"], given["x"])
    quant, codes = model.encode_to_z(given["x"])
    assert torch.equal(codes, want["z_indices"]) and torch.equal(target, want["target"])
    close(logits, want["logits"])
    close(model.decode_to_img(codes, quant.shape), want["decoded"])


def test_gan_losses():
    _, given, want = read("gan_losses")
    close(hinge_d_loss(given["logits_real"], given["logits_fake"]), want["hinge"])
    close(vanilla_d_loss(given["logits_real"], given["logits_fake"]), want["vanilla"])


@pytest.mark.parametrize("start", [0, 100])
def test_vqgan_loss(start):
    state, given, want = read(f"vqloss_start{start}_step10")
    loss = VQLPIPSWithDiscriminator(
        disc_start=start, disc_num_layers=2, disc_weight=0.8, perceptual_weight=0.0, disc_ndf=8
    ).eval()
    part = {k.removeprefix("discriminator."): v for k, v in state.items() if k.startswith("discriminator.")}
    loss.discriminator.load_state_dict(part)
    last = torch.nn.Conv2d(4, 3, 3, padding=1)
    last.load_state_dict({k.removeprefix("last."): v for k, v in state.items() if k.startswith("last.")})
    rec = last(given["features"])
    arguments = given["codebook_loss"], given["target"], rec
    generator, log = loss(*arguments, 0, 10, last_layer=last.weight)
    generator.backward()
    discriminator, discriminator_log = loss(*arguments, 1, 10, last_layer=last.weight)
    close(generator, want["generator_loss"])
    close(discriminator, want["discriminator_loss"])
    torch.testing.assert_close(last.weight.grad, want["grad_last_weight"])
    log |= discriminator_log
    names = {k.removeprefix("log.") for k in want if k.startswith("log.")}
    unused = {f"train/{name}" for name in ("d_weight", "g_loss", "logits_real", "logits_fake", "disc_loss")}
    assert set(log) == (names if start == 0 else names - unused)
    for name, value in log.items():
        close(torch.as_tensor(value).reshape(()), want[f"log.{name}"].reshape(()))


def test_training_a_vqmodel_three_steps():
    state, given, want = read("train_vqmodel_3_steps")
    params = dict(disc_start=1000, disc_num_layers=2, disc_weight=0.8, perceptual_weight=0.0, disc_ndf=8)
    loss = {"target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator", "params": params}
    model = VQModel(**{**STAGE, "lossconfig": loss})
    model.load_state_dict({**read("vqmodel")[0], **state})
    start = {k: v.clone() for k, v in model.state_dict().items()}
    model.learning_rate = 1e-3
    fit(model, [{"image": x} for x in given["batches_bhwc"]])
    for key in ("decoder.conv_out.weight", "quantize.embedding.weight", "encoder.conv_in.weight"):
        assert_moved_alike(start[key], model.state_dict()[key], want[f"final.{key}"])
    untouched = "loss.discriminator.main.0.weight"
    assert torch.equal(model.state_dict()[untouched], start[untouched])


def test_training_a_transformer_three_steps():
    _, given, want = read("train_transformer_3_steps")
    model = net2net("net2net_coord", cond_stage_config=COORD, cond_stage_key="coord")
    start = {k: v.clone() for k, v in model.state_dict().items()}
    model.learning_rate = 1e-3
    pairs = zip(given["batches_bhwc"], given["coord_bhwc"], strict=True)
    fit(model, [{"image": x, "coord": c} for x, c in pairs])
    final = [k.removeprefix("final.") for k in want if k.startswith("final.")]
    assert len(final) == 5
    for key in final:
        name = f"transformer.{key}"
        assert_moved_alike(start[name], model.state_dict()[name], want[f"final.{key}"])
    for key, value in model.first_stage_model.state_dict().items():
        assert torch.equal(value, start[f"first_stage_model.{key}"])


def test_gumbel_model():
    state, inputs, want = read("gumbelvq")
    arguments = {**STAGE, "n_embed": 24, "embed_dim": 16, "kl_weight": 0.01}
    cosine = dict(warm_up_steps=0, max_decay_steps=1000, lr_start=0.9, lr_max=0.9, lr_min=0.01)
    schedule = {"target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler", "params": cosine}
    model = GumbelVQ(**arguments, temperature_scheduler_config=schedule).eval()
    model.load_state_dict(state)
    prequant = model.encode_to_prequant(inputs["x"])
    close(prequant, want["prequant"])
    close(model.quantize.proj(prequant), want["logits"])
    _, kl, (_, _, indices) = model.encode(inputs["x"])
    close(kl, want["kl_loss"])
    assert torch.equal(indices, want["argmax_indices"])
    close(model.decode_code(indices), want["decoded"])


def test_segmentation_losses():
    _, inputs, want = read("segmentation_loss")
    loss = BCELossWithQuant(codebook_weight=0.7)
    value, log = loss(torch.tensor(0.2), inputs["target"], inputs["prediction"], "train")
    close(value, want["loss"])
    assert {f"log.{key}" for key in log} == {key for key in want if key.startswith("log.")}
    for key, found in log.items():
        close(found, want[f"log.{key}"])
    close(BCELoss()(inputs["prediction"], inputs["target"])[0], want["log.train/bce_loss"])
