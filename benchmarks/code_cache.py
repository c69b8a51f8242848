"""How fast a code cache is read on one core, how large it is, and what a step of stage 2 takes from it."""

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.parts import NO_LOSS, ROOT, Row, Runs, in_turn, row
from taming.config import instantiate_from_config, load_config
from taming.data.codes import CodeDataset, CodeHeader, Field
from taming.data.codes.format import pack
from taming.data.codes.writer import CodeWriter
from taming.data.sampler import ResumableBatchSampler, SeededDataset
from taming.inference.encode import encode_dataset, header_of
from taming.models.cond_transformer import Net2NetTransformer

BATCH = 256  # records that are read at once


def written(folder: str, codes: int, records: int) -> Path:
    """Write a code cache of 16 x 16 arbitrary codes and a class of 1,000 for each image."""
    fields = Field.of("codes", (16, 16), codes), Field.of("class_label", (), 1000)
    writer = CodeWriter(Path(folder, f"{codes}.tcc"), CodeHeader(fields, records, 1, "0" * 64, {}), BATCH)
    rng = np.random.default_rng(0)
    for part in range(writer.parts):
        count = len(writer.records_of(part))
        values = {field.name: rng.integers(0, field.values, (count, *field.shape)) for field in fields}
        writer.write_part(part, pack(fields, values))
    writer.merge()
    return writer.path


def read(dataset: CodeDataset, numbers: np.ndarray) -> None:
    """Read all records of some numbers, batch by batch."""
    for start in range(0, len(numbers), BATCH):
        dataset.read(numbers[start:start + BATCH])


# ---- the parts


def cache_reading(options: argparse.Namespace) -> list[Row]:
    """Batches of 256 records of 16x16 codes, one thread; the first time with checksums, and again without."""
    rows, records = [], 2_000 if options.quick else 100_000
    with TemporaryDirectory() as folder:
        for codes in (1024, 16384):
            path = written(folder, codes, records)
            opened = CodeDataset(path)
            opened.check_all()
            shuffled = np.random.default_rng(0).permutation(records)
            orders = {"in order": np.arange(records), "at random": shuffled}
            functions = {}
            for order, numbers in orders.items():
                functions[f"{order}, first time"] = lambda n=numbers, p=path: read(CodeDataset(p), n)
                functions[f"{order}, again"] = lambda n=numbers, d=opened: read(d, n)
            size = records * opened.code_header.record_bytes / 1e6
            for name, runs in in_turn(options, functions).items():
                speed = {"mb_per_s": size / runs.median, "images_per_s": records / runs.median}
                rows.append(row(f"{codes} codes, {name}", runs, **speed))
    return rows


def cache_opening(options: argparse.Namespace) -> list[Row]:
    """Opening a cache, which reads its header alone, and the size of the file beside the fewest bits."""
    rows = []
    with TemporaryDirectory() as folder:
        for codes in (1024, 16384):
            for records in (1_000, 2_000) if options.quick else (1_000, 100_000):
                path = written(folder, codes, records)
                opened = {"open": lambda p=path: CodeDataset(p)}
                runs = in_turn(options, opened, repeats=max(5, options.repeats))["open"]
                least = records * (256 * math.log2(codes) + math.log2(1000)) / 8
                size, what = path.stat().st_size, f"{codes} codes, {records} images"
                rows.append(row(what, runs, bytes=size, of_least=size / least))
                path.unlink()
    return rows


def cache_step(options: argparse.Namespace) -> list[Row]:
    """A step of the demo's transformer, batch 16, and its data: scenes in memory, and a code cache."""
    config = load_config(ROOT / "configs/demo/transformer.yaml")
    first = load_config(ROOT / "configs/demo/vqgan.yaml").model
    config.model.params.first_stage_config = {
        "target": first.target, "params": {**first.params, "lossconfig": NO_LOSS}
    }
    torch.manual_seed(0)
    model, data = instantiate_from_config(config.model).train(), config.data.params
    data.batch_size = 4 if options.quick else data.batch_size
    data.train.params.length, size = 16 if options.quick else 256, data.batch_size
    images = instantiate_from_config(data.train)
    with TemporaryDirectory() as folder:
        seeded = SeededDataset(images)
        header = header_of(model, seeded, {}, split="train", views=1, batch_size=size)
        writer = CodeWriter(Path(folder, "train.tcc"), header, size)
        start = time.process_time()
        encode_dataset(model.eval(), seeded, writer)
        rows = [row(f"encode {len(images)} images, once", Runs([time.process_time() - start]))]
        codes = CodeDataset(writer.path)
        rows += steps(options, model.train(), {"images": images, "codes": codes}, size)
    return rows


def steps(options: argparse.Namespace, model: Net2NetTransformer, sources: dict, size: int) -> list[Row]:
    """Time steps and their loading, from each source in turn, in float32 and in bfloat16."""
    model.learning_rate = 1e-4
    optimizer = model.configure_optimizers()
    loaders = {name: batches(source, size) for name, source in sources.items()}
    functions = {}
    for name, loader in loaders.items():
        functions[f"{name}, loading alone"] = lambda loader=loader: next(loader)
        for precision, enabled in (("float32", False), ("bfloat16", True)):

            def one(loader: Iterator = loader, enabled: bool = enabled) -> None:
                batch = next(loader)
                with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                    loss: Tensor = model.shared_step(batch)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            functions[f"{name}, {precision}"] = one
    found = in_turn(options, functions, repeats=1 if options.quick else 4 * options.repeats)
    rows = []
    for name, runs in found.items():
        derived = {"images_per_s": size / runs.median}
        if name.startswith("codes"):
            derived["speedup"] = runs.speedup(found[name.replace("codes", "images")])
        rows.append(row(name, runs, **derived))
    return rows


def batches(source: object, size: int) -> Iterator[dict]:
    """Load batches without end as training does."""
    sampler, dataset = ResumableBatchSampler(source, size), SeededDataset(source)
    sampler.stop = 10**6
    return iter(DataLoader(dataset, batch_sampler=sampler, collate_fn=dataset.collate_fn))


PARTS = {"cache_reading": cache_reading, "cache_opening": cache_opening, "cache_step": cache_step}
