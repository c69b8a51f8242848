"""Merged in order, refused with the file or key named, and unable to run what is not allowed."""

import logging
import sys
import textwrap

import pytest
import torch
from omegaconf import OmegaConf

from taming import config
from taming.config import (
    ConfigError,
    allow_targets,
    get_obj_from_str,
    instantiate_from_config,
    load_config,
    missing_keys,
    run_directory,
)
from taming.parameters import find_problem


@pytest.fixture
def write(tmp_path):
    """Write text to a file in a temporary folder and return its path."""

    def _write(name, text):
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        return path

    return _write


@pytest.fixture
def package(write, monkeypatch, tmp_path):
    """A package of somebody else, importable as `stranger`."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "stranger").mkdir()
    write("stranger/__init__.py", "")
    write("stranger/models.py", """
        import os
        from functools import partial

        class Plain:
            def __init__(self, size, *, depth=2, **options):
                self.size, self.depth, self.options = size, depth, options

        class Broken:
            def __init__(self, size=1):
                raise TypeError("unsupported operand, deep inside")

        class _Hidden: pass

        def make(size=3): return [size]

        value = 5
    """)
    write("stranger/optional.py", "import webdataset_that_is_not_there")
    write("stranger/wrong.py", "from os import no_such_thing")
    yield "stranger"
    for name in [name for name in sys.modules if name.split(".")[0] == "stranger"]:
        del sys.modules[name]


# ---- files ----


def test_files_merge_left_to_right_then_the_command_line(write):
    first = write("a.yaml", "model: {rate: 4.5e-6, params: {dim: 256, codes: 1024}}\ndata: {size: 8}\n")
    second = write("b.yaml", "model: {params: {dim: 64}}\nextra: ${data.size}\n")
    merged = load_config([first, str(second)], ["model.params.codes=16", "data.list=[1,2]", "data.rate=1e-4"])
    assert merged.model.rate == 4.5e-6 and merged.model.params == {"dim": 64, "codes": 16}
    assert merged.data.list == [1, 2] and merged.data.rate == 1e-4 and merged.extra == 8
    assert load_config([second, first]).model.params.dim == 256


def test_one_path_and_an_empty_file(write):
    assert load_config(write("a.yaml", "x: 1")) == {"x": 1}
    assert load_config([write("empty.yaml", "# nothing yet\n")], ["x=2"]) == {"x": 2}


def test_a_section_as_one_word_of_the_command_line(write):
    word = "data={target: main.DataModuleFromConfig, params: {batch_size: 2}}"
    assert load_config([write("a.yaml", "x: 1")], [word]).data.params.batch_size == 2


@pytest.mark.parametrize("text, message", [
    ("a: [1,\n", "not valid YAML"),
    ("- 1\n- 2\n", "must hold a mapping.*not a sequence"),
    ("just words", "must hold a mapping.*not a scalar"),
    ("a: 1\na: 2\n", "duplicate key a"),
    ("a: !!python/object/apply:os.system ['false']\n", "could not determine a constructor"),
    ("a: ${b\n", "not valid YAML"),
])
def test_a_bad_file_is_named(write, text, message):
    with pytest.raises(ConfigError, match=f"(?s)bad.yaml.*{message}"):
        load_config([write("ok.yaml", "a: 1"), write("bad.yaml", text)])


def test_a_file_of_bytes_is_named(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"PK\x03\x04\xff\xfe\x00")
    with pytest.raises(ConfigError, match="model.ckpt is not valid YAML"):
        load_config([tmp_path / "model.ckpt"])


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.yaml does not exist"):
        load_config([tmp_path / "nowhere.yaml"])
    with pytest.raises(FileNotFoundError, match="is a folder"):
        load_config([tmp_path])


@pytest.mark.parametrize("item", ["novalue", "=3", "a..b=1", ".a=1", "a=[1,", "a=${b"])
def test_a_bad_override_is_quoted(item):
    with pytest.raises(ConfigError) as caught:
        load_config([], [item])
    assert repr(item) in str(caught.value)


def test_what_does_not_merge_is_named(write):
    first, second = write("a.yaml", "list: [1]"), write("b.yaml", "list: {a: 1}")
    with pytest.raises(ConfigError, match="b.yaml does not fit"):
        load_config([first, second])


# ---- objects ----


def test_it_builds_what_the_mapping_describes():
    layer = instantiate_from_config({"target": "torch.nn.Conv2d", "params": {
        "in_channels": 3, "out_channels": 5, "kernel_size": 1}})
    assert type(layer) is torch.nn.Conv2d and layer.weight.shape == (5, 3, 1, 1)
    for description in ({"target": "torch.nn.Identity"}, {"target": "torch.nn.Identity", "params": None}):
        assert isinstance(instantiate_from_config(description), torch.nn.Identity)


def test_extra_arguments_win():
    made = instantiate_from_config({"target": "torch.nn.Dropout", "params": {"p": 0.1}}, p=0.7, inplace=True)
    assert made.p == 0.7 and made.inplace


def test_params_arrive_as_plain_containers(package):
    allow_targets("stranger")
    loaded = OmegaConf.create({
        "width": 7,
        "model": {"target": "stranger.models.Plain", "params": {
            "size": "${width}", "sub": {"target": "torch.nn.Identity", "sizes": [1, "${width}"]}}},
    })
    made = instantiate_from_config(loaded.model)
    assert made.size == 7 and made.options == {"sub": {"target": "torch.nn.Identity", "sizes": [1, 7]}}
    assert type(made.options["sub"]) is dict and type(made.options["sub"]["sizes"]) is list
    nested = instantiate_from_config({"target": "stranger.models.Plain", "params": {"size": [loaded.model]}})
    assert type(nested.size[0]) is dict
    assert loaded.model.params.size == 7, "the configuration itself is left alone"


@pytest.mark.parametrize("params, message", [
    ({"size": "${nowhere}"}, "stranger.models.Plain.*nowhere"),
    ({"size": "???"}, r"^params.size of target stranger.models.Plain is \?{3}, .*: add params.size=\.{3} to"),
    ([1], "must be a mapping"),
])
def test_params_that_cannot_be_read(package, params, message):
    allow_targets("stranger")
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        instantiate_from_config(OmegaConf.create({"target": "stranger.models.Plain", "params": params}))


@pytest.mark.parametrize("bad, message", [
    ({"params": {}, "base_learning_rate": 1}, 'key "target" to instantiate.*params, base_learning_rate'),
    ("__is_first_stage__", "expected a mapping.*__is_first_stage__"),
    (None, "expected a mapping"),
    ({"target": 5}, "dotted path.*5"),
    ({"target": "VQModel"}, "dotted path.*'VQModel'"),
])
def test_what_is_no_description_is_shown(bad, message):
    with pytest.raises(ConfigError, match=message):
        instantiate_from_config(bad)


def test_an_unknown_key_shows_the_closest_and_all_names():
    with pytest.raises(ConfigError) as caught:
        instantiate_from_config({"target": "torch.nn.Dropout", "params": {"inplac": True}})
    assert str(caught.value) == (
        "target torch.nn.Dropout does not accept 'inplac' (did you mean inplace?); it accepts: p, inplace"
    )


def test_values_that_the_user_must_give_are_listed():
    config = OmegaConf.create({"a": {"b": "???", "c": "${a.b}"}, "d": [1, {"e": "???"}], "f": "??"})
    assert missing_keys(config) == ["a.b", "d.1.e"]


def test_missing_keys_are_all_named():
    with pytest.raises(ConfigError, match="needs 'out_channels', 'kernel_size' in its params.*in_channels"):
        instantiate_from_config({"target": "torch.nn.Conv2d", "params": {"in_channels": 3}})


def test_keyword_arguments_of_our_classes_belong_to_the_parent():
    class Parent:
        def __init__(self, size, depth=1):
            self.size = size

    class Child(Parent):
        def __init__(self, labels, *args, **kwargs):
            super().__init__(*args, **kwargs)

    Child.__module__ = "taming.models.test"
    problem = find_problem(Child, {"labels": 3, "size": 1, "dept": 2})
    assert "'dept' (did you mean depth?)" in problem and problem.endswith(": labels, size, depth")
    assert find_problem(Child, {"labels": 3, "size": 1, "depth": 2}) is None


def test_a_network_without_a_constructor_takes_nothing():
    with pytest.raises(ConfigError, match="DummyLoss does not accept 'disc_start'; it accepts: nothing"):
        instantiate_from_config({"target": "taming.modules.losses.DummyLoss", "params": {"disc_start": 1}})


def test_errors_inside_the_constructor_keep_their_type_and_message(package):
    allow_targets("stranger")
    with pytest.raises(TypeError, match="deep inside") as caught:
        instantiate_from_config({"target": "stranger.models.Broken", "params": {"size": 2}})
    assert caught.value.__notes__ == ["(while building the target stranger.models.Broken)"]


# ---- what may be named ----


@pytest.mark.parametrize("target", [
    # not on the list
    "os.system", "subprocess.Popen", "builtins.eval", "torch.load", "torch.hub.load", "numpy.load",
    "torch.utils.cpp_extension.load", "torchvision.models.resnet50", "torchvision.datasets.FakeData",
    "taming_evil.models.Model", "pytorch_lightning.Trainer", "pytorch_lightning.utilities.rank_zero_only",
    # what an allowed module imports, reached through it
    "taming.data.custom.Path", "taming.models.vqgan.torch", "torch.optim.lr_scheduler.partial",
    "torch.nn.modules.module.OrderedDict", "torch.optim.lr_scheduler.types", "taming.config.os.system",
    "torch.nn.modules.module.functools.partial", "torch.optim.optimizer.warnings.warn",
    "taming.modules.losses.vqperceptual.torch.load",
    # functions, where only classes may be named
    "torch.nn.utils.clip_grad_norm_", "torch.nn.init.normal_",
    "pytorch_lightning.loggers.wandb.rank_zero_only",
    # our own machinery: it would widen the list, write files, or download
    "taming.config.allow_targets", "taming.config.get_obj_from_str", "taming.config.load_config",
    "taming.checkpoint.load_model", "taming.util.download", "taming.images.save_png",
    "taming.training.command.main",
    "taming.training.arguments.parse",
    # private and odd paths
    "torch.nn.Module.__init__", "torch.nn.modules.module._Registry", "torch.optim._functional.adam",
    "taming.models.__builtins__", "taming.models.vqgan.__dict__", "torch.nn", "torch.nn.", ".torch.nn.Linear",
    "torch.nn.Linear()", "torch..nn.Linear", "torch.nn.modules", "torch.nn.Linear; import os",
])
def test_refused(target):
    with pytest.raises(ConfigError) as caught:
        instantiate_from_config({"target": target, "params": {}})
    assert repr(target) in str(caught.value)


@pytest.mark.parametrize("target", [
    "torch.optim.AdamW", "torch.optim.lr_scheduler.CosineAnnealingLR", "torch.nn.L1Loss",
    "torchvision.transforms.Resize", "torchvision.transforms.v2.RandomCrop",
    "pytorch_lightning.callbacks.EarlyStopping", "pytorch_lightning.loggers.CSVLogger",
    "taming.modules.losses.vqperceptual.hinge_d_loss",
])
def test_accepted(target):
    assert get_obj_from_str(target).__name__ == target.rsplit(".", 1)[1]


def test_a_refused_package_is_not_even_imported(package):
    with pytest.raises(ConfigError, match=r"--allow stranger, or allow_targets\(\"stranger\"\)"):
        get_obj_from_str("stranger.models.Plain")
    assert not [name for name in sys.modules if name.startswith("stranger")]


def test_allowing_a_package_allows_what_it_defines(package):
    allow_targets("stranger")
    assert instantiate_from_config({"target": "stranger.models.Plain", "params": {"size": 4}}).size == 4
    assert instantiate_from_config({"target": "stranger.models.make"}) == [3]
    refused = {"partial": "functools", "os.system": "no module", "_Hidden": "public", "value": "int"}
    for name, reason in refused.items():
        with pytest.raises(ConfigError, match=reason):
            get_obj_from_str(f"stranger.models.{name}")


def test_allowing_a_part_allows_that_part(package):
    allow_targets("stranger.other.*")
    with pytest.raises(ConfigError, match="stranger.models is not on the allowed list"):
        get_obj_from_str("stranger.models.Plain")
    allow_targets("stranger.models.", "stranger.models")
    assert get_obj_from_str("stranger.models.Plain").__name__ == "Plain"
    assert config._allowed == ("stranger.other", "stranger.models")


@pytest.mark.parametrize("package_name", ["", "*", ".", "a b", "os;", "a..b"])
def test_only_packages_can_be_allowed(package_name):
    with pytest.raises(ConfigError, match="cannot allow"):
        allow_targets(package_name)


def test_the_lists_cannot_be_changed_in_place():
    assert isinstance(config.SAFE_TARGETS, tuple) and all(isinstance(e, tuple) for e in config.SAFE_TARGETS)
    assert isinstance(config._allowed, tuple)


# ---- names of other years, and names that lead nowhere ----


@pytest.mark.parametrize("target, home", config.HISTORIC_TARGETS)
def test_historic_names_lead_home(target, home):
    found = get_obj_from_str(target)
    assert f"{found.__module__}.{found.__qualname__}".startswith(home.rsplit(".", 1)[0])
    assert found.__name__ == home.rsplit(".", 1)[1]


def test_main_of_the_current_folder_is_not_imported(write, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "main", raising=False)
    write("main.py", "raise SystemExit('ran')\n")
    assert get_obj_from_str("main.instantiate_from_config") is instantiate_from_config
    with pytest.raises(ConfigError, match="'main.ImageLoger' is unknown.*did you mean main.ImageLogger"):
        get_obj_from_str("main.ImageLoger")


def test_a_logger_that_is_gone_has_a_successor(caplog, tmp_path):
    with caplog.at_level(logging.WARNING), run_directory(tmp_path):
        made = instantiate_from_config({
            "target": "pytorch_lightning.loggers.TestTubeLogger",
            "params": {"name": "testtube", "save_dir": str(tmp_path)},
        })
    assert type(made).__name__ == "TensorBoardLogger" and "TestTubeLogger no longer exists" in caplog.text


@pytest.mark.parametrize("target, message", [
    ("torch.optim.Adm", "torch.optim has no 'Adm'.*did you mean Adam"),
    ("torch.optim.lr_schedular.StepLR", "no module torch.optim.lr_schedular.*did you mean lr_scheduler"),
    ("taming.model.vqgan.VQModel", "did you mean models"),
    ("taming.models.vqgam.VQModel", "no module taming.models.vqgam.*did you mean vqgan"),
])
def test_a_misspelt_target_shows_what_is_near(target, message):
    with pytest.raises(ConfigError, match=message):
        get_obj_from_str(target)


def test_a_missing_package_is_told_from_a_missing_target(package, monkeypatch):
    allow_targets("stranger")
    with pytest.raises(ConfigError, match="needs the package webdataset_that_.*pip install webdataset_that_"):
        get_obj_from_str("stranger.optional.Thing")
    monkeypatch.setattr(config, "EXTRAS", (("webdataset_that_is_not_there", "data"),))
    with pytest.raises(ConfigError, match=r'pip install "taming\[data\]"'):
        get_obj_from_str("stranger.optional.Thing")
    with pytest.raises(ConfigError, match="stranger.wrong cannot be imported.*no_such_thing"):
        get_obj_from_str("stranger.wrong.Thing")


def test_reload_imports_anew(package, write):
    allow_targets("stranger")
    old = get_obj_from_str("stranger.models.make")
    write("stranger/models.py", "def make(): return 'new'")
    assert get_obj_from_str("stranger.models.make") is old
    assert get_obj_from_str("stranger.models.make", reload=True)() == "new"
