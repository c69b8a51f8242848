"""Compiled blocks, and blocks that are computed again for the backward pass: same steps, same names."""

import copy
import logging

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from taming.config import instantiate_from_config
from taming.training import acceleration
from taming.training.acceleration import accelerate
from tests.test_contracts import CONDITIONS, PRIORS, TOKENIZERS, item

EAGER = {"compile": {"backend": "aot_eager"}}  # all of the compiler but the code generator
BOTH = {"compile": {"backend": "aot_eager"}, "activation_checkpointing": True}


def tokenizer():
    torch.manual_seed(0)
    return instantiate_from_config(TOKENIZERS["VQModel"])


def transformer():
    torch.manual_seed(0)
    stage, key = CONDITIONS["class"]
    prior = {**PRIORS["GPT"], "params": {**PRIORS["GPT"]["params"], "resid_pdrop": 0.3}}
    return instantiate_from_config({
        "target": "taming.models.cond_transformer.Net2NetTransformer",
        "params": dict(transformer_config=prior, first_stage_config=TOKENIZERS["VQModel"],
                       cond_stage_config=stage, cond_stage_key=key, first_stage_key="image"),
    })


def train(model, lightning, batches=3):
    """Train a few batches and return the weights, and what the model's file would hold."""
    accelerate(model, lightning)
    model.learning_rate = 1e-3
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )
    torch.manual_seed(1)
    trainer.fit(model, torch.utils.data.DataLoader([item(i) for i in range(2 * batches)], batch_size=2))
    assert model.batches_seen == batches
    return model.state_dict()


@pytest.mark.parametrize("make", [tokenizer, transformer])
def test_recomputed_blocks_take_the_same_steps_bit_for_bit(make):
    plain, recomputed = train(make(), {}), train(make(), {"activation_checkpointing": True})
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[key], recomputed[key]) for key in plain)


def test_that_it_compiles_is_said_before_the_first_batch(capsys):
    model = transformer()
    accelerate(model, {"activation_checkpointing": True})
    assert capsys.readouterr().out == ""
    accelerate(model, {"compile": True})
    assert f"{len(model.blocks())} blocks are compiled in the first batches" in capsys.readouterr().out


@pytest.mark.parametrize("make", [tokenizer, transformer])
def test_steps_in_one_kernel_are_those_of_plain_operators(make, monkeypatch):
    model = make()
    assert model.has_fused_step
    fused = train(model, {})
    monkeypatch.setattr(type(model), "has_fused_step", False)
    plain = train(make(), {})
    for key, value in plain.items():
        if key.endswith(("k.bias", "key.bias")):  # their gradient is rounding alone, which Adam makes large
            continue
        torch.testing.assert_close(fused[key], value, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: key)


def transgan():
    torch.manual_seed(0)
    return instantiate_from_config({
        "target": "taming.models.transgan.TransGAN",
        "params": dict(
            generator=dict(resolution=[16, 24], dim=16, depths=[1, 1], latent_dim=8, heads=2),
            discriminator=dict(resolution=[16, 24], dim=16, depth=2, heads=2, patch_size=4), n_critic=1,
            loss="wgangp", gp_weight=10.0,
        ),
    })


def with_r1(name):
    torch.manual_seed(0)
    config = copy.deepcopy(TOKENIZERS["VQModel"])
    config["params"]["lossconfig"]["params"] |= dict(
        disc_config={"target": f"taming.modules.discriminator.{name}", "params": {}}, disc_start=0,
        disc_num_layers=3, disc_ndf=64, r1_weight=1.0, r1_every=1,
    )
    return instantiate_from_config(config)


@pytest.mark.parametrize("lightning", [{"activation_checkpointing": True}, BOTH],
                         ids=["recomputed", "compiled and recomputed"])
@pytest.mark.parametrize("make", [
    transgan, lambda: with_r1("blur.BlurPoolDiscriminator"),
], ids=["gradient penalty", "R1"])
def test_a_discriminator_that_is_differentiated_twice_takes_the_same_steps(make, lightning):
    plain, other = train(make(), {}, 2), train(make(), lightning, 2)
    assert plain.keys() == other.keys()
    for key, value in plain.items():
        torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: key)


def test_a_block_can_be_differentiated_several_times():
    """The adaptive weight keeps the graph: each pass computes the block again, and marks it as such."""
    block, marks = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), []
    block[0].register_forward_pre_hook(lambda *_: marks.append(acceleration.is_recomputing()))
    forward = acceleration._checkpointed(block, block.forward)
    x = torch.rand(2, 3, requires_grad=True)
    out = forward(x).sum()
    (first,) = torch.autograd.grad(out, x, retain_graph=True)
    (second,) = torch.autograd.grad(out, x)
    assert torch.equal(first, second) and marks == [False, True, True]
    assert not acceleration.is_recomputing()


@pytest.mark.parametrize("lightning", [EAGER, BOTH], ids=["compiled", "compiled and recomputed"])
@pytest.mark.parametrize("make", [tokenizer, transformer])
def test_compiled_blocks_take_the_same_steps_and_keep_their_names(make, lightning):
    plain, compiled = train(make(), {}), train(make(), lightning)
    assert plain.keys() == compiled.keys()
    for key, value in plain.items():
        torch.testing.assert_close(compiled[key], value, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: key)


@pytest.mark.slow
def test_generated_code_takes_the_same_steps():
    models = transformer(), transformer()
    for model in models:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # generated code makes other random numbers
    plain, compiled = train(models[0], {}), train(models[1], {"compile": True})
    for key, value in plain.items():
        torch.testing.assert_close(compiled[key], value, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: key)


def test_blocks_are_the_composite_parts_of_what_is_trained():
    names = set(tokenizer().blocks())
    assert names == {
        *(f"encoder.down.{i}" for i in range(3)), "encoder.mid", *(f"decoder.up.{i}" for i in range(3)),
        "decoder.mid", "loss.discriminator",
    }
    assert set(transformer().blocks()) == {"transformer.blocks.0"}


def test_recomputation_saves_memory():
    """Fewer bytes are kept for the backward pass."""
    def kept(lightning):
        model, total = tokenizer(), 0
        accelerate(model, lightning)

        def pack(tensor):
            nonlocal total
            total += tensor.nbytes
            return tensor

        x = torch.rand(2, 3, 16, 24)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(x)[0].sum()
        return total

    assert kept({"activation_checkpointing": True}) < 0.5 * kept({})


def test_a_block_that_does_not_compile_is_named_once_and_runs_as_it_is(monkeypatch, caplog):
    def broken(function, **options):
        def compiled(*args, **kwargs):
            if function.__self__ is model.encoder.mid:
                raise RuntimeError("no code for this\nmore")
            return function(*args, **kwargs)
        return compiled

    monkeypatch.setattr(acceleration.torch, "compile", broken)
    model = tokenizer()
    with caplog.at_level(logging.WARNING):
        compiled = train(model, {"compile": True})
    notes = [record.getMessage() for record in caplog.records if "does not compile" in record.getMessage()]
    assert notes == ["note: encoder.mid does not compile and runs as it is (RuntimeError: no code for this)"]
    plain = train(tokenizer(), {})
    assert all(torch.equal(plain[key], compiled[key]) for key in plain)
    model = tokenizer()
    with pytest.raises(ValueError, match=r"encoder\.mid does not compile .*no code for this"):
        train(model, {"compile": {"on_failure": "stop"}})


def test_blocks_outside_of_a_training_step_are_not_compiled(monkeypatch):
    def never(function, **options):
        def compiled(*args, **kwargs):
            raise AssertionError("compiled")
        return compiled

    monkeypatch.setattr(acceleration.torch, "compile", never)
    model = tokenizer()
    accelerate(model, {"compile": True})
    model.eval()(torch.rand(1, 3, 16, 24))
    with torch.no_grad():
        model.train()(torch.rand(1, 3, 16, 24))


@pytest.mark.parametrize(("lightning", "message"), [
    ({"compile": "yes"}, "lightning.compile: 'yes' must be True, False, or a mapping with mode"),
    ({"compile": {"mod": "default"}}, "lightning.compile: mod is unknown"),
    ({"compile": {"on_failure": "ignore"}}, "lightning.compile: ignore is unknown"),
    ({"compile": {"backend": "nope"}}, "lightning.compile: {'backend': 'nope'} is not possible .*nope"),
    ({"compile": {"mode": "nope"}}, "lightning.compile: {'mode': 'nope'} is not possible .*nope"),
    ({"activation_checkpointing": 1}, "lightning.activation_checkpointing: 1 must be True or False"),
])
def test_wrong_settings_end_in_one_line(lightning, message):
    with pytest.raises(ValueError, match=message):
        accelerate(tokenizer(), lightning)


def test_a_model_without_blocks_says_so():
    from taming.models.base import ImageModel

    with pytest.raises(ValueError, match="ImageModel names no blocks"):
        accelerate(ImageModel(), {"activation_checkpointing": True})
