"""Transformers without training, of every kind of condition, as exported folders."""

from pathlib import Path

import torch

from taming.checkpoint import save_exported
from taming.config import instantiate_from_config

DUMMY = {"target": "taming.modules.losses.DummyLoss"}
SIDE, CODES, NULL = 32, 16, 15  # pixels in training, of the codebook, and the token for no condition


def stage(kind: str, channels: int, **more) -> dict:
    ddconfig = dict(
        double_z=False, z_channels=8, resolution=SIDE, in_channels=channels, out_ch=channels, ch=32,
        ch_mult=[1, 1, 1, 1], num_res_blocks=1, attn_resolutions=[], dropout=0.0,
    )
    params = dict(ddconfig=ddconfig, lossconfig=DUMMY, n_embed=CODES, embed_dim=4) | more
    return {"target": f"taming.models.vqgan.{kind}", "params": params}


def labelator(n_classes: int = 16) -> dict:
    return {"target": "taming.modules.util.Labelator", "params": {"n_classes": n_classes}}


def label_grid(n_labels: int = 10) -> dict:
    params = {"n_labels": n_labels, "down_factor": 8}
    return {"target": "taming.modules.conditioners.label_grid.LabelGrid", "params": params}


def layout(key: str) -> dict:
    target = "taming.models.dummy_cond_stage.DummyCondStage"
    return {"target": target, "params": {"conditional_key": key}}


CONDITIONS = {
    "class_label": labelator(),
    "segmentation": label_grid(),
    "depth": stage("VQModel", 1, image_key="depth"),
    "objects_bbox": layout("objects_bbox"),
    "objects_center_points": layout("objects_center_points"),
    "pose_tokens": layout("pose_tokens"),
    "coord": {"target": "taming.modules.misc.coord.CoordStage", "params": {"n_embed": 16, "down_factor": 8}},
    "image": "__is_unconditional__",
}


def export(folder: Path, *keys: str, layers: int = 1, width: int = 16, **params) -> Path:
    """Write a run that is conditioned on some keys of the landscapes, and return its folder."""
    several = len(keys) > 1
    if several:  # each may be left out
        configs = [labelator(NULL - 1) if key == "class_label" else CONDITIONS[key] for key in keys]
        params |= {"null_token": NULL, "cond_dropout": 0.1}
    gpt = {"vocab_size": 512, "block_size": 128, "n_layer": layers, "n_head": 2, "n_embd": width}
    model = {
        "target": "taming.models.cond_transformer.Net2NetTransformer",
        "params": {
            "cond_stage_key": list(keys) if several else keys[0], "first_stage_config": stage("VQModel", 3),
            "cond_stage_config": configs if several else CONDITIONS[keys[0]],
            "transformer_config": {"target": "taming.modules.transformer.mingpt.GPT", "params": gpt},
            **params,
        },
    }
    torch.manual_seed(0)
    built = instantiate_from_config(model)
    built.first_stage_model.quantize.embedding.weight.data.mul_(50.0)  # other codes, other pictures
    built.first_stage_model.decoder.conv_out.weight.data.mul_(10.0)
    return save_exported(built, {"model": model, "data": landscapes(*keys)}, folder)


def landscapes(*keys: str) -> dict:
    split = {
        "target": "taming.data.landscapes.Landscapes",
        "params": dict(size=SIDE, length=6, split="validation", keys=sorted({"image", *keys})),
    }
    params = dict(batch_size=2, num_workers=0, validation=split)
    return {"target": "main.DataModuleFromConfig", "params": params}
