"""Models that save themselves with their config: bit-equal when they come back, and of the class called."""

import copy
import os
import pickle
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import nn

from taming.checkpoint import load_model
from taming.checkpoint.pretrained import Pretrained
from taming.config import ConfigError, allow_targets
from taming.models.base import ImageModel
from taming.models.cond_transformer import Net2NetTransformer
from taming.models.vqgan import EMAVQ, GumbelVQ, VQModel, VQSegmentationModel
from tests.checkpoint.test_load import EXPORTED

ROOT = Path(__file__).parents[2]
DISC = {
    "target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
    "params": {"disc_start": 1, "disc_num_layers": 1, "disc_ndf": 8, "perceptual_weight": 0.0},
}
NO_LOSS = {"target": "taming.modules.losses.DummyLoss"}
FALLING = {
    "target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler",
    "params": dict(warm_up_steps=0, max_decay_steps=9, lr_start=1.0, lr_max=1.0, lr_min=0.1),
}


def ddconfig(channels=3):
    return dict(
        double_z=False, z_channels=8, resolution=16, in_channels=channels, out_ch=channels, ch=32,
        ch_mult=[1, 1, 1], num_res_blocks=1, attn_resolutions=[], dropout=0.0,
    )


def transformer():
    stage = {
        "target": "taming.models.vqgan.VQModel",
        "params": dict(ddconfig=ddconfig(), lossconfig=NO_LOSS, n_embed=16, embed_dim=4),
    }
    gpt = {
        "target": "taming.modules.transformer.mingpt.GPT",
        "params": dict(vocab_size=16, block_size=16, n_layer=1, n_head=2, n_embd=8),
    }
    configs = OmegaConf.create(gpt), OmegaConf.create(stage)
    return Net2NetTransformer(*configs, "__is_unconditional__", pkeep=0.5)


BUILD = {
    "VQModel": lambda: VQModel(OmegaConf.create(ddconfig()), DISC, 16, 4, monitor="val/rec_loss"),
    "EMAVQ": lambda: EMAVQ(ddconfig(), NO_LOSS, 16, embed_dim=4, decay=0.9),
    "GumbelVQ": lambda: GumbelVQ(ddconfig(), DISC, 16, 4, FALLING, kl_weight=1e-3),
    "VQSegmentationModel": lambda: VQSegmentationModel(
        5, ddconfig(5), NO_LOSS, 16, embed_dim=4, image_key="s"
    ),
    "Net2NetTransformer": transformer,
}


class Odd(ImageModel):
    """A model of somebody else's package, with an argument that may be anything."""

    def __init__(self, width, thing=None):
        super().__init__()
        self.net = nn.Linear(width, 1)


def assert_equal_states(one, other):
    assert one.state_dict().keys() == other.state_dict().keys()
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def output(model):
    channels = 5 if isinstance(model, VQSegmentationModel) else 3
    x = torch.rand(1, channels, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        if isinstance(model, Net2NetTransformer):
            return model.transformer(model.encode_to_z(x)[1][:, :9])[0]
        return model(x)[0]


@pytest.mark.parametrize("name", BUILD)
def test_it_comes_back_bit_equal(name, tmp_path):
    model = BUILD[name]().eval()
    model.batches_seen = 7
    folder = model.save_pretrained(tmp_path / "saved")
    assert sorted(file.name for file in folder.iterdir()) == EXPORTED
    back = type(model).from_pretrained(str(folder))
    assert type(back) is type(model) and not back.training and back.batches_seen == 7
    assert_equal_states(back, model)
    assert torch.equal(output(back), output(model))
    for attribute in ("monitor", "image_key", "pkeep", "kl_weight"):
        assert getattr(back, attribute, None) == getattr(model, attribute, None)

    loaded, _, step = load_model(folder)  # what load_model gives can save itself, too
    assert step == 7
    again = type(model).from_pretrained(loaded.save_pretrained(tmp_path / "again"))
    assert_equal_states(again, model)
    assert (tmp_path / "again/config.yaml").read_text() == (folder / "config.yaml").read_text()


def test_the_config_is_what_the_constructor_was_given_with_names():
    model = BUILD["VQSegmentationModel"]()
    assert model.pretrained_config() == {"model": {
        "target": "taming.models.vqgan.VQSegmentationModel",
        "params": dict(
            n_labels=5, ddconfig=ddconfig(5), lossconfig=NO_LOSS, n_embed=16, embed_dim=4, image_key="s"
        ),
    }}
    given = ddconfig()
    model = VQModel(given, NO_LOSS, 16, 4)
    given["ch"] = 64  # afterwards, by its owner
    assert model.pretrained_config()["model"]["params"]["ddconfig"]["ch"] == 32
    params = BUILD["Net2NetTransformer"]().pretrained_config()["model"]["params"]
    assert type(params["first_stage_config"]) is dict and params["pkeep"] == 0.5


def test_copies_know_their_config():
    model = BUILD["VQModel"]()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.pretrained_config() == model.pretrained_config()


def test_the_checkpoint_of_a_stage_is_not_asked_for_again(tmp_path):
    stage = BUILD["VQModel"]().save_pretrained(tmp_path / "stage")
    start = VQModel(ddconfig(), DISC, 16, 4, ckpt_path=str(stage))
    folder = start.save_pretrained(tmp_path / "tuned")
    shutil.rmtree(stage)
    assert_equal_states(VQModel.from_pretrained(folder), start)


def test_another_class_is_refused_with_both_names(tmp_path):
    folder = BUILD["GumbelVQ"]().save_pretrained(tmp_path)
    for cls in (VQModel, Net2NetTransformer):
        with pytest.raises(ValueError, match=rf"GumbelVQ, not a taming.*{cls.__name__}: call GumbelVQ\.from"):
            cls.from_pretrained(folder)


def test_weights_must_all_be_there(tmp_path):
    folder = BUILD["VQModel"]().save_pretrained(tmp_path)
    state = load_file(folder / "model.safetensors")
    del state["quant_conv.bias"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing in the file: 1 \(quant_conv.bias\)"):
        VQModel.from_pretrained(folder)


def test_what_no_config_can_hold_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"Odd\(thing=\.\.\.\)\['a'\]\[0\] was given a Linear"):
        Odd(2, {"a": [nn.Linear(1, 1)]}).save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []

    class Local(Odd):
        pass

    with pytest.raises(ValueError, match="Local cannot be imported by name"):
        Local(2).save_pretrained(tmp_path)


def test_classes_of_other_packages_must_be_allowed(tmp_path):
    folder = Odd(2, Path("a/b")).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="allow_targets"):
        Odd.from_pretrained(folder)
    allow_targets(__name__)
    assert Odd.from_pretrained(folder).pretrained_config()["model"]["params"] == {"width": 2, "thing": "a/b"}


def test_without_the_hub_s_client_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it were not installed
    for name in ("someone/vqgan", Path("someone/vqgan")):
        with pytest.raises(FileNotFoundError, match=r'no folder someone/vqgan.*pip install "taming\[hub\]"'):
            VQModel.from_pretrained(name)
    with pytest.raises(ValueError, match=r'pip install "taming\[hub\]"'):
        BUILD["VQModel"]().push_to_hub("someone/vqgan")
    with pytest.raises(FileNotFoundError, match="no checkpoint at /no/such/folder"):
        VQModel.from_pretrained("/no/such/folder")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The two calls of the hub's client that are used, over a folder of repositories."""
    site = tmp_path / "site"
    asked: list[dict] = []

    class Api:
        def __init__(self, token=None):
            assert token in (None, "hf_mine")

        def create_repo(self, repo_id, *, private=None, exist_ok=False):
            (site / repo_id).mkdir(parents=True, exist_ok=exist_ok)
            return f"https://hub/{repo_id}"

        def upload_folder(self, *, repo_id, folder_path):
            shutil.copytree(folder_path, site / repo_id, dirs_exist_ok=True)

    def snapshot_download(repo_id, *, allow_patterns=None, **options):
        asked.append(options)
        if not (site / repo_id).exists():
            raise OSError(f"404: no repository {repo_id}")
        assert set(allow_patterns) == {"model.safetensors", "config.yaml"}
        return str(site / repo_id)

    client = types.ModuleType("huggingface_hub")
    client.HfApi, client.snapshot_download, client.asked = Api, snapshot_download, asked
    monkeypatch.setitem(sys.modules, "huggingface_hub", client)
    return site


def test_to_the_hub_and_back(hub):
    model = BUILD["VQModel"]()
    assert model.push_to_hub("someone/vqgan") == "https://hub/someone/vqgan"
    assert_equal_states(VQModel.from_pretrained("someone/vqgan"), model)
    with pytest.raises(FileNotFoundError, match="no folder someone/other, and the model hub gave none: 404"):
        VQModel.from_pretrained("someone/other")


def test_revision_token_and_cache_reach_the_hub(hub, tmp_path):
    model = BUILD["VQModel"]()
    model.push_to_hub("someone/vqgan", token="hf_mine")
    options = {"revision": "v1", "token": "hf_mine", "cache_dir": tmp_path / "cache"}
    assert_equal_states(load_model("someone/vqgan", VQModel, **options)[0], model)
    assert_equal_states(VQModel.from_pretrained("someone/vqgan", **options), model)
    load_model("someone/vqgan")
    assert sys.modules["huggingface_hub"].asked == [options, options, {}]


def test_a_folder_that_is_missing_is_not_looked_for_on_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "logs").mkdir()
    with pytest.raises(FileNotFoundError, match="no checkpoint at logs/gone"):
        load_model("logs/gone")
    assert sys.modules["huggingface_hub"].asked == []


def test_without_a_network_the_hub_is_one_line(monkeypatch, tmp_path):
    """With the real client, if it is installed, and an address where nothing answers."""
    code = """
import sys
from taming.checkpoint import load_model
from tests.checkpoint.test_pretrained import BUILD
for call in (lambda: BUILD["VQModel"]().push_to_hub("someone/x"), lambda: load_model("someone/x")):
    try:
        call()
    except (ValueError, FileNotFoundError) as error:
        print(type(error).__name__, len(str(error).splitlines()))
"""
    pytest.importorskip("huggingface_hub")
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["ValueError", "1", "FileNotFoundError", "1"], done.stderr


def test_every_model_has_it():
    assert issubclass(ImageModel, Pretrained)
    assert issubclass(VQModel, ImageModel) and issubclass(Net2NetTransformer, ImageModel)
