"""Encode a data set once, for priors that are trained on its codes.

    taming encode logs/RUN_custom_transformer -o train.tcc
    taming encode custom_transformer -o train.tcc --views 4 data.params.train.params.flip=true
    taming encode --info train.tcc

Writes codes, packed, with the tokens of the conditions and the labels. The model is that of a run, or of a
configuration whose stages name their checkpoints; of a tokenizer alone, codes and labels are written. In the
configuration of the transformer only the data change:

    train:
      target: taming.data.codes.CodeDataset
      params: {path: train.tcc}

An interrupted command goes on where it was when it is started again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from taming.checkpoint import find_checkpoint, load_model
from taming.cli.dataset_options import add_data_source
from taming.cli.options import TORCHRUN, add_allow, add_batch_size, add_device, add_outdir, check_folder, path
from taming.config import find_config, instantiate_from_config, load_config, models_only, storable
from taming.data.codes import CodeDataset, CodeHeader
from taming.data.codes.writer import CodeWriter
from taming.data.datamodule import default_num_workers
from taming.inference.dataset import build_dataset, data_section
from taming.inference.distributed import own_device, rank_and_world_size
from taming.inference.encode import encode_dataset, header_of, tokenizer_of
from taming.models.cond_transformer import Net2NetTransformer
from taming.training.command import DEFAULT_SEED
from taming.training.console import rank_zero_print
from taming.training.stages import fill_stages
from taming.util import number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.epilog = TORCHRUN.format("encode")
    add = parser.add_argument
    add("model", nargs="?", help="a transformer or tokenizer: run directory, checkpoint file or exported "
        "folder; or a configuration, by file or by a name that `taming configs` lists")
    add_outdir(parser, "the file to write, train.tcc for instance", metavar="FILE")
    add("--info", type=path, metavar="FILE", help="describe a code cache, and compare it with its checksums")
    add("--views", type=number(int, 1), default=1, help="how often each image is encoded, with other random "
        "crops and flips of the data set each time; epoch 5 of 4 views reads the first again")
    add("--seed", type=number(int, 0), help="of crops and flips; default: that of the training")
    add_batch_size(parser, 16)
    add("--num-workers", type=number(int, 0), help="processes that load images; default: one less than cores")
    add_data_source(parser)
    parser.set_defaults(split="train")
    add_device(parser)
    add_allow(parser)


def run(options: argparse.Namespace) -> None:
    """Describe a code cache, or encode and write one."""
    if options.info is not None:
        cache = CodeDataset(options.info)
        print(describe(cache.code_header, options.info))
        cache.check_all()
        print("all records agree with their checksums")
        return
    file = options.outdir
    if options.model is None or file is None:
        raise ValueError("give a run or a configuration, and the file to write: taming encode RUN -o x.tcc")
    if file.is_dir():
        raise ValueError(f"--outdir {file} is a folder: name a file, {file / 'train.tcc'} for instance")
    check_folder(file.parent)
    model, config = load(options.model, options.device)
    section = data_section(config, options.base, options.overrides, ignore_base_data=options.ignore_base_data)
    seed = seed_of(config, section) if options.seed is None else options.seed
    dataset = build_dataset(section, options.split, seed)
    source = storable(section._get_root())["data"]["params"][options.split]  # ${size} is beside the section
    header = header_of(
        model, dataset, source, split=options.split, views=options.views, batch_size=options.batch_size
    )
    writer = CodeWriter(file, header, options.batch_size)
    if writer.is_done():
        rank_zero_print(f"{file} is there already")
        return
    workers = options.num_workers
    if workers is None:
        workers = default_num_workers(rank_and_world_size()[1])
    encode_dataset(model, dataset, writer, workers=workers)
    if rank_and_world_size()[0] == 0:  # others may end before the file is there
        print(describe(header, file))


def load(name: str, device: str | None) -> tuple[Any, DictConfig]:
    """Load the model of a run, or build that of a configuration; return it on the device, with its config.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: the configuration is of a tokenizer without a checkpoint, or the model has no codes.
    """
    is_config = name.endswith((".yaml", ".yml")) or not Path(name).expanduser().exists()
    if is_config:
        try:
            config = load_config(find_config(name))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{name} is not a run, checkpoint or folder, and {error}") from None
        fill_stages(config)
        with models_only():
            model = instantiate_from_config(config.model)
        if not isinstance(model, Net2NetTransformer) and not config.model.params.get("ckpt_path"):
            raise ValueError(f"{name} is not trained yet: name its run, or set model.params.ckpt_path in it")
    else:
        model, config, _ = load_model(find_checkpoint(name))
    tokenizer_of(model)
    return model.to(own_device(device)).eval(), config


def seed_of(config: DictConfig, section: DictConfig) -> int:
    """Return the seed with which training would crop and flip: that of the data, or of the run."""
    of_data, of_run = (section.get("params") or {}).get("seed"), (config.get("lightning") or {}).get("seed")
    return int(next(seed for seed in (of_data, of_run, DEFAULT_SEED) if seed is not None))


def describe(header: CodeHeader, file: Path) -> str:
    """Describe a code cache in plain words, one line for each fact."""
    about = header.about
    megabytes = file.stat().st_size / 1e6
    views = "" if header.views == 1 else f", each in {header.views} views of random crops and flips"
    lines = [f"{file}: {header.images} images{views}; {megabytes:.3g} MB"]
    for field in header.fields:
        kind = field.name.partition("/")[0]
        shape = "x".join(map(str, field.shape)) or "1"
        what = {"codes": "codes", "tokens": "tokens of a condition"}.get(kind, "label")
        made = f", of the stage {json.dumps(field.stage[:16])}" if field.stage else ""
        size = f"{field.values} different ones in {field.bits} bits"
        lines.append(f"  {json.dumps(field.name)}: {shape} {what}, {size}{made}")
    name, identity = json.dumps(about.get("tokenizer")), json.dumps(header.tokenizer)
    lines.append(f"  tokenizer {name}, content hash {identity}")
    for key in ("conditions", "pixels", "split", "seed", "source", "batch_size", "versions"):
        lines.append(f"  {key}: {json.dumps(about.get(key))}")
    if names := about.get("class_names"):
        lines.append(f"  {len(names)} classes, such as {json.dumps(names[0])}")
    return "\n".join(lines)
