"""The ten configurations of 2021 train as they are, but for toy sizes; run directories of 2021 are resumed.

The files written here have the sections and keys of those files, none of which has a section `lightning`. The
data lie where the classes of 2021 look for them.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pytorch_lightning.callbacks import ModelCheckpoint

from taming.checkpoint import read_checkpoint
from taming.data.files.depth import depth_to_rgba
from taming.training.command import main
from tests.tiny import curves

SIZE, CODES = 32, 64  # pixels; codes in a codebook
GRID = (SIZE // 16) ** 2  # codes of an image
TOKENS = 400  # of object layouts
QUIET = [
    "--num_sanity_val_steps", "0", "--progress_bar_refresh_rate", "0", "--enable_model_summary", "False",
    "--log_every_n_steps", "1",
]
SYNSETS = ("n01440764", "n01443537")
SCENES = ["image", "objects_bbox", "file_name", "annotations"]


def vqgan(target="VQModel", channels=3, disc_start=1, **params):
    ddconfig = {
        "double_z": False, "z_channels": 32, "resolution": SIZE, "in_channels": channels, "out_ch": channels,
        "ch": 32, "ch_mult": [1, 1, 1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [2], "dropout": 0.0,
    }
    loss = {
        "target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
        "params": {
            "disc_conditional": False, "disc_in_channels": channels, "disc_start": disc_start,
            "disc_weight": 0.8, "codebook_weight": 1.0,
        },
    }
    if target == "VQSegmentationModel":
        loss = {
            "target": "taming.modules.losses.segmentation.BCELossWithQuant",
            "params": {"codebook_weight": 1.0},
        }
    params |= {"embed_dim": 32, "n_embed": CODES, "ddconfig": ddconfig, "lossconfig": loss}
    return {"base_learning_rate": 4.5e-6, "target": f"taming.models.vqgan.{target}", "params": params}


def stage(path, channels=3):
    model = vqgan(channels=channels)
    del model["base_learning_rate"]
    model["params"]["lossconfig"] = {"target": "taming.modules.losses.DummyLoss"}
    model["params"]["ckpt_path"] = str(path)
    return model


def transformer(key, cond_stage, first_stage, length, vocabulary=CODES, **dropout):
    gpt = {"vocab_size": vocabulary, "block_size": length, "n_layer": 2, "n_head": 2, "n_embd": 16, **dropout}
    return {
        "base_learning_rate": 4.5e-6,
        "target": "taming.models.cond_transformer.Net2NetTransformer",
        "params": {
            "cond_stage_key": key,
            "transformer_config": {"target": "taming.modules.transformer.mingpt.GPT", "params": gpt},
            "first_stage_config": stage(first_stage),
            "cond_stage_config": cond_stage,
        },
    }


def scenes(key, first_stage):
    dummy = {"target": "taming.models.dummy_cond_stage.DummyCondStage", "params": {"conditional_key": key}}
    dropout = {"embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.1}
    return transformer(key, dummy, first_stage, GRID + 92, TOKENS, **dropout)


def data(train, validation, both=None, *, target="main", workers=2, **differing):
    splits = {}
    for split, name in (("train", train), ("validation", validation)):
        own = {key: value[split == "validation"] for key, value in differing.items()}
        splits[split] = {"target": f"taming.data.{name}", "params": {**(both or {}), **own}}
    workers = {"num_workers": workers} if workers is not None else {}
    return {"target": f"{target}.DataModuleFromConfig", "params": {"batch_size": 2, **workers, **splits}}


def configs(stages):
    """The ten files; `stages` are the run directories of first and condition stages by name."""
    size, crop = {"size": SIZE}, {"size": SIZE, "crop_size": SIZE}
    scene = {
        "keys": SCENES, "no_tokens": TOKENS, "target_image_size": SIZE, "min_object_area": 0.0001,
        "min_objects_per_image": 1, "max_objects_per_image": 30, "use_group_parameter": True,
        "encode_crop": True,
    }
    split, flip = ("train", "validation"), (True, False)
    coord = {
        "target": "taming.modules.misc.coord.CoordStage", "params": {"n_embed": CODES, "down_factor": 16},
    }
    imagenet, depth = stages.get("imagenet_vqgan", "-"), stages.get("imagenetdepth_vqgan", "-")
    last = "{}/checkpoints/last.ckpt".format
    coco = {"onehot_segmentation": True, "use_stuffthing": True, "crop_size": SIZE}
    return {
        "imagenet_vqgan": (
            vqgan(),
            data("imagenet.ImageNetTrain", "imagenet.ImageNetValidation", {"config": size}),
        ),
        "imagenetdepth_vqgan": (
            vqgan(channels=1, image_key="depth"),
            data("imagenet.ImageNetTrainWithDepth", "imagenet.ImageNetValidationWithDepth", size),
        ),
        "faceshq_vqgan": (vqgan(), data("faceshq.FacesHQTrain", "faceshq.FacesHQValidation", crop)),
        "custom_vqgan": (
            vqgan(),
            {"target": "main.DataModuleFromConfig", "params": {
                "batch_size": 2, "num_workers": 0,
                "train": {"target": "taming.data.custom.CustomTrain",
                          "params": {"training_images_list_file": "some/training.txt", "size": SIZE}},
                "validation": {"target": "taming.data.custom.CustomTest",
                               "params": {"test_images_list_file": "some/test.txt", "size": SIZE}},
            }},
        ),
        "coco_cond_stage": (
            vqgan("VQSegmentationModel", 183, image_key="segmentation", n_labels=183),
            data("coco.CocoImagesAndCaptionsTrain", "coco.CocoImagesAndCaptionsValidation", coco,
                 workers=None, size=(40, 32)),
        ),
        "sflckr_cond_stage": (
            vqgan("VQSegmentationModel", 182, image_key="segmentation", n_labels=182),
            data("sflckr.Examples", "sflckr.Examples", size, target="cutlit", workers=None),
        ),
        "drin_transformer": (
            transformer("depth", stage(last(depth), 1), last(imagenet), 2 * GRID),
            data("imagenet.RINTrainWithDepth", "imagenet.RINValidationWithDepth", size),
        ),
        "faceshq_transformer": (
            transformer("coord", coord, last(stages.get("faceshq_vqgan", "-")), 2 * GRID),
            data("faceshq.FacesHQTrain", "faceshq.FacesHQValidation", {**crop, "coord": True}),
        ),
        "coco_scene_images_transformer": (
            scenes("objects_bbox", last(imagenet)),
            data("annotated_objects_coco.AnnotatedObjectsCoco", "annotated_objects_coco.AnnotatedObjectsCoco",
                 {"data_path": "data/coco_annotations_100", **scene}, workers=None, split=split,
                 crop_method=("random-1d", "center"), random_flip=flip),
        ),
        "open_images_scene_images_transformer": (
            scenes("objects_bbox", last(imagenet)),
            data("annotated_objects_open_images.AnnotatedObjectsOpenImages",
                 "annotated_objects_open_images.AnnotatedObjectsOpenImages",
                 {"data_path": "data/open_images_annotations_100", **scene,
                  "category_allow_list_target":
                      "taming.data.open_images_helper.top_300_classes_plus_coco_compatibility",
                  "category_mapping_target":
                      "taming.data.open_images_helper.open_images_unify_categories_for_coco",
                  "use_additional_parameters": True},
                 workers=None, split=split, crop_method=("random-2d", "center"), random_flip=flip),
        ),
    }


# ---- the data


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def noise(seed, channels=3):
    return np.random.default_rng(seed).integers(0, 180, (40, 48, channels), dtype=np.uint8).squeeze()


def write_imagenet(root):
    for split, short in (("train", "train"), ("validation", "val")):
        place = root / "cache/autoencoders/data" / f"ILSVRC2012_{split}"
        for number, synset in enumerate(SYNSETS):
            for index in range(2):
                save(place / "data" / synset / f"{index}.JPEG", noise(number + index))
                depth = depth_to_rgba(noise(9 + index, 1).astype(np.float32) * 10 + 500)
                save(root / "data/imagenet_depth" / short / synset / f"{index}.png", depth)
        (place / "synset_human.txt").write_text("\n".join(f"{synset} fish" for synset in SYNSETS))
        numbers = dict.fromkeys(range(1000), "n00000000") | dict(enumerate(SYNSETS, 30))  # RIN begins there
        (place / "index_synset.yaml").write_text(yaml.safe_dump(numbers))


def write_faces(root):
    for name, train, validation in (("celebahq", "0", "1"), ("ffhq", "0", "1")):
        for split, number in (("train", train), ("validation", validation)):
            for copy in range(2):
                file = f"{number}{copy}.png"
                if name == "celebahq":
                    file = f"{number}{copy}.npy"
                    (root / "data/celebahq").mkdir(parents=True, exist_ok=True)
                    np.save(root / "data/celebahq" / file, noise(copy).transpose(2, 0, 1)[None])
                else:
                    save(root / "data/ffhq" / file, noise(copy))
            names = "\n".join(f"{number}{copy}.{'npy' if name == 'celebahq' else 'png'}" for copy in range(2))
            (root / f"data/{name}{split}.txt").write_text(names)


def write_coco(root):
    images = [{"id": n, "file_name": f"{n:012}.jpg", "width": 48, "height": 40} for n in (1, 2, 3, 4)]
    captions = [{"image_id": image["id"], "caption": "one"} for image in images]
    box = {"bbox": [5, 5, 20, 20], "iscrowd": 0, "area": 400}
    objects = [{"id": n, "image_id": n, "category_id": 1, **box} for n in (1, 2, 3, 4)]
    categories = [{"id": 1, "name": "person"}]
    scenes = root / "data/coco_annotations_100"
    for folder in (root / "data/coco/annotations", scenes / "annotations"):
        folder.mkdir(parents=True)
    for split in ("train2017", "val2017"):
        for image in images:
            for place in (root / "data/coco", scenes):
                save(place / split / image["file_name"], noise(image["id"]))
            save(root / f"data/cocostuffthings/{split}/{image['id']:012}.png", noise(3, 1))
        content = json.dumps({"images": images, "annotations": captions})
        (root / f"data/coco/annotations/captions_{split}.json").write_text(content)
        for kind, found, known in (("instances", objects, categories), ("stuff", [], [])):
            content = json.dumps({"images": images, "annotations": found, "categories": known})
            (scenes / f"annotations/{kind}_{split}.json").write_text(content)


def write_open_images(root):
    place = root / "data/open_images_annotations_100"
    header = (
        "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,"
        "IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
    )
    names = [f"{n:016}" for n in range(4)]
    rows = [f"{name},xclick,/m/0bt9lr,1,0.1,0.5,0.2,0.6,1,0,0,0,1" for name in names]
    for split, file in (("train", "oidv6-train"), ("validation", "validation")):
        for n, name in enumerate(names):
            save(place / split / f"{name}.jpg", noise(n))
        (place / f"{file}-annotations-bbox.csv").write_text("\n".join([header, *rows]) + "\n")
    (place / "class-descriptions-boxable.csv").write_text("/m/0bt9lr,Dog\n")


def write_lists(root):
    names = [f"{n}.jpg" for n in range(4)]
    for n, name in enumerate(names):
        save(root / "data/sflckr_images" / name, noise(n))
        save(root / "data/sflckr_segmentations" / f"{n}.png", noise(n, 1))
        save(root / "some" / name, noise(n))
    (root / "data/sflckr_examples.txt").write_text("\n".join(names))
    for split in ("training", "test"):
        (root / f"some/{split}.txt").write_text("\n".join(f"some/{name}" for name in names))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with all data sets, and first and condition stages in logs/."""
    root = tmp_path_factory.mktemp("home")
    for write in (write_imagenet, write_faces, write_coco, write_open_images, write_lists):
        write(root)
    before, cache, threads = Path.cwd(), os.environ.get("XDG_CACHE_HOME"), torch.get_num_threads()
    os.chdir(root)
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    torch.set_num_threads(1)
    for name in ("imagenet_vqgan", "imagenetdepth_vqgan", "faceshq_vqgan"):
        train(root, name, "-t", "True", "--max_steps", "1")
    yield root
    torch.set_num_threads(threads)
    os.chdir(before)
    os.environ.pop("XDG_CACHE_HOME") if cache is None else os.environ.update(XDG_CACHE_HOME=cache)


def write_config(root, name):
    model, section = configs({run.name[20:]: run for run in (root / "logs").glob("*")})[name]
    path = root / "configs" / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump({"model": model, "data": section}, sort_keys=False))
    return path


def train(root, name, *words):
    """Train and return the run directory; the perceptual loss, which needs VGG, is off."""
    words = ["--base", str(write_config(root, name)), *words, *QUIET]
    if name.endswith("vqgan"):
        words.append("model.params.lossconfig.params.perceptual_weight=0")
    before = set((root / "logs").glob("*"))
    assert main(words) == 0
    made = set((root / "logs").glob("*")) - before
    return made.pop() if made else None


@pytest.mark.slow
@pytest.mark.parametrize("words", [["-t"], ["-t", "1"], ["--train=yes", "--gpus", "0"]], ids=" ".join)
def test_train_in_every_spelling(folder, words):
    run = train(folder, "custom_vqgan", "--max_steps", "1", *words)
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["batches_seen"] == 1
    assert train(folder, "custom_vqgan", "-t", "False") is None
    shutil.rmtree(run)


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    "custom_vqgan", "coco_cond_stage", "sflckr_cond_stage", "drin_transformer", "faceshq_transformer",
    "coco_scene_images_transformer", "open_images_scene_images_transformer", "imagenet_vqgan",
    "imagenetdepth_vqgan", "faceshq_vqgan",
])
def test_configuration_trains(folder, name):
    assert "lightning" not in yaml.safe_load(write_config(folder, name).read_text())
    run = train(folder, name, "-t", "True", "--max_steps", "2")
    checkpoint = read_checkpoint(run / "checkpoints" / "last.ckpt")
    assert checkpoint["batches_seen"] == 2
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
    loss = "train/loss" if name.endswith("transformer") else "train/quant_loss"
    assert [row["step"] for row in curves(run) if loss in row] == ["0", "1"]
    shutil.rmtree(run)


# ---- run directories


def as_of_2021(run, root, optimizers):
    """Write a run as the software of 2021 left it: class objects as keys, two counters, two YAML files.

    `optimizers` brings the states of the optimizers into the order of 2021.
    """
    content = read_checkpoint(run / "checkpoints" / "last.ckpt")
    old = root / "old" / f"2021-04-03T19-39-50_{run.name[20:]}"
    (old / "checkpoints").mkdir(parents=True)
    batches, config = content["batches_seen"], content["config"]
    torch.save({
        "epoch": 1, "global_step": batches, "pytorch-lightning_version": "1.0.8",
        "callbacks": {ModelCheckpoint: {"monitor": "val/rec_loss", "best_model_score": torch.tensor(0.5),
                                        "best_model_path": "logs/x.ckpt", "dirpath": "logs"}},
        "optimizer_states": optimizers(content["optimizer_states"], content["state_dict"]),
        "lr_schedulers": [], "state_dict": content["state_dict"],
    }, old / "checkpoints" / "last.ckpt")
    (old / "configs").mkdir()
    trainer = {"distributed_backend": "ddp", "gpus": 0, "benchmark": False}
    for kind, part in (("project", {key: config[key] for key in ("model", "data")}),
                       ("lightning", {"lightning": {"trainer": trainer}})):
        (old / "configs" / f"{old.name[:19]}-{kind}.yaml").write_text(yaml.safe_dump(part))
    (old / "testtube/version_0").mkdir(parents=True)
    return old


def sorted_by_name(states, weights):
    """The two groups of the transformer's optimizer, each in the order of the names of its parameters."""
    names = [key.removeprefix("transformer.") for key in weights if key.startswith("transformer.")]
    weights = [n for n in names if n.endswith("weight")]
    linear = [n for n in weights if "attn." in n or "mlp." in n or n == "head.weight"]
    rest = [n for n in names if n not in linear]
    today = {name: number for number, name in enumerate([*linear, *rest])}
    old = [*sorted(linear), *sorted(rest)]
    moments = {number: states[0]["state"][today[name]] for number, name in enumerate(old)}
    numbers = [list(range(len(linear))), list(range(len(linear), len(old)))]
    groups = [{**g, "params": n} for g, n in zip(states[0]["param_groups"], numbers, strict=True)]
    return [{"state": moments, "param_groups": groups}]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "optimizers"), [
    ("faceshq_transformer", sorted_by_name), ("custom_vqgan", lambda states, _: states),
])
def test_run_of_2021_goes_on(folder, capsys, name, optimizers):
    """It does the same as a run of today that stopped at the same batch."""
    rate = "model.base_learning_rate=1e-3"
    run = train(folder, name, "-t", "--max_epochs", "1", "-f", "_new", rate)
    old = as_of_2021(run, folder, optimizers)
    batches = read_checkpoint(run / "checkpoints" / "last.ckpt")["batches_seen"]
    for place in (run, old):
        assert main(["-t", "-r", str(place), "--max_epochs", "3", *QUIET]) == 0
    assert f"trained for {3 * batches} batches" in capsys.readouterr().out
    today, resumed = (read_checkpoint(place / "checkpoints" / "last.ckpt") for place in (run, old))
    assert resumed["epoch"] == today["epoch"] == 2 and resumed["batches_seen"] == 3 * batches
    for key, value in today["state_dict"].items():
        assert torch.equal(resumed["state_dict"][key], value), key
    rows = [row for row in curves(old) if any("train/" in key for key in row)]
    assert [int(row["step"]) for row in rows] == list(range(batches, 3 * batches))
    shutil.rmtree(run)
