"""Parts that are not trained: codes that stay, a decoder that is tuned, and what is not possible."""

import copy

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from taming.checkpoint import read_checkpoint
from taming.checkpoint.content_hash import content_hash
from taming.models.autoencoder_kl import AutoencoderKL
from taming.models.cond_transformer import Net2NetTransformer
from taming.models.vqgan import EMAVQ, VQModel
from taming.training.callbacks import Health
from taming.training.command import main
from tests.ranks import main_on_ranks
from tests.tiny import resume, train, write_vqgan

SMALL = dict(
    double_z=False, z_channels=8, resolution=16, in_channels=3, out_ch=3, ch=8, ch_mult=[1, 1],
    num_res_blocks=1, attn_resolutions=[], num_groups=4, dropout=0.2,
)
LOSS = {
    "target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
    "params": dict(perceptual_weight=0.0, disc_start=0, disc_num_layers=1, disc_ndf=8),
}
FREEZE = "model.freeze=[encoder,quantize]"


def fit(model, steps=3, **arguments):
    model.learning_rate = 1e-2
    data = [{"image": torch.rand(4, 16, 16, 3) * 2 - 1} for _ in range(steps)]
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **arguments,
    )
    trainer.fit(model, DataLoader(data, batch_size=None), DataLoader(data[:1], batch_size=None))
    return trainer


@pytest.mark.parametrize(("cls", "arguments"), [
    (VQModel, {"revive_after": 1}),
    (EMAVQ, {"decay": 0.5}),
], ids=["gradients", "running means"])
def test_with_encoder_and_codebook_frozen_the_codes_stay(cls, arguments):
    model = cls(SMALL, LOSS, 8, 4, **arguments)
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    codes, before = model.eval().encode_codes(x), copy.deepcopy(model.state_dict())
    model.train()
    model.freeze_parts(["encoder", "quantize"])
    model.keep_averages(0.5)
    trainer = fit(model)
    after = model.state_dict()
    changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"decoder", "post_quant_conv", "loss"}
    assert torch.equal(model.eval().encode_codes(x), codes)
    trained = {id(p) for p in trainer.optimizers[0].param_groups[0]["params"]}
    assert trained == {id(p) for p in [*model.decoder.parameters(), *model.post_quant_conv.parameters()]}
    assert {name.split(".")[0] for name in model.averages.weights} == {"decoder", "post_quant_conv"}


def test_frozen_parts_stay_in_eval_mode_also_after_a_validation():
    model = VQModel(SMALL, LOSS, 8, 4)
    model.freeze_parts("encoder")
    assert not model.encoder.training and not model.quant_conv.training and model.quantize.training
    fit(model, 1)
    assert model.training and model.decoder.training and not model.encoder.training
    model.eval()
    model.train()
    assert model.decoder.training and not any(module.training for module in model.encoder.modules())


def test_a_part_of_a_part_can_be_frozen():
    model = VQModel(SMALL, LOSS, 8, 4)
    before = copy.deepcopy(model.state_dict())
    model.freeze_parts(["decoder.up.1"])
    fit(model, 1)
    same = {key for key, value in model.state_dict().items() if torch.equal(value, before[key])}
    frozen = {key for key in before if key.startswith("decoder.up.1.")}
    assert frozen and frozen <= same and "decoder.conv_out.weight" not in same


def test_a_frozen_encoder_computes_in_float32_as_in_use():
    torch.manual_seed(0)
    model = VQModel(SMALL, LOSS, 64, 4)
    x = torch.rand(4, 3, 16, 16) * 2 - 1
    want = model.eval().encode_to_prequant(x).detach()
    model.train()
    model.freeze_parts(["encoder", "quantize"])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.encode_to_prequant(x), want)
        assert model.decoder(torch.rand(1, 8, 8, 8)).dtype == torch.bfloat16


def test_a_frozen_decoder_needs_a_fixed_adversarial_weight():
    with pytest.raises(ValueError, match="last layer, which is frozen: set .*disc_adaptive=false"):
        VQModel(SMALL, LOSS, 8, 4).freeze_parts("decoder")
    fixed = {**LOSS, "params": LOSS["params"] | {"disc_adaptive": False}}
    model = VQModel(SMALL, fixed, 8, 4)
    before = copy.deepcopy(model.state_dict())
    model.freeze_parts("decoder")
    fit(model, 1)
    after = model.state_dict()
    assert torch.equal(after["decoder.conv_in.weight"], before["decoder.conv_in.weight"])
    assert not torch.equal(after["encoder.conv_in.weight"], before["encoder.conv_in.weight"])


def test_other_models_freeze_parts_too():
    model = AutoencoderKL({**SMALL, "double_z": True}, {
        "target": "taming.modules.losses.latent_diffusion.LPIPSWithDiscriminator", "params": LOSS["params"],
    }, 4)
    before = copy.deepcopy(model.state_dict())
    model.freeze_parts("encoder")
    fit(model, 1)
    changed = {key.split(".")[0] for key, value in model.state_dict().items() if not before[key].equal(value)}
    assert changed == {"decoder", "post_quant_conv", "loss"}


def transformer():
    prior = dict(vocab_size=8, block_size=80, n_layer=2, n_head=2, n_embd=16)
    stage = {"target": "taming.models.vqgan.VQModel", "params": dict(
        ddconfig=SMALL, lossconfig={"target": "taming.modules.losses.DummyLoss"}, n_embed=8, embed_dim=4)}
    gpt = {"target": "taming.modules.transformer.mingpt.GPT", "params": prior}
    return Net2NetTransformer(gpt, stage, "__is_unconditional__")


def test_a_transformer_can_be_tuned_in_part():
    model = transformer()
    before = copy.deepcopy(model.state_dict())
    model.freeze_parts(["transformer.tok_emb", "transformer.blocks.0"])
    fit(model, 1)
    changed = {key for key, value in model.state_dict().items() if not before[key].equal(value)}
    assert any(key.startswith("transformer.blocks.1.") for key in changed)
    frozen = ("first_stage", "transformer.tok_emb", "transformer.blocks.0.")
    assert not any(key.startswith(frozen) for key in changed)
    assert model.training and not model.first_stage_model.training
    assert not model.transformer.tok_emb.training


@pytest.mark.parametrize(("names", "message"), [
    (["encodr"], r"VQModel has no part 'encodr' \(did you mean encoder"),
    (["decoder.up.7"], "no part 'decoder.up.7'.*its parts are encoder, decoder, "),
    ("loss.discriminator", "loss.discriminator is of the loss; disc_factor: 0"),
    (["encoder", "quantize", "decoder"], "post_quant_conv is all there is: nothing is left to train"),
    (3, "freeze: 3 must be a text or a list"),
    ([1], r"freeze: \[1\] must be a text or a list"),
])
def test_what_cannot_be_frozen(names, message):
    fixed = {**LOSS, "params": LOSS["params"] | {"disc_adaptive": False}}
    with pytest.raises(ValueError, match=message):
        VQModel(SMALL, fixed, 8, 4).freeze_parts(names)


def test_all_of_a_transformer_cannot_be_frozen():
    with pytest.raises(ValueError, match="transformer is all there is"):
        transformer().freeze_parts("transformer")


def test_codes_of_a_frozen_codebook_are_not_restarted():
    model = VQModel(SMALL, LOSS, 8, 4)
    model.freeze_parts("quantize")
    with pytest.raises(ValueError, match="health.codes: restart needs a codebook of vectors, not frozen"):
        Health(codes="restart").on_train_start(None, model)


# ---- by the command


def last(run):
    return read_checkpoint(run / "checkpoints" / "last.ckpt")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The YAML of a tiny VQGAN and its data, and a run of it, in the place of a published checkpoint."""
    folder = tmp_path_factory.mktemp("freezing")
    yaml = write_vqgan(folder)
    return yaml, train(yaml, folder, "published", "--max_steps", 4)


@pytest.mark.slow
def test_tune_only_the_decoder_of_a_published_tokenizer(published, tmp_path):
    """The recipe of docs/training_parts.md: only the decoder changes, also after the run is resumed."""
    yaml, run = published
    words = [FREEZE, f"model.params.ckpt_path={run}", "model.params.ignore_keys=[loss]", "model.ema_decay=.9"]
    tuned = train(yaml, tmp_path, "tuned", "--max_steps", 3, *words)
    resume(tuned, "--max_steps", 6)
    before, after = (last(each)["state_dict"] for each in (run, tuned))
    changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"decoder", "post_quant_conv", "loss"}

    model = VQModel.from_pretrained(run)
    parts = ("encoder", "quant_conv", "quantize")
    hashes = [content_hash(model.get_submodule(part)) for part in parts]
    other = VQModel.from_pretrained(tuned)
    assert [content_hash(other.get_submodule(part)) for part in parts] == hashes


@pytest.mark.slow
def test_the_discriminator_is_kept_or_begins_again(published, tmp_path):
    yaml, run = published
    words = [FREEZE, f"model.params.ckpt_path={run}", "model.params.lossconfig.params.disc_start=100"]
    key, old = "loss.discriminator.main.0.weight", last(run)
    for name, more, kept in (("kept", [], True), ("again", ["model.params.ignore_keys=[loss]"], False)):
        tuned = train(yaml, tmp_path, name, "--max_steps", 1, *words, *more)
        state = last(tuned)["state_dict"]
        assert torch.equal(state[key], old["state_dict"][key]) == kept


@pytest.mark.slow
def test_two_processes_tune_a_decoder(published, tmp_path):
    yaml, run = published
    words = ["-b", yaml, "-t", "-l", tmp_path / "logs", FREEZE, f"model.params.ckpt_path={run}"]
    words += ["--max_steps", 3, "data.params.batch_size=1"]
    words += ["lightning.callbacks.record.target=tests.tiny.Record"]
    main_on_ranks(2, *words, f"lightning.callbacks.record.params.folder={tmp_path}")
    first, second = (torch.load(tmp_path / f"weights_2_{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)
    before = last(run)["state_dict"]
    assert torch.equal(first["encoder.conv_in.weight"], before["encoder.conv_in.weight"])
    assert not torch.equal(first["decoder.conv_in.weight"], before["decoder.conv_in.weight"])


@pytest.mark.parametrize(("word", "message"), [
    ("model.freeze=[decodr]", "freeze: VQModel has no part 'decodr' (did you mean decoder"),
    ("model.params.freeze=[encoder]", "the key model.params.freeze (did you mean model.freeze?)"),
    ("freeze=[encoder]", "nothing reads the key freeze (did you mean model.freeze"),
])
def test_bad_words_on_the_command_line(tmp_path, capfd, word, message):
    assert main(["-b", str(write_vqgan(tmp_path)), "-l", str(tmp_path), "--dry-run", word]) == 1
    assert message in capfd.readouterr().err


def test_the_dry_run_counts_what_is_trained(tmp_path, capfd):
    assert main(["-b", str(write_vqgan(tmp_path)), "-l", str(tmp_path), "--dry-run", FREEZE]) == 0
    lines = {line.split()[0]: line for line in capfd.readouterr().out.splitlines() if "trainable" in line}
    assert " 0 trainable" in lines["encoder"] and " 0 trainable" in lines["quant_conv"]
    assert " 0 trainable" not in lines["decoder"]
