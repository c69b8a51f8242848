"""The Llama-style prior: LlamaGen's numbers, rotary positions, conditions in a model, bad input."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from taming.checkpoint import load_model, save_exported
from taming.models.cond_transformer import Net2NetTransformer
from taming.modules.priors.llama import Llama, rotary_table, rotate
from taming.modules.priors.rar import RAR
from taming.sampling import SamplingOptions

GOLDEN = Path(__file__).parents[2] / "golden"
NULL = 10  # of the golden cases
GUIDED = {
    "greedy": {}, "greedy_cfg_1.5": dict(guidance=1.5),
    # the first code is guided, and those of 6 steps after it: numbers 0 to 5 there
    "greedy_cfg_4_interval_5": dict(guidance=4.0, guidance_interval=(0, 6)),
}


def golden(name):
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    return [
        {key.removeprefix(part): value for key, value in tensors.items() if key.startswith(part)}
        for part in ("state/", "in/", "out/")
    ]


@pytest.fixture(params=["llamagen_gpt", "llamagen_gpt_gqa"])
def case(request):
    state, given, want = golden(request.param)
    model = Llama(
        48, [1, [4, 4]], 11, n_layer=3, n_head=4, n_embd=48, n_kv_head=2 if "gqa" in request.param else None,
        ffn_dim=len(state["layers.0.feed_forward.w1.weight"]), rotate_condition=False,
    )
    model.load_state_dict(state)
    return model.eval(), given["cond"][:, None], given["idx"], want


@torch.no_grad()
def test_logits_of_llamagen(case):
    model, condition, codes, want = case
    null = torch.full_like(condition, NULL)
    logits, free = model.code_logits(codes, condition), model.code_logits(codes, null)
    close = dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, want["logits"], **close)
    torch.testing.assert_close(free, want["logits_uncond"], **close)
    torch.testing.assert_close(torch.lerp(free, logits, 1.5), want["logits_cfg_1.5"], **close)
    torch.testing.assert_close(model.loss(codes, condition), want["loss"], **close)
    torch.testing.assert_close(-model.log_prob(codes, condition).mean(), want["loss"], **close)


@pytest.mark.parametrize("name", GUIDED)
def test_samples_of_llamagen(case, name):
    model, condition, _, want = case
    null = torch.full_like(condition, NULL)
    options = SamplingOptions(greedy=True, **GUIDED[name])
    codes = model.sample(condition, (4, 4), options, null_condition=null)
    if name in want:  # it has no cache for grouped queries
        assert torch.equal(codes, want[name])
    else:
        logits = model.code_logits(codes, condition)
        free = model.code_logits(codes, null)
        scale = options.guidance_at(16)
        scales = torch.tensor([scale(t) if callable(scale) else scale for t in range(16)])[:, None]
        assert torch.equal(codes, (free + scales * (logits - free)).argmax(-1))


def test_rotary_positions_are_relative():
    """Products of queries and keys depend on the difference of rows and that of columns alone."""
    places = torch.cartesian_prod(torch.arange(3.0), torch.arange(5.0))
    q, k = torch.randn(2, 1, 2, 15, 12).double()
    products = [
        rotate(q.float(), table) @ rotate(k.float(), table).transpose(2, 3)
        for table in (rotary_table(places + shift, 12, 50.0) for shift in (0.0, torch.tensor([4.0, -2.5])))
    ]
    torch.testing.assert_close(*products, rtol=1e-4, atol=1e-4)
    across = rotate(q.float(), rotary_table(places.flip(1), 12, 50.0))
    assert not torch.allclose(across, rotate(q.float(), rotary_table(places, 12, 50.0)), atol=1e-2)


def test_rotary_angles():
    table = rotary_table(torch.tensor([[3.0, 5.0]]), 8, 100.0)
    angles = torch.tensor([3.0, 3.0 / 10, 5.0, 5.0 / 10])  # row / 100^0, row / 100^(1/2), the column the same
    torch.testing.assert_close(table[0, 0], angles.cos().repeat_interleave(2))
    torch.testing.assert_close(table[1, 0, 1::2], angles.sin())
    x = torch.randn(1, 1, 1, 8)
    pairs = torch.view_as_complex(x.view(1, 1, 1, 4, 2)) * torch.polar(torch.ones(4), angles)
    torch.testing.assert_close(rotate(x, table), torch.view_as_real(pairs).flatten(-2))


def test_places_of_a_coarser_grid_are_its_centers():
    places = Llama(5, [2, [2, 3], 1, [4, 6]], 3, n_layer=1, n_head=1, n_embd=8).places().tolist()
    assert places[:2] == [[-1, 0], [-1, 1]] and places[8] == [-2, 0]
    assert places[2:8] == [[row, column] for row in (0.5, 2.5) for column in (0.5, 2.5, 4.5)]
    assert places[9:] == [[row, column] for row in range(4) for column in range(6)]


@torch.no_grad()
def test_a_class_token_that_is_not_rotated_vanishes():
    """Its key is zero: all scores of it are 0, whatever the class; only its value is seen."""
    arguments = dict(vocab_size=7, layout=[1, [2, 2]], condition_vocab_size=4, n_layer=1, n_head=1, n_embd=8)
    for rotated in (True, False):
        model = Llama(**arguments, rotate_condition=rotated).eval()
        attention = model.layers[0].attention
        attention.wqkv.weight[16:].zero_()  # values
        codes = torch.zeros(1, 4, dtype=torch.int64)
        logits = [model.code_logits(codes, torch.tensor([[number]])) for number in (0, 1)]
        torch.testing.assert_close(logits[0][:, 1:], logits[1][:, 1:])  # nothing is seen of the class
        table = model.rotary(torch.device("cpu"))
        assert table[:, 0].any() == rotated and table[:, 1:].any()


@torch.no_grad()
def test_tables_made_in_validation_serve_training():
    model = Llama(7, [1, [2, 2]], 4, n_layer=1, n_head=1, n_embd=8)
    codes, condition = torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)
    with torch.inference_mode():
        model.loss(codes, condition)
    with torch.enable_grad():
        model.loss(codes, condition).backward()
    assert model.tok_embeddings.weight.grad.any()


@torch.no_grad()
def test_condition_and_codes_of_one_table_are_told_apart():
    model = Llama(7, [[2, 2], [2, 2]], n_layer=1, n_head=1, n_embd=8)
    marks = model.cls_embedding.part_embedding
    assert model.cls_embedding.embedding_table is None and marks.shape == (1, 8) and marks.any()
    tokens = torch.tensor([[1, 2, 3, 4]])
    x, _ = model.embed(torch.cat((tokens, tokens), 1), 0, {})
    torch.testing.assert_close(x[:, :4] - marks, x[:, 4:])
    assert Llama(7, [1, [2, 2]], 3, n_layer=1, n_head=1, n_embd=8).cls_embedding.part_embedding is None


def fused(layout, **more):
    torch.manual_seed(0)
    return Llama(7, layout, 4, n_layer=1, n_head=1, n_embd=8, fuse_grids=True, **more).eval()


@torch.no_grad()
def test_a_fused_grid_is_not_in_the_sequence():
    """Its cells are beside the position that predicts the code of their place."""
    model, plain = fused([2, [2, 3], [4, 6]]), Llama(7, [2, [2, 3], [4, 6]], 4, n_layer=1, n_head=1, n_embd=8)
    assert (model.num_condition, model.block_size) == (plain.num_condition, plain.block_size) == (8, 31)
    tokens = torch.randint(4, (2, 8 + 24))
    x, _ = model.embed(tokens, 0, {})
    assert x.shape == (2, 2 + 24, 8) and len(model.places()) == 26 and len(plain.places()) == 32
    assert model(tokens)[0].shape == plain(tokens)[0].shape == (2, 32, 7)
    for block in model.fused_features.blocks:  # let a cell show at its own place alone
        block[4].weight.zero_()
        block[4].bias.zero_()
    changed = tokens.clone()
    changed[:, 2] = (tokens[:, 2] + 1) % 4  # the upper left of 2x3 cells: 2x2 of the 4x6 codes
    before, after = (model.embed(each, 0, {})[0] for each in (tokens, changed))
    differs = (before != after).any(-1)[0].nonzero().flatten().tolist()
    assert differs == [1 + code for code in (0, 1, 6, 7)]  # the last class token predicts code 0


@torch.no_grad()
def test_a_fused_grid_alone_leaves_a_start_position():
    model = fused([[4, 6], [4, 6]])
    assert len(model.places()) == 25 and model.start_embedding.any()
    condition, codes = torch.randint(4, (2, 24)), torch.randint(7, (2, 24))
    logits = model.code_logits(codes, condition)
    assert logits.shape == (2, 24, 7)
    other = model.code_logits(codes, condition.flip(1))
    assert ((logits - other).abs().amax((0, 2)) > 1e-6).all()
    plain = fused([1, [4, 6]])
    assert plain.fused_features is None and plain.start_embedding is None  # there is no grid


@torch.no_grad()
def test_cells_of_other_grids_are_averaged_or_repeated():
    model = fused([1, [8, 6], [2, 3], [4, 6]])
    for block in model.fused_features.blocks:
        block[4].weight.zero_()
        block[4].bias.zero_()
    fine, coarse = torch.randn(1, 48, 8), torch.randn(1, 6, 8)
    features = model.fused_features([fine, coarse]).view(4, 6, 8)
    fine, coarse = fine.view(8, 6, 8), coarse.view(2, 3, 8)
    for row, column in ((0, 0), (1, 4), (3, 5)):
        want = fine[2 * row : 2 * row + 2, column].mean(0) + coarse[row // 2, column // 2]
        torch.testing.assert_close(features[row, column], want)


DDCONFIG = dict(
    double_z=False, z_channels=4, resolution=16, in_channels=3, out_ch=3, ch=8, ch_mult=[1, 1],
    num_res_blocks=1, attn_resolutions=[], dropout=0.0, num_groups=4,
)
FIRST = {"target": "taming.models.vqgan.VQModel", "params": dict(
    ddconfig=DDCONFIG, n_embed=12, embed_dim=4, lossconfig={"target": "taming.modules.losses.DummyLoss"})}
CLASSES = {"target": "taming.modules.util.Labelator", "params": {"n_classes": 7}}


def model_of(condition=CLASSES, key="class_label", prior=None, **more):
    params = dict(vocab_size=12, condition_vocab_size=8, n_layer=1, n_head=2, n_embd=8) | (prior or {})
    config = {"target": "taming.modules.priors.llama.Llama", "params": params}
    return Net2NetTransformer(config, FIRST, condition, cond_stage_key=key, **more)


def test_the_layout_comes_from_the_stages():
    model = model_of(null_token=7, cond_dropout=0.1)
    prior = model.transformer
    assert (prior.parts, prior.height, prior.width, prior.block_size) == ([1], 8, 8, 64)
    grid = model_of("__is_first_stage__", "image", prior=dict(condition_vocab_size=12))
    assert grid.transformer.parts == [(8, 8)] and grid.transformer.block_size == 127
    shared = model_of("__is_first_stage__", "image", prior=dict(condition_vocab_size=None))
    assert shared.transformer.condition_vocab_size is None


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(null_token=8, cond_dropout=0.1), "8 is outside the transformer's condition_vocab_size: 8"),
    (dict(prior=dict(condition_vocab_size=6)),
     "condition_vocab_size: 6 of the transformer is smaller than the condition's 7 tokens"),
    (dict(prior=dict(vocab_size=10)), "vocab_size: 10 .* the first stage has 12 codes, .* to 12"),
    (dict(prior=dict(vocab_size=16)), "vocab_size: 16 of the transformer, but the first stage has 12 codes"),
    (dict(prior=dict(layout=[1, [4, 4]])), "layout: .*, but the stages have "),
    (dict(prior=dict(n_embd=12)), "6 channels of a head, but rotary .* multiple of 4"),
    (dict(prior=dict(n_embd=24, n_head=3, n_kv_head=2)), "n_head: 3 is not a multiple of n_kv_head: 2"),
    (dict(prior=dict(n_embd=24, n_head=None)), "n_head is missing; n_embd: 24 is not a multiple of 64"),
])
def test_what_cannot_be_is_said(arguments, message):
    with pytest.raises(ValueError, match=message):
        model_of(**arguments)


def test_guidance_without_a_null_token_is_said():
    model = model_of().eval()
    c = model.encode_conditions(torch.tensor([3]))
    with pytest.raises(ValueError, match="guidance of 2 needs null tokens"):
        model.sample_codes(c, guidance=2.0)
    with pytest.raises(ValueError, match="guidance is 2.0, but the model has no null token"):
        SamplingOptions(guidance=2.0).check(has_null=model.null_token is not None)


def test_a_codebook_is_where_embeddings_begin():
    torch.manual_seed(0)
    model = model_of(prior=dict(embedding_from_codebook=True, n_embd=256, n_head=2))
    codes = model.first_stage_model.quantize.embedding.weight
    rows = model.transformer.tok_embeddings.weight
    distances = [torch.cdist(x, x).flatten() for x in (codes, rows)]
    assert torch.corrcoef(torch.stack(distances))[0, 1] > 0.95


@pytest.mark.parametrize("target", [Llama, RAR])
@pytest.mark.parametrize(("condition", "key"), [(CLASSES, "class_label"), ("__is_first_stage__", "image")])
def test_a_model_generates_any_size_and_is_read_back(target, condition, key, tmp_path):
    torch.manual_seed(0)
    params = dict(vocab_size=12, condition_vocab_size=13, n_layer=2, n_head=2, n_embd=16)
    params["embedding_from_codebook"] = True
    config = {"model": {"target": "taming.models.cond_transformer.Net2NetTransformer", "params": dict(
        transformer_config={"target": f"{target.__module__}.{target.__name__}", "params": params},
        first_stage_config=FIRST, cond_stage_config=condition, cond_stage_key=key, null_token=12,
    )}}
    model = Net2NetTransformer(**config["model"]["params"]).eval()
    given = torch.tensor([3]) if key == "class_label" else torch.rand(1, 3, 16, 20) * 2 - 1
    c = model.encode_conditions(given)
    how = SamplingOptions(guidance=2.0, guidance_schedule="linear", seed=4)
    codes = model.sample_codes(c, how, size=(16, 20))
    assert codes.shape == (1, 8, 10)
    assert torch.equal(codes, model.sample_codes(c, how.replace(wavefront=True), size=(16, 20)))
    again, _, _ = load_model(save_exported(model, config, tmp_path))
    assert torch.equal(again.sample_codes(c, how, size=(16, 20)), codes)
    known, mask = codes.roll(1, 2), torch.zeros(8, 10, dtype=torch.bool)
    mask[:5] = True  # a completion
    completed = model.sample_codes(c, how, size=(16, 20), known=known, mask=mask)
    assert torch.equal(completed[:, :5], known[:, :5]) and not torch.equal(completed, known)
