"""Net2NetTransformer: conditions, what is trained and what frozen, errors when built, metrics."""

import hashlib
import math

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from taming.models.cond_transformer import Net2NetTransformer
from taming.models.vqgan import VQModel

DUMMY = {"target": "taming.modules.losses.DummyLoss"}
DDCONFIG = dict(
    double_z=False, z_channels=8, resolution=16, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 1, 1],
    num_res_blocks=1, attn_resolutions=[], dropout=0.0,
)
STAGE = dict(ddconfig=DDCONFIG, lossconfig=DUMMY, n_embed=24, embed_dim=4)
VQ = {"target": "taming.models.vqgan.VQModel", "params": STAGE}
COORD = {"target": "taming.modules.misc.coord.CoordStage", "params": dict(n_embed=24, down_factor=4)}
CLASSES = {"target": "taming.modules.util.Labelator", "params": dict(n_classes=30)}
SPIRAL = {"target": "taming.modules.transformer.permuter.SpiralOut", "params": dict(H=4, W=4)}
UNCONDITIONAL = "__is_unconditional__"


def gpt_config(vocab_size=30, block_size=31, **arguments):
    params = dict(vocab_size=vocab_size, block_size=block_size, n_layer=2, n_head=2, n_embd=16) | arguments
    return {"target": "taming.modules.transformer.mingpt.GPT", "params": params}


def make(cond=UNCONDITIONAL, *, gpt=None, first=VQ, **arguments):
    """A tiny model over 4x4 codes, 16 tokens an image, with a codebook that is in use."""
    model = Net2NetTransformer(gpt or gpt_config(), first, cond, **arguments)
    nn.init.normal_(model.first_stage_model.quantize.embedding.weight, std=0.5)
    nn.init.normal_(model.transformer.head.weight, std=0.5)
    model.learning_rate = 1e-3
    return model


def batches(count, size=3):
    return [
        {
            "image": torch.rand(size, 16, 16, 3) * 2 - 1,
            "coord": torch.linspace(0, 1, 16 * 16).view(1, 16, 16, 1).repeat(size, 1, 1, 1),
            "class_label": torch.randint(30, (size,)),
        }
        for _ in range(count)
    ]


def trainer(**arguments):
    return pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, **arguments,
    )


def fit(model, data, **arguments):
    trainer(**arguments).fit(model, DataLoader(data, batch_size=None))
    return model


def close(got, want):
    """Equal but for the rounding of z + (z_q - z), and of sums in another order."""
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def inputs_of(model):
    """The tokens that the transformer gets, batch by batch."""
    seen = []
    model.transformer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    return seen


# ---- conditions


@torch.no_grad()
@pytest.mark.parametrize(
    ("cond", "key", "want"),
    [
        (UNCONDITIONAL, "image", lambda batch: torch.full((3, 1), 7)),
        (CLASSES, "class_label", lambda batch: batch["class_label"][:, None]),
        (COORD, "coord", lambda batch: 24 * F.avg_pool2d(batch["coord"][..., 0], 4).flatten(1)),
    ],
)
def test_condition_comes_first_and_predicts_the_first_code(cond, key, want):
    model = make(cond, cond_stage_key=key, sos_token=7).eval()
    batch = batches(1)[0]
    x, c = model.get_xc(batch)
    seen = inputs_of(model)
    logits, target = model(x, c)
    condition = want(batch).round().long()
    m = condition.shape[1]
    assert torch.equal(target, model.encode_to_z(x)[1]) and target.shape == (3, 16)
    assert torch.equal(seen[0], torch.cat((condition, target), 1)[:, :-1])
    close(logits, model.transformer(seen[0])[0][:, m - 1 :])
    assert logits.shape == (3, 16, 30)
    want_loss = -logits.log_softmax(-1).gather(-1, target[..., None]).mean()
    torch.testing.assert_close(model.shared_step(batch), want_loss)


def test_another_vqgan_as_condition_and_the_first_stage_itself():
    own = make(VQ, cond_stage_key="image")
    shared = make("__is_first_stage__", cond_stage_key="image")
    assert shared.cond_stage_model is shared.first_stage_model
    assert own.cond_stage_model is not own.first_stage_model
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(shared.encode_to_c(x)[1], shared.encode_to_z(x)[1])
    small = make(VQ, cond_stage_key="image", downsample_cond_size=8)
    assert small.encode_to_c(x)[1].shape == (2, 4)


def test_pkeep_replaces_inputs_in_training_only_and_never_targets():
    model = make(CLASSES, cond_stage_key="class_label", pkeep=0.5)
    x, c = model.get_xc(batches(1, size=40)[0])
    seen = inputs_of(model)
    with torch.no_grad():
        clean = model.encode_to_z(x)[1]
        assert torch.equal(model.train()(x, c)[1], clean)
        assert torch.equal(model.eval()(x, c)[1], clean)
        make_all = make(CLASSES, cond_stage_key="class_label", pkeep=1.0).train()
        kept = inputs_of(make_all)
        assert torch.equal(make_all(x, c)[1][:, :-1], kept[0][:, 1:])
    noisy, quiet = seen
    assert torch.equal(noisy[:, 0], c) and torch.equal(quiet, torch.cat((c[:, None], clean), 1)[:, :-1])
    kept_share = (noisy[:, 1:] == clean[:, :-1]).float().mean()
    assert 0.45 < kept_share < 0.6  # a half, and the few that random codes hit
    assert noisy.max() >= 24  # replacements come from the whole vocabulary


def test_null_tokens_replace_whole_conditions_in_training_only():
    model = make(COORD, cond_stage_key="coord", cond_dropout=0.25, null_token=29)
    x, c = model.get_xc(batches(1, size=200)[0])
    seen = inputs_of(model)
    with torch.no_grad():
        target = model.train()(x, c)[1]
        model.eval()(x, c)
    tokens, clean = seen
    dropped = (tokens[:, :16] == 29).all(1)
    assert 0.15 < dropped.float().mean() < 0.35
    assert torch.equal(tokens[~dropped], clean[~dropped]) and (clean[:, :16] < 29).all()
    assert torch.equal(tokens[:, 16:], clean[:, 16:]) and torch.equal(target[:, :-1], clean[:, 16:])
    assert not any("null" in key for key in model.state_dict())


def test_encoding_runs_in_float32_under_autocast():
    model = make(VQ, cond_stage_key="image").eval()
    x = torch.rand(4, 3, 16, 16) * 2 - 1
    want = model.encode_to_z(x), model.encode_to_c(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model.encode_to_z(x), model.encode_to_c(x)
        logits, _ = model(x, x)
    for (quant, codes), (want_quant, want_codes) in zip(got, want, strict=True):
        assert torch.equal(codes, want_codes) and torch.equal(quant, want_quant)
    assert logits.dtype == torch.bfloat16  # autocast was on


# ---- training


def test_stages_are_frozen_and_stay_in_eval_mode():
    model = make(VQ, cond_stage_key="image")
    data = batches(2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fit(model, data)
    model.train()
    assert model.transformer.training
    for stage in ("first_stage_model", "cond_stage_model"):
        assert not any(module.training for module in getattr(model, stage).modules())
        assert not any(p.requires_grad for p in getattr(model, stage).parameters())
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and all(key.startswith("transformer.") for key in changed)
    assert model.batches_seen == 2


def test_decay_on_linear_weights_only_and_each_parameter_once():
    model = make(weight_decay=0.3)
    optimizer = model.configure_optimizers()
    decayed, rest = optimizer.param_groups
    assert (decayed["weight_decay"], rest["weight_decay"], decayed["betas"]) == (0.3, 0.0, (0.9, 0.95))
    names = {id(p): name for name, p in model.transformer.named_parameters()}
    linear = ("attn.key", "attn.query", "attn.value", "attn.proj", "mlp.0", "mlp.2")
    want = {f"blocks.{i}.{layer}.weight" for i in range(2) for layer in linear} | {"head.weight"}
    assert {names[id(p)] for p in decayed["params"]} == want
    everything = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(everything) == sorted(names)  # each exactly once


def test_two_accumulated_batches_are_one_of_double_size():
    data = batches(2)
    model, twin = make(), make()
    twin.load_state_dict(model.state_dict())
    start = model.transformer.head.weight.detach().clone()
    model.accumulate_grad_batches = 2
    fit(model, data)
    fit(twin, [{key: torch.cat([batch[key] for batch in data]) for key in data[0]}])
    assert model.batches_seen == twin.batches_seen == 1
    moved, wanted = model.transformer.head.weight - start, twin.transformer.head.weight - start
    assert (moved - wanted).norm() < 0.02 * wanted.norm() and wanted.norm() > 0


def test_clipping_bounds_the_norm_of_the_gradient():
    norms = []
    for limit in (None, 0.01):
        model = make()
        model.gradient_clip_val, model.learning_rate = limit, 1.0
        optimizer = torch.optim.SGD(model.transformer.parameters(), lr=1.0)
        model.configure_optimizers = lambda given=optimizer: given
        before = nn.utils.parameters_to_vector(model.transformer.parameters()).detach().clone()
        fit(model, batches(1))
        after = nn.utils.parameters_to_vector(model.transformer.parameters()).detach()
        norms.append(float((after - before).norm()))
    assert norms[0] > 0.02 and norms[1] == pytest.approx(0.01, rel=0.01)


def test_fit_with_warm_up():
    params = dict(warm_up_steps=4, max_decay_steps=10, lr_start=0.0, lr_max=1.0, lr_min=0.1)
    scheduler = {"target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler", "params": params}
    model = fit(make(scheduler_config=scheduler), batches(3))  # the last step is that of batch 2
    assert [group["lr"] for group in model.optimizers().param_groups] == pytest.approx([5e-4, 5e-4])
    assert model.batches_seen == 3


def test_validation_gives_loss_and_perplexity_of_the_whole_set():
    model = make(CLASSES, cond_stage_key="class_label", pkeep=0.3)
    data = [*batches(2), *batches(1, size=1)]
    (metrics,) = trainer().validate(model, DataLoader(data, batch_size=None), verbose=False)
    whole = {key: torch.cat([batch[key] for batch in data]) for key in data[0]}
    with torch.no_grad():
        loss = float(model.eval().shared_step(whole))
    assert metrics["val/loss"] == pytest.approx(loss, rel=1e-4)
    assert metrics["val/perplexity"] == pytest.approx(math.exp(loss), rel=1e-3)


# ---- errors when built


@pytest.mark.parametrize(
    ("cond", "gpt", "message"),
    [
        (UNCONDITIONAL, gpt_config(vocab_size=20), "vocab_size: 20 .* first stage's 24 tokens.* least 24"),
        (CLASSES, gpt_config(vocab_size=24), "vocab_size: 24 .* condition's 30 tokens.* least 30"),
        (COORD, gpt_config(block_size=30), "block_size: 30 .* 16 condition tokens and 16 image codes.* 31"),
        (CLASSES, gpt_config(block_size=15), "block_size: 15 .* 1 condition tokens and 16 image codes.* 16"),
    ],
)
def test_sizes_that_do_not_fit_are_both_named(cond, gpt, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        make(cond, gpt=gpt)


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(null_token=30, cond_dropout=0.1), "null_token: 30 is outside .* vocab_size: 30: .* at least 31"),
    (dict(null_token=-1), "null_token: -1 is outside"),
    (dict(cond_dropout=0.1), "cond_dropout: 0.1 needs null_token"),
    (dict(cond_dropout=1.1, null_token=2), "cond_dropout: 1.1 is not a probability"),
    (dict(cond=UNCONDITIONAL, cond_dropout=0.1, null_token=29), "no condition to drop"),
])
def test_a_null_token_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**{"cond": COORD, **arguments})


def test_a_null_token_that_the_condition_uses_is_warned_of(caplog):
    make(COORD, null_token=24)
    assert not caplog.records
    make(COORD, null_token=23)
    assert "null_token: 23 is one of the condition's 24 tokens" in caplog.text


def test_the_smallest_sizes_that_fit():
    assert make(CLASSES, gpt=gpt_config(vocab_size=30, block_size=16)).transformer.block_size == 16
    assert make(COORD, gpt=gpt_config(vocab_size=24)).transformer.block_size == 31


TOKENS = {
    "target": "taming.models.dummy_cond_stage.DummyCondStage", "params": dict(conditional_key="boxes"),
}


@pytest.mark.parametrize(("cond", "entry", "arguments", "message"), [
    (COORD, torch.zeros(3, 8, 8, 1), {},
     r"condition given has 8x8 pixels \(height x width\), but .* laid out for 16x16 beside such images"),
    (COORD, torch.zeros(3, 16, 16, 1), dict(cond_size=8, gpt=gpt_config(block_size=19)), "laid out for 8x8"),
    (TOKENS, torch.tensor([[4, 30]] * 3), {},
     "given has tokens from 4 to 30, but .* vocab_size: 30 allows 0 to 29"),
    (TOKENS, torch.tensor([[-1, 3]] * 3), {}, "tokens from -1 to 3"),
    (VQ, torch.zeros(3, 16, 16, 5), {}, "5 channels a pixel .* takes 3, its ddconfig.in_channels"),
])
def test_a_condition_that_does_not_fit_is_refused(cond, entry, arguments, message):
    model = make(cond, cond_stage_key="given", **arguments)
    with pytest.raises(ValueError, match=message):
        model(*model.get_xc({**batches(1)[0], "given": entry}))


def test_a_condition_may_have_the_size_that_the_block_has_room_for():
    """Larger images have larger conditions; a block with room to spare says nothing of sizes, as in 2021."""
    model = make(COORD, cond_stage_key="coord", cond_size=8, gpt=gpt_config(block_size=19))
    batch = {"image": torch.zeros(1, 32, 48, 3), "coord": torch.zeros(1, 16, 24, 1)}
    assert model.get_xc(batch)[1].shape == (1, 1, 16, 24)
    roomy = make(COORD, cond_stage_key="coord", gpt=gpt_config(block_size=40))
    assert roomy.get_xc({"image": torch.zeros(1, 16, 16, 3), "coord": torch.zeros(1, 8, 8, 1)})


@pytest.mark.parametrize("which", ["first_stage_config", "cond_stage_config"])
def test_a_missing_checkpoint_is_reported_before_anything_is_built(which):
    missing = {**VQ, "params": {**STAGE, "ckpt_path": "nowhere/last.ckpt"}}
    configs = {"first_stage_config": VQ, "cond_stage_config": VQ, which: missing}
    message = f"{which}.params.ckpt_path: nowhere/last.ckpt does not exist"
    with pytest.raises(FileNotFoundError, match=message):
        Net2NetTransformer(gpt_config(), **configs)


def test_stages_take_their_checkpoints(tmp_path):
    stage = VQModel(**STAGE)
    torch.save({"state_dict": stage.state_dict()}, tmp_path / "stage.ckpt")
    named = {**VQ, "params": {**STAGE, "ckpt_path": str(tmp_path / "stage.ckpt")}}
    model = Net2NetTransformer(gpt_config(), named, UNCONDITIONAL)
    for key, value in stage.state_dict().items():
        assert torch.equal(model.first_stage_model.state_dict()[key], value)


def test_keys_and_shapes_are_those_of_the_published_checkpoint():
    """Of faceshq_transformer, without the attention masks, which follow from the sizes."""
    published = dict(
        double_z=False, z_channels=256, resolution=256, in_channels=3, out_ch=3, ch=128,
        ch_mult=[1, 1, 2, 2, 4], num_res_blocks=2, attn_resolutions=[16], dropout=0.0,
    )
    first = {**VQ, "params": dict(ddconfig=published, lossconfig=DUMMY, n_embed=1024, embed_dim=256)}
    coord = {**COORD, "params": dict(n_embed=1024, down_factor=16)}
    with torch.device("meta"):
        gpt = gpt_config(vocab_size=1024, block_size=512, n_layer=24, n_head=16, n_embd=1024)
        model = Net2NetTransformer(gpt, first, coord, cond_stage_key="coord")
    state = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert state["transformer.pos_emb"] == (1, 512, 1024)
    assert state["first_stage_model.quantize.embedding.weight"] == (1024, 256)
    assert len(state) == 732
    lines = "\n".join(sorted(f"{key} {shape}" for key, shape in state.items()))
    assert (
        hashlib.sha256(lines.encode()).hexdigest()
        == "d4fc9b5cdc5a323189ca6dd9288aead920138bdd8faff6d8ab9384d0de0081da"
    )
