"""Batches of a code cache (`taming.data.codes`) in place of images: conditions, and whether the cache fits.

B batch, h w latent grid, M tokens.
"""

from typing import Any

from torch import Tensor

from taming.checkpoint.content_hash import content_hash
from taming.models.conditioning import condition_vocabulary
from taming.models.tokenizer import Codes, as_list
from taming.modules.conditioners.base import Conditioner
from taming.modules.priors.base import Prior

CODES, TOKENS = "codes", "tokens/"  # keys of such batches; the second stands before the key of a condition
SHOWN = 16  # digits of a hash


def is_cached(batch: dict) -> bool:
    """Tell whether a batch is of a code cache."""
    return CODES in batch or f"{CODES}/0" in batch


def cached_codes(batch: dict) -> Codes:
    """Return the codes (B, h, w) of a batch of a code cache; of several levels a list of them."""
    if CODES in batch:
        return batch[CODES]
    levels = sum(key.startswith(f"{CODES}/") for key in batch)
    return [batch[f"{CODES}/{level}"] for level in range(levels)]


def stage_hash(stage: Any) -> str:
    """Identify a condition stage by its weights and by what decides its tokens besides them."""
    return content_hash(stage, stage.kind, stage.vocab_size, stage.factor)


def cached_conditions(model: Any, batch: dict) -> list[Tensor]:
    """Return the tokens of each condition, (B, h, w) or (B, M): stored ones, or those of stored labels.

    Args:
        model: the `Net2NetTransformer`.
        batch: a batch of a code cache.
    """
    parts = []
    for key, stage in zip(model.cond_keys, model.cond_stages, strict=True):
        tokens = batch.get(TOKENS + key)
        if tokens is None:
            first = as_list(cached_codes(batch))[0]  # as many as there are images
            tokens = stage.tokens(first if stage.kind == "none" else _value(model, stage, key, batch))[1]
        parts.append(tokens)
    return parts


def conditions_to_show(model: Any, batch: dict) -> list[Tensor | None]:
    """Return what each condition was encoded from, about; None for what cannot be told from its tokens."""
    return [
        stage.from_tokens(batch[TOKENS + key]) if TOKENS + key in batch
        else None if stage.kind == "none" else _value(model, stage, key, batch)
        for key, stage in zip(model.cond_keys, model.cond_stages, strict=True)
    ]


def _value(model: Any, stage: Conditioner, key: str, batch: dict) -> Tensor:
    return stage.from_batch(model.get_input(batch, key))


def check_cache(model: Any, header: Any) -> None:
    """Raise ValueError where a code cache is not of the stages of a transformer.

    Args:
        model: the `Net2NetTransformer`.
        header: the `CodeHeader` of the cache.
    """
    again = "encode the data again with this configuration (`taming encode`)"
    first = model.first_stage_model
    if (wanted := content_hash(first)) != header.tokenizer:
        raise ValueError(
            f"the code cache is of the tokenizer {header.tokenizer[:SHOWN]}, but the first stage is "
            f"{wanted[:SHOWN]}: {again}, or name the first stage that it was encoded with"
        )
    grids, found = as_list(first.code_shape(*first.image_size)), [field.shape for field in header.grids]
    if found != grids:
        has, needs = (
            " and ".join("x".join(map(str, shape)) for shape in shapes) for shapes in (found, grids)
        )
        raise ValueError(
            f"the code cache has grids of {has} codes (height x width), but the transformer models {needs}: "
            f"{again}, or set its size"
        )
    if header.grids[0].values != first.codebook_size:
        raise ValueError(
            f"the code cache has {header.grids[0].values} different codes, but the first stage "
            f"{first.codebook_size}: {again}"
        )
    for key, stage, size in zip(model.cond_keys, model.cond_stages, model.cond_sizes, strict=True):
        if stage.kind != "none":
            shape = stage.token_shape(*size)
            _check_condition(header, key, stage, shape, model.transformer, again)


def _check_condition(
    header: Any, key: str, stage: Conditioner, shape: tuple[int, ...] | None, prior: Prior, again: str
) -> None:
    """Raise ValueError where the tokens of a condition are missing, or not those of its stage."""
    field = header.field(TOKENS + key)
    if field is None:
        label = header.field(key)
        if label is not None and stage.kind == "class":
            return  # its values are looked at batch by batch
        held = ", ".join(field.name for field in header.fields)
        raise ValueError(f"the code cache has no condition {key}, only {held}: {again}")
    if (wanted := stage_hash(stage)) != field.stage:
        raise ValueError(
            f"the code cache has tokens of {key} of the condition stage {field.stage[:SHOWN]}, but that of "
            f"the transformer is {wanted[:SHOWN]}: {again}, or name the stage that it was encoded with"
        )
    if shape is not None and field.shape != shape:
        raise ValueError(
            f"the code cache has tokens of {key} of the shape {field.shape}, but the transformer was laid "
            f"out for {shape}: {again}"
        )
    name, vocabulary = condition_vocabulary(prior)
    if field.values > vocabulary:
        raise ValueError(
            f"the code cache has up to {field.values} different tokens of {key}, but {name}: "
            f"{vocabulary} of the transformer is smaller: set "
            f"model.params.transformer_config.params.{name}={field.values}"
        )
