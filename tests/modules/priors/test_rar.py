"""RAR: the numbers of its authors' code, orders and their schedule, what a code is predicted from."""

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from taming.checkpoint.families import identify
from taming.config import instantiate_from_config
from taming.models.cond_transformer import Net2NetTransformer
from taming.modules.priors.rar import RAR
from taming.sampling import SamplingOptions

GOLDEN = Path(__file__).parents[2] / "golden"
NULL = 10


@pytest.fixture(scope="module")
def golden():
    tensors = load_file(GOLDEN / "rar.safetensors")
    state, given, want = (
        {key.removeprefix(part): value for key, value in tensors.items() if key.startswith(part)}
        for part in ("state/", "in/", "out/")
    )
    published = identify(state)
    model = instantiate_from_config(published.model)
    model.load_state_dict(published.state)
    return model.eval(), given["cond"][:, None], given["idx"], given["orders"], want


CLOSE = dict(rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_logits_of_the_publication(golden):
    model, condition, codes, orders, want = golden
    everything = torch.cat((condition, codes), dim=1)
    torch.testing.assert_close(model(everything)[0], want["logits_raster"], **CLOSE)
    torch.testing.assert_close(model.code_logits(codes, condition), want["logits_raster"][:, :-1], **CLOSE)
    torch.testing.assert_close(model.loss(codes, condition), want["loss_raster"], **CLOSE)
    null = torch.full_like(condition, NULL)
    torch.testing.assert_close(model(torch.cat((null, codes), 1))[0], want["logits_uncond_raster"], **CLOSE)
    logits = model.code_logits(codes, condition, orders)
    by_order = logits.gather(1, orders[..., None].expand(-1, -1, logits.shape[2]))
    torch.testing.assert_close(by_order, want["logits_orders"][:, :-1], **CLOSE)
    assert torch.equal(codes.gather(1, orders), want["labels_orders"])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), codes.flatten())
    torch.testing.assert_close(loss, want["loss_orders"], **CLOSE)


def test_samples_of_the_publication(golden):
    model, condition, _, _, want = golden
    options = SamplingOptions(
        greedy=True, guidance=4.0, guidance_schedule="power-cosine", guidance_power=2.75
    )
    codes = model.sample(condition, (4, 4), options, null_condition=torch.full_like(condition, NULL))
    assert torch.equal(codes, want["greedy_cfg_4_pow_2.75"])


def make(**arguments):
    torch.manual_seed(0)
    sizes = dict(condition_vocab_size=5, n_layer=2, n_head=2, n_embd=16)
    return RAR(7, [1, [3, 4]], **sizes | arguments)


def test_orders_become_raster():
    model = make(random_until=100, raster_from=300)
    shares = []
    for batches in (0, 99, 100, 150, 250, 299, 300, 10_000):
        model.set_batches_seen(batches)
        shares.append(model.random_share)
    assert shares == [1.0, 1.0, 1.0, 0.75, 0.25, 0.005, 0.0, 0.0]
    assert make().random_share == 0.0


def test_each_item_has_an_order_of_its_own():
    model, raster = make(random_until=100, raster_from=300), torch.arange(12)
    orders = model.sample_orders(300)
    assert torch.equal(orders.sort(1).values, raster.expand(300, -1))  # permutations
    assert len({tuple(order) for order in orders.tolist()}) == 300
    model.set_batches_seen(200)
    share = (model.sample_orders(2000) == raster).all(1).float().mean()
    assert 0.45 < share < 0.55
    torch.manual_seed(3)
    first = model.sample_orders(8)
    torch.manual_seed(3)
    assert torch.equal(model.sample_orders(8), first)
    model.set_batches_seen(300)
    assert model.sample_orders(8) is None
    model.set_batches_seen(0)
    assert model.eval().sample_orders(8) is None


@torch.no_grad()
def test_a_code_is_predicted_from_those_before_it_in_the_order():
    model = make().eval()
    for parameter in model.parameters():
        parameter.normal_(0, 0.3)
    codes, condition = torch.randint(7, (4, 12)), torch.randint(5, (4, 1))
    orders = torch.rand(4, 12).argsort(1)
    want = model.code_logits(codes, condition, orders)
    places = orders.argsort(1)  # when each place is read
    for place in range(12):
        other = codes.clone()
        other[:, place] = (other[:, place] + 1) % 7
        changed = ((model.code_logits(other, condition, orders) - want).abs() > 1e-5).any(2)
        assert torch.equal(changed, places > places[:, place, None])
    raster = torch.arange(12).expand(4, -1)
    plain = model.code_logits(codes, condition)
    torch.testing.assert_close(model.code_logits(codes, condition, raster), plain)


def test_training_is_in_random_orders_and_evaluation_is_not():
    model = make(random_until=10, raster_from=10)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    codes, condition = torch.randint(7, (4, 12)), torch.randint(5, (4, 1))
    assert model.loss(codes, condition) != model.loss(codes, condition)
    model.eval()
    fixed = model.loss(codes, condition)
    assert fixed == model.loss(codes, condition)
    model.train().set_batches_seen(10)
    assert fixed == model.loss(codes, condition)


DDCONFIG = dict(
    double_z=False, z_channels=4, resolution=16, in_channels=3, out_ch=3, ch=8, ch_mult=[1, 1],
    num_res_blocks=1, attn_resolutions=[], dropout=0.0, num_groups=4,
)


def test_a_model_in_training_counts_its_batches(tmp_path):
    """The order schedule counts what the model has learned from, after a resume as well."""
    torch.manual_seed(0)
    first = {"target": "taming.models.vqgan.VQModel", "params": dict(
        ddconfig=DDCONFIG, n_embed=7, embed_dim=4, lossconfig={"target": "taming.modules.losses.DummyLoss"})}
    prior = {"target": "taming.modules.priors.rar.RAR", "params": dict(
        vocab_size=7, condition_vocab_size=5, n_layer=1, n_head=2, n_embd=8, random_until=2, raster_from=9)}
    classes = {"target": "taming.modules.util.Labelator", "params": {"n_classes": 4}}
    model = Net2NetTransformer(prior, first, classes, cond_stage_key="class_label")
    model.learning_rate, model.batches_seen = 1e-3, 4
    seen = []
    model.transformer.register_forward_pre_hook(lambda module, given: seen.append(module.random_share))
    items = [{"image": torch.rand(16, 16, 3), "class_label": torch.tensor(i % 4)} for i in range(6)]
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )
    trainer.fit(model, DataLoader(items, batch_size=2))
    assert seen == [5 / 7, 4 / 7, 3 / 7] and model.batches_seen == 7
    assert not any("batches_seen" in key for key in model.transformer.state_dict())


def test_orders_that_cannot_be_are_said():
    with pytest.raises(ValueError, match="raster_from: 5 batches come before random_until: 9"):
        make(random_until=9, raster_from=5)
