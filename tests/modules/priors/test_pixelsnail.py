"""PixelSNAIL: what each position sees, what is kept in sampling, conditions, and what it can learn."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from taming.config import instantiate_from_config
from taming.models.cond_transformer import Net2NetTransformer
from taming.modules.priors.pixelsnail import PixelSNAIL, one_hot_conv
from taming.sampling import SamplingOptions, image_generators, sample_tokens, sample_window, window_nll

GOLDEN = Path(__file__).parents[2] / "golden"
GOLDEN_ARGS = {
    "pixelsnail_top": dict(layout=[[4, 4]], n_out_res_block=0, attention=True),
    "pixelsnail_bottom": dict(
        layout=[[4, 4], [8, 8]], attention=False, n_cond_res_block=2, cond_res_channel=16
    ),
}
K = 11
LAYOUTS = {"none": [[4, 6]], "class": [1, [4, 6]], "grid": [[2, 3], [4, 6]], "both": [1, [4, 6], [4, 6]]}


def make(layout=((4, 6),), **arguments):
    torch.manual_seed(0)
    sizes = dict(channel=16, res_channel=8, kernel_size=3, n_block=2, n_res_block=1, n_head=4,
                 n_cond_res_block=1, n_out_res_block=1)
    return PixelSNAIL(K, layout, **{**sizes, **arguments}).eval()


def inputs(model, batch=2, seed=0):
    """Condition (B, M) and codes (B, N)."""
    generator = torch.Generator().manual_seed(seed)
    sizes = model.num_condition, model.height * model.width
    return tuple(torch.randint(K, (batch, size), generator=generator) for size in sizes)


@pytest.mark.parametrize("name", GOLDEN_ARGS)
@torch.no_grad()
def test_golden(name):
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    model = PixelSNAIL(
        20, channel=16, kernel_size=5, n_block=2, n_res_block=2, res_channel=16, **GOLDEN_ARGS[name]
    ).eval()
    state = {key.removeprefix("state/"): value for key, value in tensors.items() if key.startswith("state/")}
    model.load_state_dict(state)
    codes, condition = tensors["in/idx"], tensors.get("in/cond", torch.zeros(2, 1, dtype=torch.int64))
    logits = model.code_logits(codes.flatten(1), condition.flatten(1))
    want = tensors["out/logits"].flatten(2).transpose(1, 2)
    torch.testing.assert_close(logits, want, rtol=1e-5, atol=1e-5)
    loss = model.loss(codes.flatten(1), condition.flatten(1))
    torch.testing.assert_close(loss, tensors["out/loss"], rtol=1e-5, atol=0)
    greedy = model.sample(condition.flatten(1), codes.shape[1:], SamplingOptions(greedy=True))
    assert torch.equal(greedy.view_as(codes), tensors["out/greedy"])


@torch.no_grad()
def test_one_hot_conv_is_the_convolution():
    codes, weight = torch.randint(K, (2, 5, 7)), torch.randn(4, K, 2, 3)
    want = F.conv2d(F.one_hot(codes, K).permute(0, 3, 1, 2).float(), weight)
    torch.testing.assert_close(one_hot_conv(codes, weight, 4, 5).movedim(-1, 1), want)
    outside = one_hot_conv(torch.full_like(codes, K), weight, 4, 5)
    assert (outside == 0).all()


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("condition", LAYOUTS)
@torch.no_grad()
def test_a_code_is_predicted_from_those_before_it(condition, kernel_size, attention):
    model = make(LAYOUTS[condition], kernel_size=kernel_size, attention=attention)
    c, codes = inputs(model, 1)
    n = codes.shape[1]
    changed = codes.repeat(n, 1)
    changed[range(n), range(n)] = (changed.diagonal() + 1) % K
    difference = (model.code_logits(changed, c.expand(n, -1)) - model.code_logits(codes, c)).abs().amax(-1)
    assert (difference.tril() < 1e-6).all()  # (changed code, position): neither itself nor those before it
    assert (difference[:-1].amax(1) > 1e-6).all()
    if attention:
        assert difference[0, -1] > 0


@torch.no_grad()
def test_no_leak_in_bfloat16():
    model = make()
    c, codes = inputs(model, 1)
    other = codes.clone()
    other[0, 9] = (other[0, 9] + 1) % K
    with torch.autocast("cpu", torch.bfloat16):
        before, after = (model.code_logits(each, c) for each in (codes, other))
    assert torch.equal(before[:, :10], after[:, :10]) and not torch.equal(before[:, 10], after[:, 10])


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("condition", LAYOUTS)
@torch.no_grad()
def test_what_is_kept_gives_the_same_logits(condition, attention):
    model = make(LAYOUTS[condition], attention=attention, kernel_size=5)
    c, codes = inputs(model)
    want = model.code_logits(codes, c)  # (B, N, V)
    tokens, m = torch.cat((c, codes), dim=1), model.num_condition
    for given in (0, 1, 5, 6, 13, 23):  # codes known at the start
        cache = model.new_cache(2, model.block_size)
        got = [model.extend(tokens[:, : m + given], cache)]
        for i in range(given, 23):
            got.append(model.extend(tokens[:, m + i : m + i + 1], cache))
        torch.testing.assert_close(torch.stack(got, dim=1), want[:, given:], rtol=1e-4, atol=1e-5)
        assert cache.length == model.block_size
    logits, _ = model(tokens[:, : m + 9])
    torch.testing.assert_close(logits[:, m - 1 :], want[:, :10], rtol=1e-4, atol=1e-5)
    assert (logits[:, : m - 1] == 0).all()


@torch.no_grad()
def test_a_cache_starts_again():
    model = make(LAYOUTS["grid"])
    (c, codes), (c2, codes2) = inputs(model), inputs(model, seed=1)
    cache = model.new_cache(2, model.block_size)
    model.extend(torch.cat((c, codes[:, :20]), dim=1), cache)
    cache.length = 0
    model.extend(c2, cache)
    got = model.extend(codes2[:, :8], cache)  # several at once
    torch.testing.assert_close(got, model.code_logits(codes2, c2)[:, 8], rtol=1e-4, atol=1e-5)
    cache.length = 0
    model.extend(torch.cat((c2, codes2[:, :23]), dim=1), cache)
    with pytest.raises(ValueError, match="all 4x6 codes are there"):
        model.extend(codes2[:, :1], cache)


@torch.no_grad()
def test_samples():
    model = make(LAYOUTS["class"])
    c, _ = inputs(model, 3)
    how = SamplingOptions(top_k=5, top_p=0.9, temperature=0.8)
    ours = model.sample(c, (4, 6), how, generator=image_generators(0, range(3)))
    assert ours.shape == (3, 24)
    again = model.sample(c[1:2], (4, 6), how, generator=image_generators(0, [1]))
    assert torch.equal(ours[1:2], again)
    greedy = model.sample(c, (4, 6), SamplingOptions(greedy=True))
    assert torch.equal(greedy, model.code_logits(greedy, c).argmax(-1))
    cold = model.sample(c, (4, 6), SamplingOptions(temperature=1e-4), generator=image_generators(0, range(3)))
    assert torch.equal(cold, greedy)
    null = torch.full_like(c, K - 1)
    guided = model.sample(c, (4, 6), SamplingOptions(greedy=True, guidance=3.0), null_condition=null)
    given, other = (model.code_logits(guided, each) for each in (c, null))
    assert torch.equal(guided, torch.lerp(other, given, 3.0).argmax(-1))
    with pytest.raises(ValueError, match="temperature must be above 0"):
        model.sample(c, (4, 6), SamplingOptions(temperature=0.0))


@pytest.mark.parametrize("stride", [1, 3])
@torch.no_grad()
def test_a_window_slides(stride):
    model = make([[4, 4], [4, 4]])
    grid = torch.randint(K, (2, 6, 9))
    codes = sample_window(model, grid, SamplingOptions(greedy=True, stride=stride), window=(4, 4))
    assert codes.shape == (2, 6, 9)
    if stride == 1:
        waves = sample_window(model, grid, SamplingOptions(greedy=True, wavefront=True), window=(4, 4))
        assert torch.equal(codes, waves)
        nll = window_nll(model, grid, codes, window=(4, 4))
        assert (nll <= math.log(K)).all()  # the most likely code each time
    same = sample_window(model, grid[:, :4, :4], SamplingOptions(greedy=True), window=(4, 4))
    assert torch.equal(
        same.flatten(1), model.sample(grid[:, :4, :4].flatten(1), (4, 4), SamplingOptions(greedy=True))
    )


@torch.no_grad()
def test_conditions_reach_the_first_code():
    for name in ("class", "grid", "both"):
        model = make(LAYOUTS[name])
        c, codes = inputs(model)
        for i in range(model.num_condition):
            other = c.clone()
            other[:, i] = (other[:, i] + 1) % K
            changed = (model.code_logits(codes, c) - model.code_logits(codes, other)).abs().amax((0, 2))
            assert changed.max() > 0
            if i == 0:
                assert changed[0] > 0
    model = make()
    c, codes = inputs(model)
    # a start token is not read
    assert torch.equal(model.code_logits(codes, c), model.code_logits(codes, c + 1))


@torch.no_grad()
def test_loss_at_the_start_is_that_of_chance():
    for attention in (True, False):
        model = PixelSNAIL(
            512, [[8, 8]], channel=64, res_channel=64, n_block=2, n_res_block=2, attention=attention
        )
        codes = torch.randint(512, (8, 64))
        assert abs(model.loss(codes, torch.zeros(8, 1, dtype=torch.int64)) - math.log(512)) < 0.2


@pytest.mark.parametrize(("layout", "channel", "want"), [
    ([[32, 32]], 256, 84.9), ([[32, 32], [64, 64]], 256, 89.8), ([[16, 16]], 256, 87.1),
])
def test_published_sizes(layout, channel, want):
    """In millions: the top and the bottom level of VQ-VAE-2 as rosinality built them, and a grid of VQGAN."""
    with torch.device("meta"):
        model = PixelSNAIL(
            1024 if layout == [[16, 16]] else 512, layout, channel=channel, res_channel=256,
            attention=len(layout) == 1,
        )
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == want


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(layout=[7, [4, 6]]), "a class or grids of codes as a condition, not a sequence of 7 tokens"),
    (dict(layout=[[3, 3], [4, 6]]), "a condition of 3x3 codes does not fit 4x6 codes of the image"),
    (dict(layout=[[2, 6], [4, 6]]), "a condition of 2x6 codes does not fit"),
    (dict(layout=[[8, 12], [4, 6]]), "a condition of 8x12 codes does not fit"),
    (dict(layout=[1, 24]), "the codes are a grid"),
    (dict(kernel_size=4), "kernel_size: 4 and cond_res_kernel: 3 must be odd"),
    (dict(channel=20), "channel: 20 is not a multiple of 2 \\* n_head: 8"),
])
def test_sizes_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_values_out_of_range():
    config = {"target": "taming.modules.priors.pixelsnail.PixelSNAIL", "params": {"vocab_size": 1}}
    with pytest.raises(ValueError, match="vocab_size: 1; it must be a whole number of at least 2"):
        instantiate_from_config({**config, "params": {"vocab_size": 1, "layout": [[4, 4]]}})
    model = make(LAYOUTS["class"])
    c, codes = inputs(model)
    with pytest.raises(ValueError, match=r"25 tokens are not 1 of the condition and fewer than 4x6 codes"):
        model(torch.cat((c, codes), dim=1))
    with pytest.raises(ValueError, match="need a block size of 25"):
        sample_tokens(model, torch.cat((c, codes[:, :2]), dim=1), 23)


# ---- in Net2NetTransformer


def stage(side=32):
    return {"target": "taming.models.vqgan.VQModel", "params": dict(
        ddconfig=dict(double_z=False, z_channels=8, resolution=side, in_channels=3, out_ch=3, ch=8,
                      ch_mult=[1, 1, 1], num_res_blocks=1, attn_resolutions=[], dropout=0.0, num_groups=4),
        lossconfig={"target": "taming.modules.losses.DummyLoss"}, n_embed=K, embed_dim=4,
    )}


def net2net(cond="__is_unconditional__", cond_stage_key="image", sizes=(), **arguments):
    small = dict(vocab_size=K, channel=8, res_channel=8, n_head=2, n_block=1, n_res_block=1)
    prior = {"target": "taming.modules.priors.pixelsnail.PixelSNAIL", "params": small | dict(sizes)}
    return Net2NetTransformer(prior, stage(), cond, cond_stage_key=cond_stage_key, **arguments)


def test_the_layout_is_that_of_the_stages():
    assert net2net().transformer.parts == [] and net2net().transformer.block_size == 64
    model = net2net(stage(), "depth", downsample_cond_size=16)
    assert model.transformer.parts == [(4, 4)] and model.transformer.block_size == 16 + 64 - 1
    net2net(sizes={"layout": [[8, 8]]})
    with pytest.raises(ValueError, match=r"layout: \[\[4, 16\]\], but the stages have \[\[8, 8\]\]: "):
        net2net(sizes={"layout": [[4, 16]]})
    with pytest.raises(ValueError, match="does not accept 'block_size'"):
        net2net(sizes={"block_size": 64})


def test_another_order_of_the_codes_is_not_allowed():
    order = {"target": "taming.modules.transformer.permuter.ZCurve", "params": {"H": 8, "W": 8}}
    with pytest.raises(ValueError, match="permuter_config: PixelSNAIL reads the codes in raster order"):
        net2net(permuter_config=order)


@pytest.mark.slow
@pytest.mark.parametrize("attention", [True, False])
def test_what_it_learns(attention):
    """The last row repeats the first code, seen by attention alone: convolutions see 5 of 7 rows."""
    torch.manual_seed(0)
    model = PixelSNAIL(
        4, [[8, 3]], channel=32, res_channel=32, kernel_size=3, n_block=1, n_res_block=1, n_head=4,
        attention=attention, dropout=0.0,
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    start = torch.zeros(64, 1, dtype=torch.int64)
    for _ in range(200):
        codes = torch.randint(4, (64, 24))
        codes[:, 21:] = codes[:, :1]
        nll = -model.log_prob(codes, start)
        optimizer.zero_grad()
        nll[:, 21:].mean().backward()
        optimizer.step()
    assert nll[:, 22:].mean() < 0.1  # a copy of the code to the left
    assert nll[:, 21].mean() < 0.1 if attention else nll[:, 21].mean() > 1.2  # ln 4 = 1.386
