"""Sections that are absent, empty or null; keys that nothing reads."""

import pytest
from omegaconf import OmegaConf

from taming.config import ConfigError, find_config, load_config, override_config
from taming.training.sections import check_keys, complete_sections
from tests.tiny import DATA, TRANSFORMER, VQGAN

EMPTY = {"trainer": {}, "callbacks": {}, "modelcheckpoint": {}, "logger": {}}


def config(*words, text=VQGAN + DATA):
    return override_config(OmegaConf.create(text), words)


def completed(*words, text=VQGAN + DATA):
    return OmegaConf.to_container(complete_sections(config(*words, text=text), "a.yaml"))


def test_a_complete_configuration_stays_as_it_is():
    plain = OmegaConf.to_container(config())
    assert completed() == {**plain, "lightning": {**EMPTY, **plain["lightning"]}}


@pytest.mark.parametrize("value", ["null", "{}"])
@pytest.mark.parametrize("section", [
    "lightning", "lightning.trainer", "lightning.callbacks", "lightning.logger", "lightning.modelcheckpoint",
])
def test_empty_and_null_are_as_absent(section, value):
    without = config()
    parent, _, name = section.rpartition(".")
    (OmegaConf.select(without, parent) if parent else without).pop(name, None)
    absent = OmegaConf.to_container(complete_sections(without, "a.yaml"))
    content = OmegaConf.create(without)
    OmegaConf.update(content, section, None if value == "null" else {}, force_add=True)
    assert OmegaConf.to_container(complete_sections(content, "a.yaml")) == absent
    assert set(absent["lightning"]) == set(EMPTY)


def test_parameters_and_callbacks_that_are_null():
    found = completed("data.params=null", "model.params=null", "lightning.callbacks.image_logger=null")
    assert found["data"]["params"] == found["model"]["params"] == {}
    assert found["lightning"]["callbacks"] == {"image_logger": None}  # takes the usual one away


@pytest.mark.parametrize(("word", "message"), [
    ("model=null", "a.yaml: no section `model: {target: ..., params: ...}`"),
    ("data=5", "a.yaml: no section `data: {target"),
    ("model.target=null", "no section `model"),
    ("model.params=7", "model.params: 7 is not a section"),
    ("lightning=5", "lightning: 5 is not a section: write a mapping"),
    ("lightning.trainer=7", "lightning.trainer: 7 is not a section"),
    ("lightning.callbacks=7", "lightning.callbacks: 7 is not a section"),
    ("lightning.callbacks.image_logger=7", "lightning.callbacks.image_logger: 7 is not a section"),
    ("lightning.logger=tensorboard", "lightning.logger: 'tensorboard' is not a section"),
    ("lightning.logger.params.name=x", "lightning.logger: nothing reads its params: it has no target"),
])
def test_what_is_no_section(word, message):
    with pytest.raises(ConfigError, match=message):
        completed(word)


@pytest.mark.parametrize(("word", "message"), [
    ("modle.params.n_embed=32", r"modle \(did you mean model\?\)"),
    ("trainer.max_epochs=3", r"trainer \(did you mean lightning.trainer"),
    ("batch_size=4", r"batch_size \(did you mean data.params.batch_size\?\)"),
    ("size=64", "size; the keys here are: model, data, lightning"),
    ("model.parms.n_embed=32", r"model.parms \(did you mean model.params\?\)"),
    ("model.learning_rate=1", r"model.learning_rate \(did you mean model.base_learning_rate\?\)"),
    ("model.n_embed=3", r"model.n_embed \(did you mean model.params.n_embed"),
    ("data.batch_size=4", r"data.batch_size \(did you mean data.params.batch_size\?\)"),
    ("data.params.train.parms.size=4", r"train.parms \(did you mean data.params.train.params\?\)"),
    ("data.params.train.size=4", r"data.params.train.size \(did you mean data.params.train.params.size"),
    ("model.params.lossconfig.parms.x=1", r"parms \(did you mean model.params.lossconfig.params\?\)"),
    ("model.params.permuter_config={taget: x, params: {}}", r"did you mean .*permuter_config.target\?\)"),
    ("model.params.scheduler_config.lr_max=1", r"\(did you mean model.params.scheduler_config.params.lr_max"),
    ("model.params.ddconfig.drpout=0.1", r"\(did you mean model.params.ddconfig.dropout\?\)"),
    ("lightning.trainr.x=1", r"lightning.trainr \(did you mean lightning.trainer"),
    ("lightning.callbacks.image_logger.parms.x=1", r"parms \(did you mean lightning.callbacks.image_logger"),
    ("lightning.callbacks.image_logger.max_images=1", r"image_logger.params.max_images\?\)"),
    ("lightning.modelcheckpoint.save_top_k=1", r"did you mean lightning.modelcheckpoint.params.save_top_k"),
])
def test_keys_that_nothing_reads(word, message):
    with pytest.raises(ConfigError, match=f"nothing reads the key .*{message}"):
        completed(word)


def test_keys_in_lists_are_checked_too():
    stages = "model.params.cond_stage_config=[{target: taming.modules.util.Labelator, parms: {n_classes: 3}}]"
    one = "{target: taming.modules.util.Labelator, params: {n_classes: 16}}"
    text = TRANSFORMER.replace(one, "[]") + DATA
    with pytest.raises(ConfigError, match=r"model.params.cond_stage_config.0.parms \(did you mean"):
        completed(stages, text=text)


def test_mappings_of_other_packages_may_have_any_keys():
    steps = [{"name": "a", "params": {}}, {"target": 3, "w": 1}]
    check_keys({"model": {"target": "x", "params": {"steps": steps}}})


def test_variables_are_read_where_values_refer_to_them():
    found = completed(
        "width=8", "other.deep=2", "model.params.embed_dim=${width}", "data.params.batch_size=${other.deep}"
    )
    assert found["width"] == 8
    check_keys({"a": 1, "model": {"target": "x", "params": {"b": "${.c}", "c": ["x/${a}"]}}})
    with pytest.raises(ConfigError, match="nothing reads the key a"):
        check_keys({"a": 1, "model": {"target": "x", "params": {"b": "${.a}"}}})


# ---- elements of lists


def test_an_element_of_a_list_of_values_needs_the_whole_list():
    word = "model.params.ddconfig.ch_mult.0=2"
    with pytest.raises(ConfigError, match="sets one element of a list: give the whole list") as caught:
        config(word)
    whole = str(caught.value).rpartition(", ")[2].strip("'")
    assert config(whole).model.params.ddconfig.ch_mult == [2, 1, 1]


@pytest.mark.parametrize("word", ["model.params.ddconfig.ch_mult.7=2", "model.params.ddconfig.ch_mult.x=2"])
def test_places_that_a_list_does_not_have(word):
    with pytest.raises(ConfigError, match="is a list of 3: name an element, model.params.ddconfig.ch_mult.0"):
        config(word)


def test_keys_below_an_element_of_a_list_can_be_set():
    words = ["model.params.cond_stage_config.0.params.n_classes=20"]
    found = load_config(find_config("demo/transformer"), words)
    assert found.model.params.cond_stage_config[0].params.n_classes == 20
    assert found.model.params.cond_stage_config[1].params.n_labels == 10
