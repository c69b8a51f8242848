"""Encode a data set into a code cache: every image, in every view, by one process or several.

B batch, C channels, H W pixels, h w latent grid, M tokens.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

import taming
from taming.checkpoint.content_hash import content_hash
from taming.checkpoint.save import relative_paths
from taming.data.codes.format import CodeHeader, Field, grid_names, pack
from taming.data.codes.writer import CodeWriter
from taming.data.sampler import Pair, SeededDataset
from taming.inference.dataset import batch_of, unwrapped
from taming.inference.distributed import POLL_INTERVAL, rank_and_world_size
from taming.models.code_cache import TOKENS, stage_hash
from taming.models.cond_transformer import Net2NetTransformer
from taming.models.conditioning import condition_vocabulary
from taming.models.tokenizer import Tokenizer, as_list
from taming.util import ProgressBar

ANY_LABEL = 1 << 32  # values of labels whose number is not known
COMPARED = 32  # images whose views are compared, until two differ

Model = Net2NetTransformer | Any  # or a tokenizer


def tokenizer_of(model: Model) -> Any:
    """Return the tokenizer that a model is, or that its first stage is.

    Raises:
        ValueError: it is neither.
    """
    found = model.first_stage_model if isinstance(model, Net2NetTransformer) else model
    if not isinstance(found, Tokenizer):
        raise ValueError(f"{type(model).__name__} has no codes: give a tokenizer, or a transformer over one")
    return found


@torch.no_grad()
def encode(model: Model, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Return what the records of a batch hold, int64, by the names of the fields.

    These are the codes (B, h, w) of the images; of a transformer the tokens (B, h, w) or (B, M) of each
    condition; and every entry of the batch that is one whole number for each image.
    """
    batch = model.on_before_batch_transfer(batch, 0)
    labels = {key: value for key, value in batch.items() if _is_label(value)}
    batch = {key: x.to(model.device) if isinstance(x, Tensor) else x for key, x in batch.items()}
    if isinstance(model, Net2NetTransformer):
        x, c = model.get_xc(batch)
        codes, conditions = model.encode_codes(x), model.encode_conditions(c)
        tokens = {
            TOKENS + key: part
            for key, stage, part in zip(model.cond_keys, model.cond_stages, conditions, strict=True)
            if stage.kind != "none" and not (stage.kind == "class" and key in labels)
        }
    else:
        codes, tokens = model.encode_codes(model.get_images(batch)), {}
    grids = as_list(codes)
    return dict(zip(grid_names(len(grids)), grids, strict=True)) | tokens | labels


def _is_label(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 1 and value.dtype in (torch.int32, torch.int64)


def fields_of(model: Model, encoded: Mapping[str, Tensor], class_names: list[str]) -> tuple[Field, ...]:
    """Describe what `encode` returned."""
    tokenizer = tokenizer_of(model)
    values = dict.fromkeys(grid_names(tokenizer.levels), tokenizer.codebook_size)
    values |= {"class_label": len(class_names)} if class_names else {}
    hashes = {}
    if isinstance(model, Net2NetTransformer):
        for key, stage in zip(model.cond_keys, model.cond_stages, strict=True):
            tokens = stage.vocab_size or condition_vocabulary(model.transformer)[1]
            values[key] = values[TOKENS + key] = tokens
            hashes[TOKENS + key] = stage_hash(stage)
    return tuple(
        Field.of(name, array.shape[1:], values.get(name, ANY_LABEL), hashes.get(name, ""))
        for name, array in encoded.items()
    )


def header_of(
    model: Model, dataset: SeededDataset, source: Any, *, split: str, views: int, batch_size: int
) -> CodeHeader:
    """Describe the code cache of a data set; its first item is encoded.

    Args:
        model: what encodes.
        dataset: the split.
        source: the configuration of the split, plain dicts and lists.
        split: its name.
        views: how often each image is encoded.
        batch_size: images that are encoded together, which may change a rare code by rounding.

    Raises:
        ValueError: the grids are not those that the tokenizer has for images of the size of its training, or
            the views of an image are all the same.
    """
    tokenizer, data = tokenizer_of(model), unwrapped(dataset)
    if isinstance(data, IterableDataset):
        raise ValueError(f"{type(data).__name__} has no numbered items, which a code cache needs")
    check_views(dataset, views)
    names = [str(name) for name in getattr(data, "class_names", ())]
    encoded = encode(model, batch_of(dataset, [0]))
    fields = fields_of(model, encoded, names)
    wanted = as_list(tokenizer.code_shape(*tokenizer.image_size))
    found = [tuple(encoded[name].shape[1:]) for name in grid_names(tokenizer.levels)]
    if found != wanted:
        raise ValueError(
            f"the images have grids of {found} codes, but the tokenizer is made for {wanted}, at "
            f"{tokenizer.image_size} pixels (height, width): set the size of the data to it"
        )
    stages = model.cond_stages if isinstance(model, Net2NetTransformer) else []
    about = {
        "tokenizer": f"{type(tokenizer).__module__}.{type(tokenizer).__name__}",
        "conditions": [f"{type(stage).__module__}.{type(stage).__name__}" for stage in stages],
        "pixels": list(tokenizer.image_size),
        "split": split, "seed": dataset.seed, "batch_size": batch_size,
        "source": relative_paths(source, Path(os.devnull)),
        "class_names": names, "versions": {"taming": taming.__version__, "torch": torch.__version__},
    }
    plain = json.loads(json.dumps(about))  # as it will be read
    return CodeHeader(fields, len(dataset), views, content_hash(tokenizer), plain)


def check_views(dataset: SeededDataset, views: int) -> None:
    """Raise ValueError if images look the same in every view."""
    if views == 1:
        return
    for index in range(min(COMPARED, len(dataset))):
        first, second = (dataset.collate_fn(dataset.__getitems__([(view, index)])) for view in (0, 1))
        tensors = [(value, second[key]) for key, value in first.items() if isinstance(value, Tensor)]
        if any(not torch.equal(one, other) for one, other in tensors):
            return
    raise ValueError(
        f"--views {views}: the data set gives each image the same in every view: let it crop or flip at "
        "random (data.params....params.random_crop=true, flip=true), or leave --views out"
    )


def encode_dataset(model: Model, dataset: SeededDataset, writer: CodeWriter, *, workers: int = 0) -> None:
    """Write the code cache of a data set, or what is missing of it; parts are dealt to the processes in turn.

    Args:
        model: what encodes.
        dataset: the images; view v of image i is its item (v, i).
        writer: what `header_of` describes.
        workers: processes that load images.
    """
    rank, world_size = rank_and_world_size()
    if writer.is_done():
        return
    own = [part for part in range(rank, writer.parts, world_size) if not writer.has_part(part)]
    batches = {part: list(_batches(writer, part)) for part in own}
    loader = iter(DataLoader(
        dataset, batch_sampler=[batch for part in own for batch in batches[part]],
        collate_fn=dataset.collate_fn, num_workers=workers,
    ))
    with ProgressBar(
        total=sum(len(batch) for part in own for batch in batches[part]), unit="image", disable=rank != 0
    ) as bar:
        for part in own:
            records = []
            for batch in batches[part]:
                encoded = {name: value.cpu().numpy() for name, value in encode(model, next(loader)).items()}
                records.append(pack(writer.header.fields, encoded))
                bar.update(len(batch))
            writer.write_part(part, np.concatenate(records))
    if rank == 0:
        waiting = set(range(writer.parts))
        while waiting := {part for part in waiting if not writer.has_part(part)}:
            time.sleep(POLL_INTERVAL)  # torchrun ends this process if another one fails
        writer.merge()


def _batches(writer: CodeWriter, part: int) -> Iterator[list[Pair]]:
    """Yield the items (view, index) of a part, in batches that are the same for any number of processes."""
    images, records, size = writer.header.images, writer.records_of(part), writer.header.about["batch_size"]
    for start in range(records.start, records.stop, size):
        yield [divmod(number, images) for number in range(start, min(start + size, records.stop))]
