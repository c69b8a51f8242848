"""The stages of a transformer: built and frozen, checked against each other, and conditions as images.

B batch, C channels, H W pixels, M tokens.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from taming.checkpoint import find_checkpoint, load_weights, read_checkpoint
from taming.checkpoint.families import identify
from taming.config import get_obj_from_str, instantiate_from_config
from taming.models.tokenizer import Tokenizer, as_list
from taming.modules.conditioners.base import Conditioner, Size
from taming.modules.priors.base import Prior
from taming.modules.transformer.positions import Part, part_length
from taming.modules.util import SOSProvider

logger = logging.getLogger(__name__)

PRIORS = {  # by the number of levels, one of each
    1: "taming.modules.transformer.mingpt.GPT", 2: "taming.modules.priors.hierarchical.HierarchicalPrior",
}
UNCONDITIONAL, FIRST_STAGE = "__is_unconditional__", "__is_first_stage__"
TRANSFORMER = "transformer."  # begins the names of a prior in the checkpoint of a whole model


def build_first_stage(config: dict) -> Any:
    """Build the tokenizer whose codes are modelled, frozen."""
    return _build(config, "first_stage_config", Tokenizer)


def build_cond_stage(config: Any, first_stage: nn.Module, sos_token: int) -> Any:
    """Build one condition stage, or several where `config` is a list, frozen."""
    if config == UNCONDITIONAL:
        return SOSProvider(sos_token)
    if config == FIRST_STAGE:
        return _of_one_level(first_stage, "cond_stage_config")
    if is_list(config):
        return nn.ModuleList([build_cond_stage(each, first_stage, sos_token) for each in config])
    return _build(config, "cond_stage_config", Conditioner)


def is_list(value: Any) -> bool:
    """Whether a value is a list, of YAML or of Python, and not a string."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def _build(config: dict, name: str, contract: type) -> nn.Module:
    """Build a stage; its checkpoint, where it names one, must be there, and it must fulfil its contract."""
    path = (config.get("params") or {}).get("ckpt_path")
    if path is not None and not Path(path).exists():
        raise FileNotFoundError(
            f"{name}.params.ckpt_path: {path} does not exist. Train that stage first, or name its "
            "checkpoint or run directory"
        )
    stage = instantiate_from_config(config)
    kind = type(stage)
    if contract is Conditioner:
        _of_one_level(stage, name)
    if not issubclass(kind, contract):
        if contract is Tokenizer:
            raise ValueError(
                f"{name}: {config.get('target')} is not a Tokenizer: derive it from "
                "taming.models.tokenizer.Tokenizer, which says what a first stage must offer"
            )
        # written before there was a contract: the defaults describe tokens of an unknown kind
        stage.__class__ = type(kind.__name__, (kind, contract), {"__module__": kind.__module__})
    return stage.eval().requires_grad_(False)


def build_prior(config: dict) -> Any:
    """Build the prior of `{target, params}`, and load its weights where `params` name a `ckpt_path`.

    That is a published checkpoint of a prior alone, or a run of a model like this one, of which the prior is
    taken.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: weights that do not fit the prior; the message names them.
    """
    params = dict(config.get("params") or {})
    path = params.pop("ckpt_path", None)
    sequences = getattr(get_obj_from_str(config.get("target", "")), "sequences", None)
    if sequences is not None:  # a prior that is made of priors
        window = {key: params[key] for key in ("bottom_window",) if key in params}
        for name, parts in sequences(params.get("layout", ()), **window).items():
            if name in params:
                if not isinstance(params[name], Mapping):
                    raise ValueError(f"{name}: {params[name]!r} is not a prior: give its {{target, params}}")
                params[name] = build_prior(_complete_level(params[name], parts, params.get("vocab_size")))
    prior = instantiate_from_config({**config, "params": params})
    if path is not None:
        state = read_checkpoint(find_checkpoint(path), tensors=("state_dict",))["state_dict"]
        published = identify(state)
        if published is not None:
            state = published.state
        elif own := {key: value for key, value in state.items() if key.startswith(TRANSFORMER)}:
            state = {key.removeprefix(TRANSFORMER): value for key, value in own.items()}
        load_weights(prior, state, source=str(path))
    return prior


def _complete_level(config: dict, parts: Sequence[Part], vocab_size: int | None) -> dict:
    """Return `{target, params}` of a prior in another with the sizes that follow from its sequence."""
    on_grid = getattr(get_obj_from_str(config.get("target", "")), "on_grid", False)
    params = {"vocab_size": vocab_size, **(config.get("params") or {})}
    layout = [1, *parts] if len(parts) == 1 and not on_grid else list(parts)  # 1: the start token
    if on_grid or params.get("layout") == "auto":
        params["layout"] = layout
    if not on_grid:
        length = sum(map(part_length, layout))
        params.setdefault("block_size", length - 1)
    return {**config, "params": params}


def _of_one_level(stage: Any, name: str) -> Any:
    """Return a condition stage; raise ValueError if it has codes at several levels."""
    if (levels := getattr(stage, "levels", 1)) > 1:
        raise ValueError(
            f"{name}: {type(stage).__name__} has codes at {levels} levels: give a stage with one"
        )
    return stage


# ---- what must agree


def check_levels(config: dict, first: Tokenizer) -> None:
    """Raise ValueError unless the prior of `{target, params}` models as many grids as the tokenizer has."""
    target = config.get("target")
    known = getattr(get_obj_from_str(target), "levels", 1) if target else first.levels
    if known != first.levels:
        grids = as_list(first.code_shape(*first.image_size))
        shapes = " and ".join(f"{h}x{w}" for h, w in grids)
        words = {1: "one level", 2: "two levels"}.get(first.levels, f"{first.levels} levels")
        raise ValueError(
            f"transformer_config: {target} is a prior that does not know {words}, but "
            f"{type(first).__name__}, the first stage, has {shapes} codes: name another prior, "
            f"{PRIORS.get(first.levels, 'one of as many levels')}, or another first stage"
        )


def condition_sizes(cond_size: Any, downsampled: int, image_size: Size, count: int) -> list[Size]:
    """Return (H, W) in pixels of each of `count` conditions beside an image of the training size.

    Sides that are given as floats are shares of the image's.
    """
    usual = (downsampled, downsampled) if downsampled > -1 else image_size
    given = list(cond_size) if count > 1 and is_list(cond_size) else [cond_size] * count
    if len(given) != count:
        raise ValueError(f"cond_size names {len(given)} sizes, but there are {count} conditions")
    sizes = [usual if size is None else size if is_list(size) else (size, size) for size in given]
    return [_in_pixels(size, image_size) for size in sizes]


def _in_pixels(size: Sequence[int | float], image_size: Size) -> Size:
    height, width = (
        round(side * whole) if isinstance(side, float) else side
        for side, whole in zip(size, image_size, strict=True)
    )
    return height, width


def complete_transformer_config(
    config: dict, first: Tokenizer, stages: Sequence[Conditioner], sizes: Sequence[Size]
) -> dict:
    """Return `{target, params}` of a prior with `block_size` where it is missing, and `layout` for "auto".

    A prior on the grid of the codes (`Prior.on_grid`) gets the layout in any case: of the conditions without
    the start token, and of the codes. Where the data decide how many tokens a condition has, the layout is
    given.

    Args:
        config: the configuration.
        first, stages: the first stage and the condition stages, which say how many tokens there are.
        sizes: see `condition_sizes`.

    Raises:
        ValueError: the data decide how many tokens a condition has, and no layout or block size is given;
            the layout of a prior on the grid is another than that of the stages.
    """
    params = {key: value for key, value in (config.get("params") or {}).items() if value is not None}
    on_grid = getattr(get_obj_from_str(config.get("target", "")), "on_grid", False)
    if "block_size" in params and params.get("layout") != "auto" and not on_grid:
        return config
    read = [(s, size) for s, size in zip(stages, sizes, strict=True) if not (on_grid and s.kind == "none")]
    shapes = [stage.token_shape(*size) for stage, size in read]
    grids = as_list(first.code_shape(*first.image_size))
    given: Any = params.get("layout", "auto" if on_grid else None)
    if on_grid and None in shapes and given == "auto":
        parts_given = ", ".join(["tokens", *(str(list(grid)) for grid in grids)])
        raise ValueError(
            f"{config['target']} has a fixed layout, but the data decide how many tokens a condition has: "
            f"give transformer_config.params.layout, [{parts_given}], if it takes sequences; "
            "taming.modules.transformer.mingpt.GPT takes any"
        )
    if not on_grid and None in shapes:
        raise ValueError(
            "transformer_config.params.block_size is missing, and the data decide how many tokens a "
            "condition has: give tokens + codes - 1"
        )
    parts = [*shapes, *grids]
    layout = [None if part is None else list(part) if len(part) > 1 else part[0] for part in parts]
    if given == "auto":
        params["layout"] = given = layout
    if on_grid and (len(given) != len(layout) or any(
        own not in (None, part if isinstance(part, int) else list(part))
        for own, part in zip(layout, given, strict=True)
    )):
        raise ValueError(
            f"transformer_config.params.layout: {params['layout']}, but the stages have {layout}: leave it "
            "out"
        )
    if not on_grid:
        params.setdefault("block_size", sum(math.prod(part) for part in parts if part is not None) - 1)
    return {**config, "params": params}


def check_sizes(
    prior: Prior, first: Tokenizer, stages: Sequence[Conditioner], sizes: Sequence[Size]
) -> None:
    """Raise ValueError, with both numbers and the fix, where vocabulary or block size are too small.

    Args:
        prior: has `vocab_size` and `block_size`.
        first, stages: the first stage and the condition stages.
        sizes: see `condition_sizes`.
    """
    own = getattr(prior, "condition_vocab_size", None)
    if own is not None and prior.vocab_size != first.codebook_size:
        raise ValueError(
            f"vocab_size: {prior.vocab_size} of the transformer, but the first stage has "
            f"{first.codebook_size} codes, and conditions have condition_vocab_size: {own} tokens of their "
            f"own: set transformer_config.params.vocab_size to {first.codebook_size}, or take another first "
            "stage"
        )
    name, size = condition_vocabulary(prior)
    vocabularies = [("first stage", first.codebook_size, "vocab_size", prior.vocab_size)]
    vocabularies += [("condition", s.vocab_size, name, size) for s in stages if s.vocab_size is not None]
    for what, tokens, name, size in vocabularies:
        if tokens > size:
            raise ValueError(
                f"{name}: {size} of the transformer is smaller than the {what}'s {tokens} tokens: set "
                f"transformer_config.params.{name} to at least {tokens}"
            )
    grid = first.num_codes(*first.image_size)
    counts = [n for s, size in zip(stages, sizes, strict=True) if (n := s.num_tokens(*size)) is not None]
    needed = sum(counts) + grid - 1
    if counts and prior.block_size < needed:
        height, width = first.image_size
        pixels = f"{height}" if height == width else f"{height}x{width}"
        raise ValueError(
            f"block_size: {prior.block_size} of the transformer is too short for {sum(counts)} condition "
            f"tokens and {grid} image codes at {pixels} pixels: set "
            f"transformer_config.params.block_size to at least {needed} (condition + codes - 1)"
        )


def condition_vocabulary(prior: Prior) -> tuple[str, int]:
    """Return which parameter of a prior counts the condition tokens, and how many it has."""
    own = getattr(prior, "condition_vocab_size", None)
    return ("vocab_size", prior.vocab_size) if own is None else ("condition_vocab_size", own)


def codebook_of(first: Any) -> Tensor:
    """Return the code vectors (K, C) of a tokenizer with one level."""
    device = next(first.parameters()).device
    return first.quantize.indices_to_codes(torch.arange(first.codebook_size, device=device)[:, None])[..., 0]


def condition_shapes(model: Any, size: Sequence[int] | None) -> list[Size]:
    """Return height and width in pixels that each condition must have beside an image of `size`."""
    trained = model.first_stage_model.image_size
    height, width = size or trained
    return [(height * own[0] // trained[0], width * own[1] // trained[1]) for own in model.cond_sizes]


def check_conditions(model: Any, x: Tensor, c: Sequence[Tensor]) -> None:
    """Raise where a condition of a batch has another size than the transformer was laid out for, or no token.

    Values are looked at on the CPU only.

    Args:
        model: the `Net2NetTransformer`.
        x: images (B, C, H, W).
        c: a condition for each of its stages: images (B, C, H, W), tokens (B, M) or classes (B,).
    """
    known = model.downsample_cond_size == -1 and _laid_out(model)
    shapes = condition_shapes(model, x.shape[2:]) if known else [None] * len(model.cond_keys)
    for key, value, shape in zip(model.cond_keys, c, shapes, strict=True):
        if shape is not None and value.ndim == 4 and tuple(value.shape[2:]) != shape:
            found, wanted = ("x".join(map(str, size)) for size in (value.shape[2:], shape))
            raise ValueError(
                f"the condition {key} has {found} pixels (height x width), but the transformer was laid out "
                f"for {wanted} beside such images: give it that size, or change cond_size and block_size"
            )
    check_tokens(model, c)


def check_tokens(model: Any, c: Sequence[Tensor]) -> None:
    """Raise ValueError for tokens that the data make, on the CPU, and the transformer does not have."""
    name, vocabulary = condition_vocabulary(model.transformer)
    for key, value, stage in zip(model.cond_keys, c, model.cond_stages, strict=True):
        if value.ndim == 2 and stage.vocab_size is None and value.device.type == "cpu":
            lowest, highest = (int(bound) for bound in value.aminmax())
            if lowest < 0 or highest >= vocabulary:
                raise ValueError(
                    f"the condition {key} has tokens from {lowest} to {highest}, but the transformer's "
                    f"{name}: {vocabulary} allows 0 to {vocabulary - 1}: change what makes "
                    f"the tokens, or {name}"
                )


def _laid_out(model: Any) -> bool:
    """Whether the block size is that of the conditions' sizes: then others would lie at wrong places."""
    first, pairs = model.first_stage_model, zip(model.cond_stages, model.cond_sizes, strict=True)
    counts = [stage.num_tokens(*size) for stage, size in pairs]
    if None in counts:
        return False
    needed = sum(counts) + first.num_codes(*first.image_size) - 1
    return model.transformer.block_size in (needed, needed + 1)  # published ones have one more


def check_null_token(
    token: int | None, dropout: float | Sequence[float], prior: Prior, stages: Sequence[Conditioner]
) -> None:
    """Raise ValueError for a null token or dropout that cannot be, warn where a condition holds the token."""
    rates = list(dropout) if isinstance(dropout, Sequence) else [dropout] * len(stages)
    if len(rates) != len(stages):
        raise ValueError(f"cond_dropout names {len(rates)} numbers, but there are {len(stages)} conditions")
    for rate in rates:
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"cond_dropout: {rate} is not a probability, 0 to 1")
    if any(rate > 0 and stage.kind == "none" for rate, stage in zip(rates, stages, strict=True)):
        raise ValueError(f"cond_dropout: {dropout}, but the model has no condition to drop")
    if token is None:
        if any(rates):
            raise ValueError(f"cond_dropout: {dropout} needs null_token, a token not in use")
        return
    name, vocabulary = condition_vocabulary(prior)
    if not 0 <= token < vocabulary:
        raise ValueError(
            f"null_token: {token} is outside the transformer's {name}: {vocabulary}: set "
            f"transformer_config.params.{name} to at least {token + 1}, or take another token"
        )
    for stage in stages:
        if stage.vocab_size is not None and token < stage.vocab_size:
            logger.warning(
                "null_token: %d is one of the condition's %d tokens as well", token, stage.vocab_size
            )


def null_shape(
    stage: Conditioner, trained: Size, image_size: Size, size: Size, token: int | None
) -> tuple[int, ...]:
    """Return the shape of the null tokens that stand for a missing condition, (h, w) or (M,), per image.

    Args:
        stage: its condition stage.
        trained: its height and width in pixels, beside an image of the training size, `image_size`.
        size: (H, W) of the image that is generated.
        token: the model's null token.

    Raises:
        ValueError: a model without one, or a stage whose tokens cannot be counted.
    """
    name = type(stage).__name__
    if token is None:
        raise ValueError(
            f"a condition ({name}) is missing, and the model has no token for none: train it with "
            "cond_dropout and null_token"
        )
    height, width = (n * own // whole for n, own, whole in zip(size, trained, image_size, strict=True))
    shape = stage.token_shape(height, width)
    if shape is None:
        raise ValueError(f"a condition is missing, but how many tokens {name} has is up to the data: give it")
    return shape


# ---- conditions as images


def show_conditions(
    model: Any, c: Tensor | Sequence[Tensor | None], x: Tensor, datasets: Iterable
) -> dict[str, Tensor]:
    """Show the conditions of images x (B, C, H, W), by their keys: (B, 1 or 3, H, W) in [-1, 1].

    Args:
        model: the `Net2NetTransformer`.
        c: its condition, or conditions; those that are None are left out, and those that cannot be shown.
        x: the images.
        datasets: have names of classes (`class_names`), and draw tokens (`plot_conditionals`).
    """
    values, shown = [c] if isinstance(c, Tensor) else c, {}
    size, datasets = (x.shape[2], x.shape[3]), [getattr(dataset, "data", dataset) for dataset in datasets]
    for key, stage, value in zip(model.cond_keys, model.cond_stages, values, strict=True):
        if value is None or key == model.first_stage_key:
            continue
        names = next((d.class_names for d in datasets if getattr(d, "class_names", ())), ())
        builder = next((d for d in datasets if key in getattr(d, "conditional_builders", {})), None)

        def plot(tokens: Tensor, size: Size, key: str = key, builder: Any = builder) -> Tensor:
            return builder.plot_conditionals(key, tokens, size[::-1])

        image = stage.to_rgb(value, size, names=names, plot=plot if builder else None)
        if image is not None and image.ndim == 4:
            shown[key] = image.to(x)
    return shown


# ---- from what users give


def class_numbers(text: str | None, model: Any, option: str = "--classes") -> list[int] | None:
    """Read class numbers that are to be taken in turn; all of the model where none are named, or None."""
    stage = stage_of_kind(model, "class")
    if text is None:
        return None if stage is None or stage.vocab_size is None else list(range(stage.vocab_size))
    if stage is None:
        raise ValueError(f"{option} {text}: the model is not conditioned on classes; leave it out")
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise ValueError(f"{option} {text}: give class numbers with commas between them, 3,7,12")
    return [int(part) for part in text.split(",")]


def stage_of_kind(model: Any, kind: str) -> Conditioner | None:
    """Return the first condition stage of a kind, or None."""
    return next((stage for stage in model.cond_stages if stage.kind == kind), None)


def conditions_of(
    model: Any, count: int, size: Size | None = None, given: Mapping[str, Any] | None = None,
) -> list[Tensor]:
    """Return conditions of `count` images of `size`, as `Net2NetTransformer.generate` takes them.

    Coordinates and start tokens have defaults. What is not given is left out as null tokens.

    Args:
        size: (H, W) in pixels; the training size when None.
        given: by the `kind` of a condition, what its `from_user` takes, for all images; or a list of one for
            each image.

    Raises:
        ValueError: a condition that is not given and that the model cannot do without; none that is given; a
            class or label that the model does not have.
    """
    given = given or {}
    values: list[Tensor | None] = []
    stages = zip(model.cond_keys, model.cond_stages, condition_shapes(model, size), strict=True)
    for key, stage, expected in stages:
        value = stage.default(expected)
        if value is None and (user := given.get(stage.kind)) is not None:
            each = user if isinstance(user, list) else [user]
            try:
                value = torch.cat([stage.from_user(one, expected) for one in each])
            except ValueError as error:
                raise ValueError(f"the condition {key}: {error}") from None
        if value is not None:
            value = value.to(model.device).expand(count, *value.shape[1:])
        values.append(value)
    missing = [key for key, value in zip(model.cond_keys, values, strict=True) if value is None]
    if missing and (model.null_token is None or len(missing) == len(values)):
        remedies = dict.fromkeys(stage.remedy for stage in model.cond_stages)
        raise ValueError(
            f"the model is conditioned on {', '.join(model.cond_keys)}, and {', '.join(missing)} is missing: "
            f"{'; '.join(remedies)}"
        )
    return model.encode_conditions(values, size)
