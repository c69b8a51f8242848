"""Train priors of equal size on the same codes, and compare them (Table 1 of Esser et al. 2021).

A configuration names the stages and the data as one for training does, without `transformer_config`; its
section `comparison` names the priors. Each prior gets the sizes, of those listed, whose number of parameters
comes closest to the wanted one. Codes are encoded once, or come from a code cache
(`taming.data.codes.CodeDataset`); every prior sees the same batches in the same order, with the same
optimizer. The measure is the negative log-likelihood (NLL) of the validation codes in nats per code, without
dropout; tokens of the condition do not count. Time is that of training steps alone.

B batch, N codes of an image, M condition tokens.
"""

import csv
import functools
import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from taming.checkpoint import read_checkpoint
from taming.checkpoint.content_hash import content_hash
from taming.checkpoint.save import write_checkpoint
from taming.config import ConfigError, instantiate_from_config, models_only
from taming.data.datamodule import DataModuleFromConfig
from taming.data.sampler import ResumableBatchSampler, SeededDataset
from taming.models.cond_transformer import Net2NetTransformer
from taming.models.conditioning import build_prior, complete_transformer_config
from taming.models.tokenizer import as_list
from taming.parameters import Length, PositiveInt, Range, find_problem
from taming.training.checks import check_agreement
from taming.training.console import rank_zero_print
from taming.training.sections import complete_sections
from taming.training.stages import fill_stages
from taming.util import atomic_write

TOLERANCE = 0.01  # of the wanted number of parameters: two priors then differ by at most 2 %
MOST_SIZES = 1000  # combinations that are tried
CURVES, TABLE, RESULT, SETTINGS = "curves.csv", "table.md", "result.json", "config.yaml"


@dataclass(frozen=True)
class Comparison:
    """The section `comparison` of a configuration.

    Attributes:
        priors: by name: `target`, `params`; `sizes`, the values to choose from by parameter; and
            `base_learning_rate`, that of the model when left out.
        parameters: number that each prior should have.
        steps: batches that the reference trains.
        reference: name of the prior whose steps and training time the others are compared at.
        evaluate_every: steps between two points of the curves.
        seeds: of weights, order of the data and dropout; one run of each prior for each.
        views: how often each training image is encoded, with other crops and flips each time.
    """

    priors: Mapping[str, Any]
    parameters: PositiveInt
    steps: PositiveInt
    reference: str
    evaluate_every: PositiveInt = 50
    seeds: Annotated[Sequence[Annotated[int, Range(0)]], Length(1)] = (0, 1, 2)
    views: PositiveInt = 1


class Point(NamedTuple):
    """One evaluation: after `step` batches and `seconds` of training, losses in nats per code."""

    step: int
    seconds: float
    train_loss: float
    nll: float


Curve = list[Point]


def nll_at(curve: Sequence[Point], axis: str, value: float) -> float:
    """Interpolate the NLL of a curve linearly at a step or a time.

    Args:
        curve: points in order.
        axis: "step" or "seconds".
        value: on that axis.

    Raises:
        ValueError: the value lies outside of the curve.
    """
    return _interpolate([(getattr(point, axis), point.nll) for point in curve], value, axis)


def step_at(curve: Sequence[Point], seconds: float) -> float:
    """Interpolate how many steps a run had taken after some seconds."""
    return _interpolate([(point.seconds, point.step) for point in curve], seconds, "seconds")


def _interpolate(pairs: Sequence[tuple[float, float]], x: float, axis: str) -> float:
    if not pairs or not pairs[0][0] <= x <= pairs[-1][0]:
        span = f"{pairs[0][0]:g} to {pairs[-1][0]:g}" if pairs else "nothing"
        raise ValueError(f"{axis} = {x:g} is outside of the curve, {span}: train longer")
    for (x0, y0), (x1, y1) in itertools.pairwise(pairs):
        if x <= x1:
            return y1 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return pairs[-1][1]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of some seeds, and its standard error, NaN for one seed."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


# ---- the configuration


def read_comparison(config: DictConfig, source: str) -> tuple[DictConfig, Comparison]:
    """Split a configuration into that of stages and data, completed, and its section `comparison`.

    Raises:
        ConfigError: a section or a value of it is missing or wrong.
    """
    content: Any = OmegaConf.to_container(config, resolve=True)
    section = content.pop("comparison", None)
    if not isinstance(section, dict):
        raise ConfigError(f"{source}: no section `comparison: {{priors: ..., parameters: ..., ...}}`")
    if problem := find_problem(Comparison, section):
        raise ConfigError(f"{source}: the section comparison {problem}")
    comparison = Comparison(**section)
    if comparison.reference not in comparison.priors:
        named = ", ".join(comparison.priors)
        raise ConfigError(f"comparison.reference: {comparison.reference!r} is none of the priors: {named}")
    known = {"target", "params", "sizes", "base_learning_rate"}
    for name, prior in comparison.priors.items():
        if not isinstance(prior, dict) or "target" not in prior or set(prior) - known:
            raise ConfigError(f"comparison.priors.{name}: write target, params, sizes, base_learning_rate")
    for key in [key for key in content if key not in ("model", "data", "lightning")]:
        del content[key]  # variables, which are resolved
    return complete_sections(OmegaConf.create(content), source), comparison


def choose_sizes(model: Net2NetTransformer, prior: Mapping[str, Any], wanted: int) -> tuple[dict, int]:
    """Return `{target, params}` of the prior that comes closest to a number of parameters, and its number.

    Args:
        model: has the stages.
        prior: `target`, `params` and `sizes`.
        wanted: number of parameters.

    Raises:
        ValueError: no combination of sizes comes within 1 %; none can be built; there are too many.
    """
    sizes = prior.get("sizes") or {}
    if (count := math.prod(len(values) for values in sizes.values())) > MOST_SIZES:
        raise ValueError(f"{count} combinations of the sizes of {prior['target']}: list at most {MOST_SIZES}")
    best: tuple[float, dict, int] | None = None
    problem: ValueError | None = None
    for values in itertools.product(*sizes.values()):
        config = {
            "target": prior["target"],
            "params": {**(prior.get("params") or {}), **dict(zip(sizes, values, strict=True))},
        }
        try:
            with torch.device("meta"):
                network = build_prior(complete_transformer_config(
                    config, model.first_stage_model, model.cond_stages, model.cond_sizes
                ))
        except ValueError as error:  # widths that heads do not divide, for instance
            problem = error
            continue
        number = sum(parameter.numel() for parameter in network.parameters())
        if best is None or abs(number - wanted) < best[0]:
            best = abs(number - wanted), config, number
    if best is None:
        raise problem or ValueError(f"no sizes of {prior['target']} are listed")
    if best[0] > TOLERANCE * wanted:
        near = ", ".join(f"{name}={best[1]['params'][name]}" for name in sizes) or "its params"
        raise ValueError(
            f"no sizes of {prior['target']} have {wanted:,} parameters within {TOLERANCE:.0%}: {near} has "
            f"{best[2]:,}; list others under sizes, or change comparison.parameters"
        )
    return best[1], best[2]


def build_model(config: DictConfig, prior: Mapping[str, Any], seed: int) -> Net2NetTransformer:
    """Build a model with this prior and seed."""
    section: Any = OmegaConf.to_container(config.model)
    section["params"]["transformer_config"] = {"target": prior["target"], "params": prior["params"]}
    torch.manual_seed(seed)
    with models_only():
        model = instantiate_from_config(section)
    if not isinstance(model, Net2NetTransformer):
        raise ValueError(f"model.target: {section['target']} is not a Net2NetTransformer: it has no prior")
    return model


# ---- codes


class Codes(NamedTuple):
    """Codes (images, N) of a data set, as the prior reads them, and their condition tokens (images, M_i)."""

    codes: Tensor
    conditions: list[Tensor]

    def batch(self, indices: Tensor, device: torch.device) -> tuple[Tensor, list[Tensor]]:
        """Return the codes and conditions of some images."""
        return self.codes[indices].to(device), [part[indices].to(device) for part in self.conditions]


@torch.no_grad()
def encode(model: Net2NetTransformer, data: DataModuleFromConfig, split: str, views: int = 1) -> Codes:
    """Encode a split, or read it from a code cache: image i of view v is number v * images + i."""
    dataset = SeededDataset(data.datasets[split], data.seed)
    keys = [(view, index) for view in range(views) for index in range(len(dataset))]
    codes, conditions = [], []
    for start in range(0, len(keys), data.batch_size):
        batch = dataset.collate_fn(dataset.__getitems__(keys[start : start + data.batch_size]))
        batch = {key: x.to(model.device) for key, x in batch.items() if isinstance(x, Tensor)}
        found, parts = model.get_codes(batch)
        codes.append(found.cpu())
        conditions.append([tokens.cpu() for tokens in parts])
    return Codes(torch.cat(codes), [torch.cat(parts) for parts in zip(*conditions, strict=True)])


def codes_hash(*sets: Codes) -> str:
    """Identify codes and conditions: SHA-256."""
    digest = hashlib.sha256()
    for part in [part for each in sets for part in (each.codes, *each.conditions)]:
        digest.update(repr(tuple(part.shape)).encode() + part.contiguous().numpy().tobytes())
    return digest.hexdigest()


# ---- training


class PriorRun:
    """Training of one prior with one seed, which can be interrupted: weights, optimizer and curve are kept.

    Args:
        model: with the prior.
        train, validation: codes; `train` has all views.
        batch_size: B.
        seed, views: of the order of the batches.
        file: where to keep the state; an earlier one is taken up.
        log: gets each new point.
    """

    def __init__(
        self, model: Net2NetTransformer, train: Codes, validation: Codes, *, batch_size: int, seed: int,
        views: int, file: Path, log: Callable[[Point], None],
    ):
        self.model, self.train, self.validation, self.file, self.log = model, train, validation, file, log
        self.batch_size, self.views, self.images = batch_size, views, len(train.codes) // views
        self.optimizer: Any = model.configure_optimizers()
        self.sampler = ResumableBatchSampler(range(self.images), batch_size, seed=seed)
        self.curve: Curve = []
        torch.manual_seed(seed)  # of dropout
        if file.exists():
            self._restore()

    def until(self, steps: int, seconds: float, every: int) -> Curve:
        """Train at least so many steps and seconds, with an evaluation every few steps; return the curve."""
        if not self.curve:
            self._add(Point(0, 0.0, math.nan, self.evaluate()))
        while (last := self.curve[-1]).step < steps or last.seconds < seconds:
            started = self._now()
            loss = torch.stack([self._step() for _ in range(every)]).mean()
            spent = last.seconds + self._now() - started
            self._add(Point(last.step + every, spent, float(loss), self.evaluate()))
        return self.curve

    def _step(self) -> Tensor:
        """Take one step; return the loss, ()."""
        model = self.model.train()
        codes, parts = self.train.batch(self._next_batch(), model.device)  # (B, N), (B, M_i)
        loss = model.codes_loss(codes, parts)
        loss.backward()
        model.set_learning_rate(self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        model.batches_seen += 1
        return loss.detach()

    def _next_batch(self) -> Tensor:
        self.sampler.start = self.model.batches_seen
        self.sampler.stop = self.sampler.start + 1
        (pairs,) = self.sampler
        return torch.tensor([epoch % self.views * self.images + index for epoch, index in pairs])

    @torch.no_grad()
    def evaluate(self) -> float:
        """Return the mean NLL of a validation code, in nats."""
        model = self.model.eval()
        total, codes = 0.0, self.validation.codes
        for indices in torch.arange(len(codes)).split(self.batch_size):
            given, parts = self.validation.batch(indices, model.device)
            total -= model.transformer.log_prob(given, torch.cat(parts, dim=1)).double().sum().item()
        return total / codes.numel()

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()

    def _add(self, point: Point) -> None:
        if not math.isfinite(point.nll):
            raise ValueError(f"the NLL is {point.nll} after {point.step} steps: lower the learning rate")
        self.curve.append(point)
        write_checkpoint({
            "state_dict": self.model.transformer.state_dict(),
            "optimizer_states": [self.optimizer.state_dict()],
            "rng": torch.get_rng_state(), "curve": [list(each) for each in self.curve],
        }, self.file)
        self.log(point)

    def _restore(self) -> None:
        kept = read_checkpoint(self.file)
        self.model.transformer.load_state_dict(kept["state_dict"])
        self.optimizer.load_state_dict(kept["optimizer_states"][0])
        torch.set_rng_state(kept["rng"])
        self.curve = [Point(*each) for each in kept["curve"]]
        self.model.batches_seen = self.curve[-1].step


# ---- the comparison


def compare_priors(config: DictConfig, source: str, outdir: Path, device: torch.device) -> dict[str, Any]:
    """Train all priors with all seeds, write curves, table and result to a folder, and return the result.

    Each run is kept; a second start with the same configuration goes on where the first one was stopped.

    Raises:
        ValueError: a wrong configuration, or a folder with another comparison.
    """
    config, comparison = read_comparison(config, source)
    fill_stages(config)
    data = instantiate_from_config(config.data)
    data.prepare_data()
    data.setup()
    first = next(iter(comparison.priors.values()))
    smallest = {key: values[0] for key, values in (first.get("sizes") or {}).items()}
    prior = {"target": first["target"], "params": {**(first.get("params") or {}), **smallest}}
    stages = build_model(config, prior, 0).to(device).eval()
    check_agreement(config, stages, data)
    priors, numbers = {}, {}
    for name, each in comparison.priors.items():
        priors[name], numbers[name] = choose_sizes(stages, each, comparison.parameters)
        chosen = ", ".join(f"{key}={priors[name]['params'][key]}" for key in each.get("sizes") or {})
        rank_zero_print(f"{name}: {numbers[name]:,} parameters, {chosen}")
    check_outdir(outdir, config, comparison)
    train, validation = encode(stages, data, "train", comparison.views), encode(stages, data, "validation")
    rank_zero_print(f"{len(train.codes):,} grids of codes to train on, {len(validation.codes):,} to validate")

    rates = {
        name: data.batch_size * float(each.get("base_learning_rate") or config.model.base_learning_rate)
        for name, each in comparison.priors.items()
    }
    curves: dict[str, dict[int, Curve]] = {name: {} for name in priors}
    order = [comparison.reference, *(name for name in priors if name != comparison.reference)]
    for seed, name in itertools.product(comparison.seeds, order):
        model = build_model(config, priors[name], seed).to(device)
        model.learning_rate = rates[name]
        run = PriorRun(
            model, train, validation, batch_size=data.batch_size, seed=seed, views=comparison.views,
            file=outdir / f"{name}_seed{seed}.ckpt", log=functools.partial(_print, name, seed),
        )
        # the others train as long as the reference did
        seconds = 0.0 if name == comparison.reference else curves[comparison.reference][seed][-1].seconds
        curves[name][seed] = run.until(comparison.steps, seconds, comparison.evaluate_every)
        write_curves(curves, outdir / CURVES)
    grids = " and ".join(f"{h}x{w}" for h, w in as_list(stages.latent_shape()))
    protocol = {
        "codes": f"{grids} of {stages.codebook_size}",
        "codes_sha256": codes_hash(train, validation),
        "tokenizer_sha256": content_hash(stages.first_stage_model),
        "train_grids": len(train.codes), "validation_grids": len(validation.codes),
        "batch_size": data.batch_size, "steps": comparison.steps, "seeds": list(comparison.seeds),
        "reference": comparison.reference, "learning_rates": rates, "device": device_name(device),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "priors": priors,
    }
    found = summarize(curves, numbers, comparison.reference, comparison.steps)
    result = {"protocol": protocol, **found}
    _write(outdir / RESULT, json.dumps(result, indent=2) + "\n")
    _write(outdir / TABLE, table(result))
    return result


def _print(name: str, seed: int, point: Point) -> None:
    rank_zero_print(
        f"{name}, seed {seed}: step {point.step}, {point.seconds:.1f} s, train {point.train_loss:.4f}, "
        f"validation {point.nll:.4f} nats per code"
    )


def summarize(
    curves: Mapping[str, Mapping[int, Sequence[Point]]], numbers: Mapping[str, int], reference: str,
    steps: int,
) -> dict[str, Any]:
    """Return the NLL of each prior at equal steps and at the time that the reference took for them.

    Args:
        curves: by prior and seed.
        numbers: of parameters.
        reference: a prior.
        steps: where to compare.

    Returns:
        "priors": by name, means over seeds with their standard errors; "seeds": the NLL of each seed.
    """
    found: dict[str, Any] = {"priors": {}, "seeds": {}}
    for name, runs in curves.items():
        each = []
        for seed, curve in runs.items():
            seconds = _seconds_at(curves[reference][seed], steps)
            each.append({
                "seed": seed, "nll_at_steps": nll_at(curve, "step", steps),
                "nll_at_time": nll_at(curve, "seconds", seconds), "steps_at_time": step_at(curve, seconds),
                "seconds": seconds, "seconds_per_step": curve[-1].seconds / curve[-1].step,
            })
        found["seeds"][name] = each
        found["priors"][name] = {"parameters": numbers[name]} | {
            key: mean_and_error([one[key] for one in each]) for key in each[0] if key != "seed"
        }
    return found


def _seconds_at(curve: Sequence[Point], step: float) -> float:
    return _interpolate([(point.step, point.seconds) for point in curve], step, "step")


def table(result: Mapping[str, Any]) -> str:
    """Return the result as a table in Markdown."""
    protocol = result["protocol"]
    lines = [
        f"NLL of {protocol['codes']} codes in nats per code, mean and standard error over "
        f"{len(protocol['seeds'])} seeds; lower is better.",
        "",
        f"| prior | parameters | NLL, {protocol['steps']:,} steps | NLL, time of {protocol['reference']} | "
        "steps in that time | seconds per step |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in result["priors"].items():
        steps, time, count, pace = (
            found[key] for key in ("nll_at_steps", "nll_at_time", "steps_at_time", "seconds_per_step")
        )
        lines.append(
            f"| {name} | {found['parameters']:,} | {steps[0]:.3f} ± {steps[1]:.3f} | {time[0]:.3f} ± "
            f"{time[1]:.3f} | {count[0]:,.0f} | {pace[0]:.3f} |"
        )
    seconds = result["priors"][protocol["reference"]]["seconds"]
    lines += ["", f"The time is {seconds[0]:.0f} s of training on {protocol['device']}, "
              f"{protocol['threads']} threads, without evaluations."]
    return "\n".join(lines) + "\n"


def write_curves(curves: Mapping[str, Mapping[int, Sequence[Point]]], file: Path) -> None:
    """Write all points to a CSV file."""
    with atomic_write(file) as partial, partial.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("prior", "seed", *Point._fields))
        writer.writerows(
            (name, seed, *point) for name, runs in curves.items() for seed, curve in runs.items()
            for point in curve
        )


def check_outdir(outdir: Path, config: DictConfig, comparison: Comparison) -> None:
    """Keep the configuration in a new folder, or raise ValueError where it holds another comparison."""
    content: Any = OmegaConf.to_container(config)
    text = OmegaConf.to_yaml(OmegaConf.create({**content, "comparison": vars(comparison)}))
    outdir.mkdir(parents=True, exist_ok=True)
    file = outdir / SETTINGS
    if file.exists() and file.read_text(encoding="utf-8") != text:
        raise ValueError(f"--outdir {outdir} holds a comparison with other settings: choose another folder")
    _write(file, text)


def device_name(device: torch.device) -> str:
    """Name a device: that of the GPU, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _write(file: Path, text: str) -> None:
    with atomic_write(file) as partial:
        partial.write_text(text, encoding="utf-8")
