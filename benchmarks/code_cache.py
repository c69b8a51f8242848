#!/usr/bin/env python
"""How fast a code cache is read on one core, how large it is, and what a step of stage 2 takes from it.

    python benchmarks/code_cache.py              all parts; writes, and removes, 32 MB in the temporary folder
    python benchmarks/code_cache.py step         one part
    python benchmarks/code_cache.py --quick      small sizes, to see that it runs

Times are those of the processor: other work on the machine does not count. README.md in this folder says what
each number means.
"""

import argparse
import gc
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from sampling import NO_LOSS, ROOT, Row, derived, row, run_parts
from torch import Tensor
from torch.utils.data import DataLoader

from taming.config import instantiate_from_config, load_config
from taming.data.codes import CodeDataset, CodeHeader, Field
from taming.data.codes.format import pack
from taming.data.codes.writer import CodeWriter
from taming.data.sampler import ResumableBatchSampler, SeededDataset
from taming.inference.encode import encode_dataset, header_of
from taming.models.cond_transformer import Net2NetTransformer

BATCH = 256  # records that are read at once


def in_turn(repeats: int, functions: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Processor seconds of each function, run in turn `repeats` times, after one run that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            gc.collect()
            start = time.process_time()
            function()
            if repeat:
                seconds[name].append(time.process_time() - start)
    return seconds


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


def reading(options: argparse.Namespace) -> list[Row]:
    """Batches of 256 records of 16x16 codes, one thread; the first time with checksums, and again without."""
    torch.set_num_threads(1)
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
            for name, seconds in in_turn(options.repeats, functions).items():
                speed = {"mb_per_s": size / median(seconds), "images_per_s": records / median(seconds)}
                rows.append(row(f"{codes} codes, {name}", seconds, **speed))
    return rows


def opening(options: argparse.Namespace) -> list[Row]:
    """Opening a cache, which reads its header alone, and the size of the file beside the fewest bits."""
    rows = []
    with TemporaryDirectory() as folder:
        for codes in (1024, 16384):
            for records in (1_000, 2_000) if options.quick else (1_000, 100_000):
                path = written(folder, codes, records)
                seconds = in_turn(max(5, options.repeats), {"open": lambda p=path: CodeDataset(p)})["open"]
                least = records * (256 * math.log2(codes) + math.log2(1000)) / 8
                size, what = path.stat().st_size, f"{codes} codes, {records} images"
                rows.append(row(what, seconds, bytes=size, of_least=size / least))
                path.unlink()
    return rows


def step(options: argparse.Namespace) -> list[Row]:
    """A step of the demo's transformer, batch 16, and its data: scenes in memory, and a code cache."""
    config = load_config(ROOT / "configs/demo/transformer.yaml")
    first = load_config(ROOT / "configs/demo/vqgan.yaml").model
    config.model.params.first_stage_config = {
        "target": first.target, "params": {**first.params, "lossconfig": NO_LOSS}
    }
    torch.manual_seed(0)
    model, data = instantiate_from_config(config.model).train(), config.data.params
    data.train.params.length, size = 64 if options.quick else 256, data.batch_size
    images = instantiate_from_config(data.train)
    with TemporaryDirectory() as folder:
        seeded = SeededDataset(images)
        header = header_of(model, seeded, {}, split="train", views=1, batch_size=size)
        writer = CodeWriter(Path(folder, "train.tcc"), header, size)
        start = time.process_time()
        encode_dataset(model.eval(), seeded, writer)
        rows = [row(f"encode {len(images)} images, once", [time.process_time() - start])]
        codes = CodeDataset(writer.path)
        rows += steps(model.train(), {"images": images, "codes": codes}, size, options.repeats)
    return rows


def steps(model: Net2NetTransformer, sources: dict, size: int, repeats: int) -> list[Row]:
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
    found = in_turn(4 * repeats, functions)
    rows = []
    for name, seconds in found.items():
        derived = {"images_per_s": size / median(seconds)}
        if name.startswith("codes"):
            pairs = zip(found[name.replace("codes", "images")], seconds, strict=True)
            derived["speedup"] = median(slow / fast for slow, fast in pairs)
        rows.append(row(name, seconds, **derived))
    return rows


def batches(source: object, size: int) -> Iterator[dict]:
    """Load batches without end as training does."""
    sampler, dataset = ResumableBatchSampler(source, size), SeededDataset(source)
    sampler.stop = 10**6
    return iter(DataLoader(dataset, batch_sampler=sampler, collate_fn=dataset.collate_fn))


# ---- the command

PARTS = {"reading": reading, "opening": opening, "step": step}


def show(found: Row) -> str:
    """Phrase a row of the table."""
    return f"{found['what']:40} {found['median_s'] * 1e3:9.2f} ms  {derived(found, 6)}"


def main(argv: list[str] | None = None) -> int:
    """Run the parts asked for, print a table, and write results/<date>_code_cache.json."""
    argv = sys.argv[1:] if argv is None else argv
    as_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_is)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)}; default: all")
    add = parser.add_argument
    add("--repeats", type=int, default=5, help="measurements of each time")
    add("--threads", type=int, help="of the steps; default: torch's")
    add("--quick", action="store_true", help="small sizes: seconds, to see that it runs")
    add("--out", type=Path, help="the JSON file; default: benchmarks/results/<date>_code_cache.json")
    options = parser.parse_args(argv)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    logging.disable(logging.INFO)
    if options.threads:
        torch.set_num_threads(options.threads)
    run_parts("code_cache", PARTS, options, argv, show)
    return 0


if __name__ == "__main__":
    sys.exit(main())
