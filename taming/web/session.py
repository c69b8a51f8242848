"""The work behind the page: load a run, turn inputs into conditions, generate, cancel, save.

B batch, H W pixels, h w latent grid, f pixels per code.
"""

import logging
import queue
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

from taming.checkpoint import find_checkpoint, load_model
from taming.images import from_pil, save_png, to_pil
from taming.inference.completion import keep_pixels
from taming.inference.dataset import batch_of
from taming.inference.loading import PRECISIONS, decode
from taming.inference.provenance import options_metadata, run_directory
from taming.models.cond_transformer import Net2NetTransformer
from taming.models.tokenizer import Codes, as_list
from taming.sampling import Cancelled, image_generators
from taming.util import pick_device
from taming.web.conditions import NOTHING, Condition, conditions_of, described, to_tensor, to_value
from taming.web.painting import Size, brushed, check_shape, fitted
from taming.web.progress import Job, Progress, Watch
from taming.web.request import Request, check_request
from taming.web.runs import Run, find_runs

logger = logging.getLogger(__name__)

MAX_MODELS = 2  # in memory


@dataclass(frozen=True)
class Loaded:
    """A run in memory; `no_data` says why there is no data set, if there is none."""

    run: Run
    model: Net2NetTransformer
    step: int
    conditions: list[Condition]
    dataset: Any = None
    no_data: str = ""

    @property
    def resolution(self) -> Size:
        """The training size, (H, W) in pixels."""
        return self.model.first_stage_model.image_size


@dataclass(frozen=True)
class Generated:
    """A finished image: its file, which also holds the settings, and the settings."""

    path: Path
    settings: dict[str, str]


class Session:
    """The runs, the models in memory, and one job at a time.

    Args:
        places: runs, or folders of runs.
        outdir: a new folder for the images, which the page serves.
        keep: another folder, which gets a copy of each image and is not served; None for no copies.
        device: name of the device; see `pick_device`.
        data_of: builds the data set of a run from its config; None for no data sets.
        max_pixels: of all images of one job together.
        precision: of the transformers' weights, "32", "bf16" or "16".
    """

    def __init__(
        self, places: Sequence[str | Path], outdir: str | Path, *, keep: Path | None = None,
        device: str | None = None, data_of: Callable[[DictConfig], Any] | None = None,
        max_pixels: int = 4_000_000, precision: str = "32",
    ):
        self.places, self.outdir, self.keep, self.max_pixels = list(places), Path(outdir), keep, max_pixels
        self.device, self._data_of, self._dtype = pick_device(device), data_of, PRECISIONS[precision]
        self._models: dict[str, Loaded] = {}
        self._loading, self._generating = threading.Lock(), threading.Lock()
        find_runs(self.places)  # without any run, say so now

    def runs(self) -> list[Run]:
        """List the runs."""
        return find_runs(self.places)

    def load(self, name: str) -> Loaded:
        """Return a run by its name, from memory or from its checkpoint.

        Raises:
            ValueError: no such run, one without a checkpoint, or one that is not a transformer.
        """
        with self._loading:
            run = next((run for run in self.runs() if run.name == name), None)
            if run is None or run.problem:
                raise ValueError(run.problem if run else f"there is no run {name!r}: choose another one")
            if name not in self._models:
                while len(self._models) >= MAX_MODELS:
                    self._models.pop(next(iter(self._models)))
                self._models[name] = self._read(run)
            self._models[name] = self._models.pop(name)  # the latest is the last to go
            return self._models[name]

    def _read(self, run: Run) -> Loaded:
        model, config, step = load_model(run.path, device=self.device)
        if not isinstance(model, Net2NetTransformer):
            raise ValueError(
                f"{run.name} is a {type(model).__name__}: choose a run of stage 2, a transformer"
            )
        model.transformer.to(self._dtype)
        dataset, problem = None, "no data set was asked for"
        if self._data_of is not None:
            try:
                dataset = self._data_of(config.copy())
                problem = "" if len(dataset) else "the data set is empty"
            except Exception as error:  # the data of a run are often elsewhere, and are not needed
                logger.info("no data set for %s: %s", run.name, error)
                problem = f"no data set: {error}"
        dataset = None if problem else dataset
        loaded = Loaded(run, model, step, [], dataset, problem)
        return replace(loaded, conditions=conditions_of(model, dataset, self._shapes(loaded)))

    def _shapes(self, loaded: Loaded) -> dict[str, Size]:
        """Return (H, W) of the first item's conditions that are images, beside one of the training size."""
        model = loaded.model
        if loaded.dataset is None or model.downsample_cond_size > -1:
            return {}
        x, values = self._read_item(loaded, 0)
        (height, width), (top, side) = x.shape[2:], loaded.resolution
        return {
            key: (value.shape[2] * top // height, value.shape[3] * side // width)
            for key, value in values.items() if value.ndim == 4
        }

    # ---- items of the data set

    def item(self, name: str, number: int, key: str | None = None) -> Any:
        """Return the condition `key` of an item of a run's data set, as the page shows it; its image if None.

        Raises:
            ValueError: no data set, no such item, or a run that cannot be loaded.
        """
        loaded = self.load(name)
        x, values = self._read_item(loaded, number)
        if key is None:
            return to_pil(x[0])
        condition = next(condition for condition in loaded.conditions if condition.key == key)
        return to_value(condition, values[key], number)

    @staticmethod
    def _read_item(loaded: Loaded, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        if loaded.dataset is None:
            raise ValueError(f"{loaded.run.name} has no items to choose from: {loaded.no_data}")
        if not 0 <= number < len(loaded.dataset):
            raise ValueError(f"there is no item {number}: the data set has 0 to {len(loaded.dataset) - 1}")
        x, c = loaded.model.get_xc(batch_of(loaded.dataset, [number]))
        values = [c] if torch.is_tensor(c) else c
        return x, dict(zip(loaded.model.cond_keys, values, strict=True))

    # ---- generation

    def generate(self, request: Request, job: Job) -> Iterator[Progress | list[Generated]]:
        """Generate images; yield the progress now and then, and the list of images at the end.

        Raises:
            ValueError: an option, an image or a condition is not allowed; the message says what is.
            Cancelled: the job was cancelled.
        """
        with self._generating:
            if job.cancelled:
                raise Cancelled(-1, torch.zeros(0))
            yield Progress("loading the run")
            loaded = self.load(request.run)
            check_request(loaded.model, request, self.max_pixels)
            yield from self._generate(loaded, request, job)

    def _generate(self, loaded: Loaded, request: Request, job: Job) -> Iterator[Progress | list[Generated]]:
        model = loaded.model
        reports: queue.SimpleQueue[Progress | Tensor | BaseException] = queue.SimpleQueue()
        parts = self._condition(loaded, request)
        original, known, keep = self._known(loaded, request)
        watch = Watch(model, model.latent_shape(*request.size), keep, job, reports.put)

        def work() -> None:
            try:
                codes = model.sample_codes(
                    parts, request.options, size=request.size, known=known, mask=keep, callback=watch,
                    generator=image_generators(request.options.seed or 0, range(request.count)),
                )
                reports.put(Progress("decoding"))
                images = decode(model, codes)
                if original is not None and keep is not None:
                    images = keep_pixels(images, original.cpu(), keep.cpu(), model.first_stage_model.factor)
                reports.put(images)
            except BaseException as error:
                reports.put(error)

        thread = threading.Thread(target=torch.no_grad()(work), name="generation", daemon=True)
        thread.start()
        try:
            while isinstance(news := reports.get(), Progress):
                yield news
        finally:  # also if nobody reads the progress any longer
            job.cancel()
            thread.join()
        if isinstance(news, BaseException):
            raise news
        yield [self._save(image, number, loaded, request) for number, image in enumerate(news)]

    def _condition(self, loaded: Loaded, request: Request) -> list[Tensor]:
        """Return what `sample_codes` takes: codes (B, h, w) or tokens (B, M) of each condition."""
        def item(number: int) -> Tensor:
            return self._read_item(loaded, number)[1][condition.key]

        values: list[Tensor | None] = []
        for condition in loaded.conditions:
            value = request.conditions.get(condition.key)
            if value is None and condition.key in request.conditions and condition.kind != NOTHING:
                values.append(None)
                continue
            values.append(to_tensor(
                condition, value, request.size, resolution=loaded.resolution, seed=request.options.seed or 0,
                item=item
            ).to(loaded.model.device))
        if not any(value is not None for value in values):
            raise ValueError("every condition is left out: leave at least one in")
        parts = loaded.model.encode_conditions(values, request.size)
        return [part.expand(request.count, *part.shape[1:]) for part in parts]

    @staticmethod
    def _known(loaded: Loaded, request: Request) -> tuple[Tensor | None, Codes | None, Tensor | None]:
        """Return the original (1, 3, H, W), its codes (B, h, w) and where they stay, (h, w) bool.

        A code that the brush touches is generated again.
        """
        if request.original is None:
            return None, None, None
        model, size = loaded.model, request.size
        check_shape("the original", request.original, size)
        original = from_pil(fitted(request.original, size))[None].to(model.device)
        codes = model.encode_codes(original)  # (1, h, w), or a list of grids
        touched = brushed(request.mask, size)[None].float()
        generated = F.max_pool2d(touched, model.first_stage_model.factor)[0] > 0
        if not generated.any():
            raise ValueError(
                "nothing of the original is brushed over, so there is nothing to generate: paint over a part "
                "of it, or remove the original"
            )
        known = [grid.expand(request.count, -1, -1) for grid in as_list(codes)]
        return original, known if isinstance(codes, list) else known[0], ~generated

    def _save(self, image: Tensor, number: int, loaded: Loaded, request: Request) -> Generated:
        settings = {
            "run": run_directory(find_checkpoint(loaded.run.path).resolve()).name, "step": str(loaded.step),
            "size": "{}x{}".format(*request.size), "number": str(number), **options_metadata(request.options),
        }
        for condition in loaded.conditions:
            if condition.key in request.conditions:
                value = request.conditions[condition.key]
                settings[condition.key] = described(condition, value)
        if request.original is not None:
            share = brushed(request.mask, request.size).float().mean().item()
            settings["completion"] = f"{share:.0%} of an original was brushed over"
        name = f"{time.strftime('%Y%m%d-%H%M%S')}_{request.options.seed}_{number}_{secrets.token_hex(8)}.png"
        file = save_png(image, self.outdir / name, text=settings)
        if self.keep is not None:
            self.keep.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, self.keep / name)
        return Generated(file, settings)
