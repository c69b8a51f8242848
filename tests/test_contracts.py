"""Every tokenizer x prior x condition that is shipped, at toy size: the contracts, and one step of training,
validation and sampling, from images and from a code cache; for every pair, logging and closer comparisons."""

import functools
import itertools

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from taming.data.codes import CodeDataset
from taming.data.codes.writer import CodeWriter
from taming.data.sampler import SeededDataset
from taming.eval.likelihood import measure_likelihood
from taming.eval.reconstruction import reconstruct
from taming.images import from_uint8, to_uint8
from taming.inference.encode import encode_dataset, header_of
from taming.models.cond_transformer import Net2NetTransformer
from taming.models.tokenizer import Tokenizer, as_list, flatten_codes
from taming.modules.conditioners import Conditioner
from taming.modules.priors import Prior
from taming.modules.quantizers import Quantizer, QuantizerInfo
from taming.sampling import SamplingOptions, image_generators

HEIGHT, WIDTH = 16, 24  # pixels: nothing may assume a square
LABELS, CODES, NULL = 5, 12, 19
DDCONFIG = dict(
    double_z=False, z_channels=8, resolution=[HEIGHT, WIDTH], in_channels=3, out_ch=3, ch=8,
    ch_mult=[1, 1, 1], num_res_blocks=1, attn_resolutions=[], dropout=0.0, num_groups=4,
)
LOSS = {
    "target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
    "params": dict(perceptual_weight=0.0, disc_start=0, disc_num_layers=1, disc_ndf=4),
}
NO_DISCRIMINATOR = {
    "target": "taming.modules.losses.vqperceptual.VQLPIPS", "params": dict(perceptual_weight=0.0),
}


def stage(target, loss=LOSS, channels=3, **params):
    ddconfig = {**DDCONFIG, "in_channels": channels, "out_ch": channels}
    params = {"ddconfig": ddconfig, "lossconfig": loss, "n_embed": CODES, "embed_dim": 4} | params
    return {"target": f"taming.models.{target}", "params": params}


VQ_VAE = dict(resolution=[HEIGHT, WIDTH], in_channels=3, out_ch=3, ch=8, num_res_blocks=1, res_ch=4)


def vq_vae(target, **params):
    return {"target": f"taming.models.{target}", "params": dict(
        ddconfig=VQ_VAE, n_embed=CODES, embed_dim=4) | params}


GUMBEL = {"target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler", "params": dict(
    warm_up_steps=0, max_decay_steps=10, lr_start=1.0, lr_max=1.0, lr_min=0.5)}
TOKENIZERS = {
    "VQModel": stage("vqgan.VQModel"),
    "VQModel, revived": stage("vqgan.VQModel", revive_after=2, legacy=False),
    "VQModel, another quantizer": stage("vqgan.VQModel", quantizer_config={
        "target": "taming.modules.vqvae.quantize.EMAVectorQuantizer",
        "params": dict(n_embed=CODES, embedding_dim=4, beta=0.25),
    }),
    "EMAVQ": stage("vqgan.EMAVQ"),
    "GumbelVQ": stage("vqgan.GumbelVQ", temperature_scheduler_config=GUMBEL),
    "VQNoDiscModel": stage("vqgan.VQNoDiscModel", NO_DISCRIMINATOR),
    "latent diffusion's VQModel": stage("latent_diffusion.VQModel"),
    "MOVQ": stage("movq.MOVQ"),
    "VQVAE": vq_vae("vqvae.VQVAE", kmeans_steps=2, revive_after=3),
    "VQVAE, gradients": vq_vae("vqvae.VQVAE", decay=None),
    "DVAE": {"target": "taming.models.dvae.DVAE", "params": dict(
        ddconfig=dict(resolution=[HEIGHT, WIDTH], n_hid=8, n_init=4, n_blk_per_group=1, n_groups=3),
        n_embed=CODES, temperature_scheduler_config=GUMBEL)},
    "TiTok": stage("titok.TiTok", ddconfig=dict(
        resolution=[HEIGHT, WIDTH], num_tokens=24, z_channels=4, patch_size=4, width=8, num_layers=1, heads=2,
    )),
}
GRIDS = {"TiTok": (1, 24)}  # of codes that have no place in the image


def quantizer(target, n_embed=CODES, **params):
    config = {"target": f"taming.modules.quantizers.{target}", "params": params}
    return stage("vqgan.VQModel", n_embed=n_embed, quantizer_config=config)


QUANTIZERS = {  # one grid of codes each
    "VQ": quantizer("vector.VQ", codebook_size=CODES, dim=4, codebook_dim=3, l2_normalize=True,
                    estimator="rotation", entropy_weight=0.1, kmeans_steps=2, revive_after=2),
    "VQ, running means": quantizer("vector.VQ", codebook_size=CODES, dim=4, l2_normalize=True, decay=0.9),
    "VQ, DiVeQ": quantizer("vector.VQ", codebook_size=CODES, dim=4, estimator="diveq"),
    "IBQ": quantizer("index_propagation.IBQ", codebook_size=CODES, dim=4),
    "SimVQ": quantizer("sim_vq.SimVQ", codebook_size=CODES, dim=4),
    "FSQ": quantizer("fsq.FSQ", levels=[3, 4], dim=4),
    "LFQ": quantizer("lookup_free.LFQ", n_embed=16, codebook_size=16),
    "BSQ": quantizer("lookup_free.BSQ", n_embed=8, codebook_size=8, dim=4),
    "ResidualVQ": quantizer("residual.ResidualVQ", n_embed=16, codebook_size=4, dim=4, num_quantizers=2,
                            combined=True),
    "GroupedVQ": quantizer("grouped.GroupedVQ", n_embed=9, codebook_size=3, dim=4, groups=2, combined=True),
}
PARTS = {**QUANTIZERS, **{
    f"networks of {name}": stage("vqgan.VQModel", **params, **{
        f"{part.lower()}_config": {"target": f"taming.modules.{name}.networks.{part}"}
        for part in ("Encoder", "Decoder")
    }) for name, params in (("maskgit", {}), ("magvit2", dict(embed_dim=8, quant_conv_kernel=0)))
}}
SEVERAL_GRIDS = {
    "ResidualVQ": quantizer("residual.ResidualVQ", codebook_size=CODES, dim=4, num_quantizers=3,
                            shared=True, decay=0.9),
    "GroupedVQ": quantizer("grouped.GroupedVQ", codebook_size=CODES, dim=4, groups=2, l2_normalize=True),
    "MultiScaleResidualVQ": quantizer("multi_scale.MultiScaleResidualVQ", codebook_size=CODES, dim=4,
                                      scales=[1, 2, 4], num_convolutions=3),
}
TWO_LEVELS = {
    "VQVAE2": vq_vae("vqvae2.VQVAE2", kmeans_steps=2),
    "TwoLevelVQModel": stage("two_level.TwoLevelVQModel", ddconfig={**DDCONFIG, "ch_mult": [1, 1, 1, 1]}),
}
FROZEN_ONLY = {"latent diffusion's VQModelInterface": stage("latent_diffusion.VQModelInterface")}
ALL = {**TOKENIZERS, **PARTS, **FROZEN_ONLY}
SEGMENTATION = stage(
    "vqgan.VQSegmentationModel", {"target": "taming.modules.losses.segmentation.BCELossWithQuant"}, LABELS,
    n_labels=LABELS, image_key="segmentation",
)
PRIORS = {
    "GPT": {"target": "taming.modules.transformer.mingpt.GPT",
            "params": dict(vocab_size=20, block_size=200, n_layer=1, n_head=2, n_embd=8)},
    "PixelSNAIL": {"target": "taming.modules.priors.pixelsnail.PixelSNAIL", "params": dict(
        vocab_size=20, channel=8, res_channel=8, n_head=2, n_block=1, n_res_block=1, n_cond_res_block=1,
        kernel_size=3,
    )},
    "Llama": {"target": "taming.modules.priors.llama.Llama", "params": dict(
        vocab_size=CODES, condition_vocab_size=20, n_layer=1, n_head=2, n_kv_head=1, n_embd=8, qk_norm=True,
        adaln=True, resid_pdrop=0.1, fuse_grids=True, embedding_from_codebook=True)},
    "RAR": {"target": "taming.modules.priors.rar.RAR", "params": dict(
        vocab_size=CODES, condition_vocab_size=20, n_layer=1, n_head=2, n_embd=8, random_until=5,
        raster_from=10)},
    "MaskGIT": {"target": "taming.modules.priors.maskgit.MaskGIT", "params": dict(
        vocab_size=CODES, condition_vocab_size=20, block_size=200, n_layer=1, n_head=2, n_embd=8,
        likelihood_steps=3)},
}
PRIORS |= {
    "MaskBit": {"target": "taming.modules.priors.maskbit.MaskBit", "params": dict(
        vocab_size=16, condition_vocab_size=20, block_size=200, bit_groups=2, n_layer=1, n_head=2, n_embd=8,
        likelihood_steps=3)},
    "BAR": {"target": "taming.modules.priors.bar.BAR", "params": dict(
        vocab_size=16, condition_vocab_size=20, n_layer=1, n_head=2, n_embd=8, bit_groups=2, head_layers=1)},
}
BITS = ("MaskBit", "BAR")  # they need a power of two of codes, here with an even number of bits
IMPOSSIBLE = {("PixelSNAIL", "tokens")}  # neither a class nor a grid


def prior_config(name, condition, grid=(HEIGHT // 4, WIDTH // 4)):
    config = PRIORS[name]
    fixed = condition == "tokens" and name in ("Llama", "RAR", "BAR")
    layout = {"layout": [6, list(grid)]} if fixed else {}  # of tokens that the data make
    return {**config, "params": {**config["params"], **layout}}


def of_two_levels(top, bottom, **params):
    return {"target": "taming.modules.priors.hierarchical.HierarchicalPrior", "params": dict(
        vocab_size=20, top=PRIORS[top], bottom=PRIORS[bottom]) | params}


PRIORS_OF_TWO_LEVELS = {
    "GPT, GPT": of_two_levels("GPT", "GPT"),
    "PixelSNAIL, PixelSNAIL": of_two_levels("PixelSNAIL", "PixelSNAIL"),
    "PixelSNAIL, GPT": of_two_levels("PixelSNAIL", "GPT"),
    "GPT, GPT in a window": of_two_levels("GPT", "GPT", bottom_window=[2, 4]),
}
CONDITIONS = {
    "none": ("__is_unconditional__", "image"),
    "class": ({"target": "taming.modules.util.Labelator", "params": {"n_classes": 7}}, "class_label"),
    "coordinates": ({"target": "taming.modules.misc.coord.CoordStage",
                     "params": {"n_embed": 9, "down_factor": 4}}, "coord"),
    "label grid": ({"target": "taming.modules.conditioners.label_grid.LabelGrid",
                    "params": {"n_labels": LABELS, "down_factor": 8}}, "segmentation"),
    "segmentation": (SEGMENTATION, "segmentation"),
    "image": (stage("vqgan.VQModel", channels=1), "depth"),
    "first stage": ("__is_first_stage__", "image"),
    "tokens": ({"target": "taming.models.dummy_cond_stage.DummyCondStage",
                "params": {"conditional_key": "objects_bbox"}}, "objects_bbox"),
    "several": (
        [{"target": "taming.modules.util.Labelator", "params": {"n_classes": 7}},
         {"target": "taming.modules.conditioners.label_grid.LabelGrid",
          "params": {"n_labels": LABELS, "down_factor": 4}}],
        ["class_label", "segmentation"],
    ),
}
GRID_CONDITIONS = {"first stage", "coordinates", "label grid", "segmentation", "image", "several"}


FINE = ("coordinates", "segmentation", "image", "several")  # grids of 4x6


def build(config, **more):
    from taming.config import instantiate_from_config

    torch.manual_seed(0)
    return instantiate_from_config(config, **more)


@functools.cache
def codebook_size(tokenizer):
    return build(ALL[tokenizer]).codebook_size


def item(i):
    generator = torch.Generator().manual_seed(i)
    return {
        "image": torch.rand(HEIGHT, WIDTH, 3, generator=generator) * 2 - 1,
        "depth": torch.rand(HEIGHT, WIDTH, 1, generator=generator) * 2 - 1,
        "coord": torch.rand(HEIGHT, WIDTH, 1, generator=generator),
        "segmentation": torch.randint(LABELS, (HEIGHT, WIDTH), generator=generator),
        "class_label": torch.tensor(i % 7),
        "objects_bbox": torch.randint(19, (6,), generator=generator),
    }


def fit(model, tmp_path, items=None):
    """One step of training and one of validation; the logged numbers."""
    model.learning_rate = 1e-3
    data = DataLoader([item(i) for i in range(2)] if items is None else items, batch_size=2)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=tmp_path,
    )
    trainer.fit(model, data, data)
    assert model.batches_seen == 1
    return trainer.callback_metrics


def cache_of(model, tmp_path):
    """A code cache of two items."""
    dataset = SeededDataset([item(i) for i in range(2)])
    header = header_of(model, dataset, {}, split="train", views=1, batch_size=2)
    encode_dataset(model, dataset, CodeWriter(tmp_path / "codes.tcc", header, 2))
    return CodeDataset(tmp_path / "codes.tcc")


def check_images(images, channels=(1, 3)):
    for name, x in images.items():
        assert x.ndim == 4 and x.shape[1] in channels and x.isfinite().all(), name


def check_evaluation(model, x):
    """The protocol `reconstruction` sees what the model encodes and decodes, as 8-bit pixels."""
    pixels = to_uint8(x)
    again, grids = reconstruct(model, pixels)
    codes = model.encode_codes(from_uint8(pixels))
    each = [codes] if torch.is_tensor(codes) else codes
    assert len(grids) == model.levels and all(map(torch.equal, grids, each))
    assert torch.equal(again, to_uint8(model.decode_codes(codes)))


@pytest.mark.parametrize("name", ALL)
def test_tokenizers(name, tmp_path):
    config = ALL[name]
    model = build(config)
    assert isinstance(model, Tokenizer) and isinstance(model.quantize, Quantizer)
    x = torch.stack([item(i)["image"] for i in range(2)]).permute(0, 3, 1, 2)
    if name not in FROZEN_ONLY:
        before = {key: value.clone() for key, value in model.state_dict().items()}
        metrics = fit(model, tmp_path)
        assert any(not torch.equal(before[key], value) for key, value in model.state_dict().items())
        assert metrics["val/codebook_usage_percent"] > 0 and metrics["train/grad_norm"] > 0
        check_images(model.eval().log_images({"image": x.permute(0, 2, 3, 1)}))
    model.eval()
    grid = model.code_shape(HEIGHT, WIDTH)
    assert grid == GRIDS.get(name, (HEIGHT // model.factor, WIDTH // model.factor))
    assert model.factor == 4 and model.spatial == (name not in GRIDS)
    assert model.image_size == (HEIGHT, WIDTH) and model.num_codes(HEIGHT, WIDTH) == 24
    codes = model.encode_codes(x)
    assert codes.shape == (2, *grid) and codes.dtype == torch.int64
    assert 0 <= codes.min() and codes.max() < model.codebook_size == config["params"]["n_embed"]
    assert model.decode_codes(codes).shape == x.shape
    check_evaluation(model, x)
    z_q, loss, info = model.quantize(model.encode_to_prequant(x))
    assert isinstance(info, QuantizerInfo) and loss.shape == ()
    assert torch.equal(info.indices.view(codes.shape), codes)
    torch.testing.assert_close(model.quantize.indices_to_codes(codes), z_q)
    assert z_q.shape[1] == model.quantize.code_dim
    wrong = "not a multiple of f = 4: crop to 16x20" if model.spatial else "18x23 pixels .* is made for 16x24"
    with pytest.raises(ValueError, match=wrong):
        model.encode_codes(torch.zeros(1, 3, 18, 23))


@pytest.mark.parametrize("name", TWO_LEVELS)
def test_tokenizers_of_two_levels(name, tmp_path):
    model = build(TWO_LEVELS[name])
    assert isinstance(model, Tokenizer) and model.levels == 2
    before = {key: value.clone() for key, value in model.state_dict().items()}
    metrics = fit(model, tmp_path)
    assert any(not torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert {f"val/{key}" for key in model.validation_metrics} <= metrics.keys()
    assert metrics["val/codebook_usage_percent"] > 0 and metrics["train/grad_norm"] > 0
    levels = [metrics[f"val/codebook_usage_percent_{level}"] for level in ("top", "bottom")]
    assert metrics["val/codebook_usage_percent"] == min(levels)
    x = torch.stack([item(i)["image"] for i in range(2)])
    check_images(model.eval().log_images({"image": x}))
    x = x.permute(0, 3, 1, 2)
    grids = model.code_shape(HEIGHT, WIDTH)
    assert grids == [(2, 3), (4, 6)] and model.num_codes(HEIGHT, WIDTH) == 30
    codes = model.encode_codes(x)
    assert [grid.shape[1:] for grid in codes] == grids and all(grid.dtype == torch.int64 for grid in codes)
    assert all(0 <= grid.min() and grid.max() < model.codebook_size == CODES for grid in codes)
    assert model.decode_codes(codes).shape == x.shape
    check_evaluation(model, x)


@pytest.mark.parametrize("name", SEVERAL_GRIDS)
def test_tokenizers_with_a_quantizer_of_several_grids(name, tmp_path):
    model = build(SEVERAL_GRIDS[name])
    metrics = fit(model, tmp_path)
    assert metrics["val/codebook_usage_percent"] > 0 and metrics["train/grad_norm"] > 0
    x = torch.stack([item(i)["image"] for i in range(2)])
    check_images(model.eval().log_images({"image": x}))
    x, grids = x.permute(0, 3, 1, 2), model.code_shape(HEIGHT, WIDTH)
    assert isinstance(model, Tokenizer) and model.levels == len(grids) > 1 and grids[-1] == (4, 6)
    codes = model.encode_codes(x)
    assert [grid.shape[1:] for grid in codes] == grids and all(grid.dtype == torch.int64 for grid in codes)
    assert all(0 <= grid.min() and grid.max() < model.codebook_size == CODES for grid in codes)
    assert model.num_codes(HEIGHT, WIDTH) == sum(grid[0].numel() for grid in codes)
    check_evaluation(model, x)
    z_q, loss, info = model.quantize(model.encode_to_prequant(x))
    assert loss.shape == () and info.indices.shape == (2, model.num_codes(HEIGHT, WIDTH))
    torch.testing.assert_close(model.codes_to_latents(codes), z_q)
    cache = cache_of(model, tmp_path)
    batch = cache.get_batch([0, 1])
    names = [f"codes/{level}" for level in range(model.levels)]
    assert [field.name for field in cache.code_header.grids] == names
    assert all(torch.equal(batch[name], grid) for name, grid in zip(names, codes, strict=True))
    with pytest.raises(ValueError, match="is a prior that does not know"):
        Net2NetTransformer(PRIORS["GPT"], SEVERAL_GRIDS[name], "__is_unconditional__")


@pytest.mark.parametrize("name", TWO_LEVELS)
def test_a_prior_of_one_level_takes_no_tokenizer_of_two(name):
    first, prior = TWO_LEVELS[name], PRIORS["GPT"]
    for condition in ("__is_unconditional__", "__is_first_stage__"):
        with pytest.raises(ValueError, match="prior that does not know two levels.* 2x3 and 4x6 codes"):
            Net2NetTransformer(prior, first, condition)
    with pytest.raises(ValueError, match="cond_stage_config: .* has codes at 2 levels: give a stage with"):
        Net2NetTransformer(prior, TOKENIZERS["VQModel"], first, cond_stage_key="image")


@pytest.mark.parametrize("name", CONDITIONS)
def test_conditions(name, tmp_path):
    config, key = CONDITIONS[name]
    if name in ("several", "none", "first stage"):
        return
    conditioner = build(config).eval()
    assert isinstance(conditioner, Conditioner) and conditioner.kind
    c = conditioner.from_batch(torch.stack([item(i)[key] for i in range(2)]))
    c = c.permute(0, 3, 1, 2) if c.ndim == 4 and c.shape[-1] == 1 else c
    conditioner.validate(c)
    quant, _, info = conditioner.encode(c)
    tokens, count = info[2].reshape(2, -1), conditioner.num_tokens(HEIGHT, WIDTH)
    assert tokens.dtype == torch.int64 and count in (None, tokens.shape[1])
    assert conditioner.vocab_size is None or tokens.max() < conditioner.vocab_size
    assert (count is None) == (conditioner.token_shape(HEIGHT, WIDTH) is None)
    shown = conditioner.to_rgb(c, (HEIGHT, WIDTH), plot=lambda tokens, size: torch.zeros(2, 3, *size))
    assert shown.shape[0] == 2 and shown.shape[1] in (1, 3) and shown.shape[2:] == (HEIGHT, WIDTH)
    assert -1 <= shown.min() and shown.max() <= 1.0001
    if c.ndim == 4:
        assert conditioner.resize(c, (32, 48)).shape == (*c.shape[:2], 32, 48)
    if (default := conditioner.default((HEIGHT, WIDTH))) is None:
        with pytest.raises(ValueError, match="give|data set"):
            conditioner.from_user(None, (HEIGHT, WIDTH))
        value = item(0)[key]
        value = value.permute(2, 0, 1) if conditioner.kind == "image" else value
        given = conditioner.from_user(value, (HEIGHT, WIDTH))
        torch.testing.assert_close(conditioner.encode(given)[2][2].reshape(1, -1), tokens[:1])
    else:
        assert len(default) == 1 and conditioner.encode(default)[2][2].numel() == count


# codes are numbers to priors and conditions, whatever made them: one condition is enough
MATRIX = [
    *itertools.product(
        [*TOKENIZERS, *FROZEN_ONLY], [name for name in PRIORS if name not in BITS], CONDITIONS
    ),
    *itertools.product(PARTS, PRIORS, ["class"]),
    *itertools.product(["LFQ"], BITS, [name for name in CONDITIONS if name != "class"]),
]


@pytest.mark.parametrize(("tokenizer", "prior", "condition"), MATRIX)
def test_the_matrix(tokenizer, prior, condition, tmp_path):
    if (prior, condition) in IMPOSSIBLE:
        with pytest.raises(ValueError, match="the data decide how many tokens a condition has"):
            Net2NetTransformer(PRIORS[prior], TOKENIZERS["VQModel"], CONDITIONS[condition][0])
        return
    if prior == "PixelSNAIL" and tokenizer in GRIDS and condition in GRID_CONDITIONS:
        with pytest.raises(ValueError, match="smaller by one whole factor|grids of codes"):
            Net2NetTransformer(
                PRIORS[prior], TOKENIZERS[tokenizer], CONDITIONS[condition][0],
                cond_stage_key=CONDITIONS[condition][1],
            )
        return
    grid = GRIDS.get(tokenizer, (4, 6))
    config = prior_config(prior, condition, grid)
    first = ALL[tokenizer]
    if "condition_vocab_size" in config["params"]:  # its vocabulary is that of the codes
        config["params"]["vocab_size"] = size = codebook_size(tokenizer)
        if prior in BITS and size != 16:
            message = "bit_groups: 2 does not divide the 3 bits" if size == 8 else "codes has no bits: give"
            stage, key = CONDITIONS[condition]
            with pytest.raises(ValueError, match=message):
                Net2NetTransformer(config, first, stage, cond_stage_key=key)
            return
    is_pair = tokenizer == "VQModel" or prior == "GPT"
    check_transformer(config, first, condition, grid, tmp_path, thorough=is_pair)


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("prior", PRIORS_OF_TWO_LEVELS)
@pytest.mark.parametrize("tokenizer", TWO_LEVELS)
def test_the_matrix_of_two_levels(tokenizer, prior, condition, tmp_path):
    first, config, grids = TWO_LEVELS[tokenizer], PRIORS_OF_TWO_LEVELS[prior], [(2, 3), (4, 6)]
    stage, key = CONDITIONS[condition]
    if condition == "first stage":
        with pytest.raises(ValueError, match="cond_stage_config: .* has codes at 2 levels: give a stage"):
            Net2NetTransformer(config, first, stage, cond_stage_key=key)
        return
    if condition == "tokens":
        with pytest.raises(ValueError, match=r"params.layout, \[tokens, \[2, 3\], \[4, 6\]\], if it takes"):
            Net2NetTransformer(config, first, stage, cond_stage_key=key)
        if "PixelSNAIL" in prior:
            return
        config = {**config, "params": {**config["params"], "layout": [6, [2, 3], [4, 6]]}}
    if condition in FINE and prior.startswith("PixelSNAIL"):  # its condition is as coarse as its codes
        with pytest.raises(ValueError, match="a condition of 4x6 codes does not fit 2x3 codes of the image"):
            Net2NetTransformer(config, first, stage, cond_stage_key=key)
        return
    if "window" in prior:  # 3 columns of the coarse grid
        with pytest.raises(ValueError, match="bottom_window: 2x3 of 4x6 codes does not cover whole codes of"):
            Net2NetTransformer(
                of_two_levels("GPT", "GPT", bottom_window=[2, 3]), first, "__is_unconditional__"
            )
    check_transformer(config, first, condition, grids, tmp_path, has_window="window" in prior)


def check_transformer(prior, tokenizer, condition, grids, tmp_path, has_window=False, thorough=True):
    """Train, cache, judge and sample codes of these grids, given this condition; if thorough, compare."""
    stage, key = CONDITIONS[condition]
    null = {} if condition == "none" else {"null_token": NULL, "cond_dropout": 0.5}
    torch.manual_seed(0)
    model = Net2NetTransformer(prior, tokenizer, stage, cond_stage_key=key, pkeep=0.9, **null)
    assert isinstance(model.transformer, Prior)
    metrics = fit(model, tmp_path)
    assert 0 < metrics["val/loss"] < 20 and metrics["train/grad_norm"] > 0
    batch = {key: torch.stack([item(i)[key] for i in range(2)]) for key in item(0)}
    cache = cache_of(model.eval(), tmp_path)
    model.check_cache(cache.code_header)
    cached, losses = cache.get_batch([0, 1]), []
    for each in (batch, cached):
        torch.manual_seed(0)
        losses.append(model.train().shared_step(each))
    assert torch.equal(*losses)  # with random codes and dropped conditions
    model.eval()
    x, c = model.get_xc(batch)
    parts = model.encode_conditions(c)
    tokens = torch.cat([part.flatten(1) for part in parts], dim=1)
    codes = model.encode_to_z(x)[1]
    log_prob = model.transformer.log_prob(codes, tokens)
    assert log_prob.shape == codes.shape == (2, model.first_stage_model.num_codes(HEIGHT, WIDTH))
    assert (log_prob <= 0).all()
    torch.testing.assert_close(measure_likelihood(model, batch)["nll"], -log_prob.sum(1))
    how = SamplingOptions(top_k=5, guidance=1.0 if condition == "none" else 2.0)
    ours = model.sample_codes(parts, how, generator=image_generators(0, range(2)))
    first = model.first_stage_model
    for grid, shape in zip(as_list(ours), as_list(grids), strict=True):
        assert grid.shape == (2, *shape) and grid.max() < first.codebook_size
    if not thorough:
        return
    check_images(model.log_images(batch))
    torch.testing.assert_close(model.nll(x, c), -log_prob.sum(1))
    torch.testing.assert_close(model.shared_step(batch), model.transformer.loss(codes, tokens))
    if not has_window:  # which is trained on parts
        torch.testing.assert_close(model.transformer.loss(codes, tokens), -log_prob.mean())
    if isinstance(grids, list):
        torch.testing.assert_close(flatten_codes(model.window_nll(parts, model.encode_codes(x))), -log_prob)
        if not has_window:
            logits = model(x, c)[0].float().log_softmax(-1).gather(2, codes[..., None])[..., 0]
            torch.testing.assert_close(logits, log_prob)
    images = model.generate([part[1:] for part in parts], how, generator=image_generators(0, [1]))
    assert images.shape == (1, 3, HEIGHT, WIDTH) and images.abs().max() <= 1
    want = first.decode_codes(ours)[1:].clamp(-1, 1)  # a sample does not depend on its batch
    torch.testing.assert_close(images, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("prior", PRIORS)
def test_a_step_from_a_code_cache_is_one_from_images(prior, condition, tmp_path):
    if (prior, condition) in IMPOSSIBLE:
        return
    stage, key = CONDITIONS[condition]
    states, metrics = [], []
    for cached in (False, True):
        torch.manual_seed(0)
        model = Net2NetTransformer(
            prior_config(prior, condition), QUANTIZERS["LFQ"] if prior in BITS else TOKENIZERS["VQModel"],
            stage, cond_stage_key=key, pkeep=0.9,
            **({} if condition == "none" else {"null_token": NULL, "cond_dropout": 0.5}),
        )
        items = cache_of(model.eval(), tmp_path) if cached else None
        torch.manual_seed(1)
        metrics.append(fit(model.train(), tmp_path, items))
        states.append(model.state_dict())
    shown = model.eval().log_images(items.get_batch([0, 1]))
    check_images(shown)
    assert "inputs" not in shown
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert {name: float(value) for name, value in metrics[0].items()} == metrics[1]
    fields = {field.name for field in items.code_header.fields}
    stored = {"none": set(), "class": set(), "several": {"tokens/segmentation"}}
    assert fields == {"codes", "class_label"} | stored.get(condition, {f"tokens/{key}"})


@pytest.mark.parametrize("tokenizer", TWO_LEVELS)
def test_a_code_cache_of_two_levels(tokenizer, tmp_path):
    model = build(TWO_LEVELS[tokenizer]).eval()
    cache = cache_of(model, tmp_path)
    codes = model.encode_codes(torch.stack([item(i)["image"] for i in range(2)]).permute(0, 3, 1, 2))
    batch = cache.get_batch([0, 1])
    assert [field.name for field in cache.code_header.grids] == ["codes/0", "codes/1"]
    assert all(torch.equal(batch[f"codes/{level}"], grid) for level, grid in enumerate(codes))
    assert batch["class_label"].tolist() == [0, 1]


@pytest.mark.parametrize("tokenizer", [*TOKENIZERS, *FROZEN_ONLY])
def test_a_code_cache_of_a_tokenizer_alone(tokenizer, tmp_path):
    """Its codes and labels feed any transformer over it that is given a class."""
    config = {**TOKENIZERS, **FROZEN_ONLY}[tokenizer]
    torch.manual_seed(0)
    model = Net2NetTransformer(PRIORS["GPT"], config, CONDITIONS["class"][0], cond_stage_key="class_label")
    cache = cache_of(model.first_stage_model, tmp_path)
    model.check_cache(cache.code_header)
    assert fit(model, tmp_path, cache)["train/loss"] > 0


def test_a_quantizer_of_another_size_is_named():
    config = {"target": "taming.modules.vqvae.quantize.VectorQuantizer2",
              "params": dict(n_e=8, e_dim=3, beta=0.25)}
    with pytest.raises(ValueError, match="8 codes of 3 channels: set n_embed=8 and embed_dim=3"):
        build(stage("vqgan.VQModel", quantizer_config=config))


def test_a_stage_without_the_contract_is_named_or_taken_for_tokens():
    first, prior = TOKENIZERS["VQModel"], PRIORS["GPT"]
    with pytest.raises(ValueError, match="first_stage_config: torch.nn.Identity is not a Tokenizer: derive"):
        Net2NetTransformer(prior, {"target": "torch.nn.Identity"}, "__is_unconditional__")
    model = Net2NetTransformer(prior, first, {"target": "torch.nn.Flatten"}, cond_stage_key="objects_bbox")
    assert isinstance(model.cond_stage_model, nn.Flatten) and model.cond_stages[0].kind == "tokens"
