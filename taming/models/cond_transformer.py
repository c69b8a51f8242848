"""Stage 2: a transformer over the codes of a frozen VQGAN, given a condition (Esser et al. 2021, sec. 3.2).

B batch, C channels, H W pixels, h w latent grid, N = h*w codes, M condition tokens, V vocabulary.
A first stage of two levels has a list of two grids where one of a single level has a grid; N counts both.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.config import instantiate_from_config
from taming.models.base import ImageModel
from taming.models.code_cache import (
    cached_codes,
    cached_conditions,
    check_cache,
    conditions_to_show,
    is_cached,
)
from taming.models.conditioning import (
    UNCONDITIONAL,
    build_cond_stage,
    build_first_stage,
    build_prior,
    check_conditions,
    check_levels,
    check_null_token,
    check_sizes,
    check_tokens,
    codebook_of,
    complete_transformer_config,
    condition_sizes,
    is_list,
    null_shape,
    show_conditions,
)
from taming.models.tokenizer import Codes, Grid, as_list, flatten_codes, unflatten_codes
from taming.modules.conditioners.base import Conditioner, Size
from taming.modules.transformer.permuter import Identity
from taming.modules.util import SOSProvider  # noqa: F401  # notebooks of 2021 import it from here
from taming.parameters import AtLeastMinusOne, NonNegativeFloat, NonNegativeInt, Probability
from taming.sampling import SamplingOptions, filter_logits
from taming.sampling.logits_sampler import Generators
from taming.sampling.options import resolve

Condition = Tensor | Sequence[Tensor | None]


def disabled_train(self: nn.Module, mode: bool = True) -> nn.Module:
    """Replace `train` of a frozen model (2021): it stays in its mode."""
    return self


class Net2NetTransformer(ImageModel):
    """p(s | c): the codes s of an image, one after the other, after the condition's tokens c (eq. 9 and 10).

    Args:
        transformer_config: `{target, params}` of the prior, `GPT` for instance; see `Prior`. A missing
            `block_size`, and a `layout` "auto", are those of the stages' tokens. A `ckpt_path` in `params`
            says where its weights are: a published prior, or a run like this one.
        first_stage_config: of the VQGAN whose codes are modelled; its `ckpt_path` says where its weights are.
        cond_stage_config: of what turns the condition into tokens; "__is_unconditional__" for a start token
            alone, "__is_first_stage__" for the first stage itself; a list of these for several conditions at
            once, whose tokens then stand one after the other.
        permuter_config: of the order of the codes; raster when None.
        ckpt_path: checkpoint of this whole model to start from, but for keys that begin with `ignore_keys`.
        first_stage_key, cond_stage_key: entries of the batch; as many of the latter as there are conditions.
        downsample_cond_size: side in pixels to which the condition is shrunk before it is encoded, or -1.
        pkeep: probability that an input code is kept in training; the others are replaced by random ones.
        sos_token: the start token of an unconditional model.
        unconditional: the same as "__is_unconditional__".
        monitor: metric by which checkpoints are ranked.
        weight_decay: AdamW's, on the weights of linear layers only.
        scheduler_config: of a callable from batches seen to a factor on the learning rate (warm-up, cosine).
        cond_dropout: probability that `null_token` replaces all condition tokens of an item in training; 0.1
            is usual. Guidance (Ho and Salimans 2022) needs it. A list drops each condition on its own;
            guidance then is that of those which are dropped at times, and leaves the others in both halves.
        null_token: the token that stands for no condition, which no condition uses: one more than there are
            classes or codes, for instance; the `vocab_size` of the prior must count it, or its
            `condition_vocab_size`, where it has one.
        cond_size: side, or [height, width], in pixels of a condition that has another size than the image,
            beside an image of the training size; floats are shares of the image's sides, 0.5 the half. A list
            where there are several conditions.

    Raises:
        ValueError: a prior of another number of levels than the first stage's codes have; a vocabulary
            smaller than the codebook or the condition, or without the null token; a block size below
            M + N - 1.
        FileNotFoundError: no checkpoint of the first stage where `ckpt_path` says.
    """

    def __init__(
        self, transformer_config: dict, first_stage_config: dict, cond_stage_config: dict | str | Sequence,
        permuter_config: dict | None = None, ckpt_path: str | None = None, ignore_keys: tuple[str, ...] = (),
        first_stage_key: str = "image", cond_stage_key: str | Sequence[str] = "depth",
        downsample_cond_size: AtLeastMinusOne = -1, pkeep: Probability = 1.0, sos_token: NonNegativeInt = 0,
        unconditional: bool = False, *, monitor: str | None = None,
        weight_decay: NonNegativeFloat = 0.01, scheduler_config: dict | None = None,
        cond_dropout: float | Sequence[float] = 0.0, null_token: NonNegativeInt | None = None,
        cond_size: float | Sequence | None = None,
    ):
        super().__init__(monitor, scheduler_config)
        self.cond_dropout, self.null_token = cond_dropout, null_token
        self.sos_token, self.pkeep, self.weight_decay = sos_token, pkeep, weight_decay
        self.first_stage_key = first_stage_key
        self.cond_stage_key = cond_stage_key
        self.downsample_cond_size = downsample_cond_size
        self.init_first_stage_from_ckpt(first_stage_config)
        check_levels(transformer_config, self.first_stage_model)
        self.init_cond_stage_from_ckpt(UNCONDITIONAL if unconditional else cond_stage_config)
        self.permuter = instantiate_from_config(permuter_config) if permuter_config else Identity()
        stages, image_size = self.cond_stages, self.first_stage_model.image_size
        self.cond_sizes = condition_sizes(cond_size, downsample_cond_size, image_size, len(stages))
        transformer_config = complete_transformer_config(
            transformer_config, self.first_stage_model, stages, self.cond_sizes
        )
        self.transformer = build_prior(transformer_config)
        check_sizes(self.transformer, self.first_stage_model, stages, self.cond_sizes)
        check_null_token(null_token, cond_dropout, self.transformer, stages)
        trained = "ckpt_path" in (transformer_config.get("params") or {})
        if getattr(self.transformer, "embedding_from_codebook", False) and not trained:
            self.transformer.init_from_codebook(codebook_of(self.first_stage_model))
        if getattr(self.transformer, "on_grid", False) and not self.permuter.is_raster:
            raise ValueError(
                f"permuter_config: {type(self.transformer).__name__} reads the codes in raster order, not in "
                f"that of {type(self.permuter).__name__}: leave it out"
            )
        self.frozen = ("first_stage_model", "cond_stage_model")
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def init_first_stage_from_ckpt(self, config: dict) -> None:
        """Build the first stage."""
        self.first_stage_model = build_first_stage(config)

    def init_cond_stage_from_ckpt(self, config: Any) -> None:
        """Build the condition stage, or stages."""
        self.be_unconditional = config == UNCONDITIONAL
        if self.be_unconditional:
            self.cond_stage_key = self.first_stage_key
        stages, keys = (len(each) if is_list(each) else None for each in (config, self.cond_stage_key))
        if stages != keys:
            raise ValueError(
                f"cond_stage_key: {self.cond_stage_key}, but {stages or 1} condition stages: a list of "
                "stages needs a list of as many keys"
            )
        self.cond_stage_model = build_cond_stage(config, self.first_stage_model, self.sos_token)

    @property
    def cond_stages(self) -> list[Conditioner]:
        """The condition stages, one or several."""
        stage: Any = self.cond_stage_model
        return list(stage) if is_list(self.cond_stage_key) else [stage]

    @property
    def cond_keys(self) -> list[str]:
        """The entry of the batch of each condition stage."""
        return [self.cond_stage_key] if isinstance(self.cond_stage_key, str) else list(self.cond_stage_key)

    # ---- images and conditions <-> codes

    @torch.no_grad()
    def encode_to_z(self, x: Tensor) -> tuple[Any, Tensor]:
        """Encode images (B, C, H, W) to (quant (B, embed_dim, h, w), codes (B, N), permuted)."""
        codes = self.encode_codes(x)
        return self.first_stage_model.codes_to_latents(codes), self.permuter(flatten_codes(codes))

    @torch.no_grad()
    def encode_to_c(self, c: Condition) -> tuple[Any, Tensor]:
        """Encode the condition, as a batch has it, to (quant, tokens (B, M)); several quants are a list."""
        encoded = self._encode_each(c)
        quants = [quant for quant, _ in encoded]
        tokens = torch.cat([tokens.flatten(1) for _, tokens in encoded], dim=1)
        return quants if is_list(self.cond_stage_key) else quants[0], tokens

    @torch.no_grad()
    def encode_conditions(self, c: Condition, size: Size | None = None) -> list[Tensor]:
        """Encode each condition as `generate` takes it: codes (B, h, w) where they are a grid, else (B, M).

        Of several conditions, those that are None become null tokens, for an image of `size` (H, W) pixels.

        Raises:
            ValueError: a None, but the model has no null token; all are None.
        """
        return [tokens for _, tokens in self._encode_each(c, size)]

    def _encode_each(self, c: Condition, size: Size | None = None) -> list[tuple[Tensor | None, Tensor]]:
        """Return quant and tokens, (B, h, w) or (B, M), of each condition."""
        values = [c] if isinstance(c, Tensor) else list(c)
        given = [value for value in values if value is not None]
        if len(values) != len(self.cond_stages) or not given:
            raise ValueError(f"{len(given)} conditions are given, but the model has {len(self.cond_stages)}")
        trained_on = self.first_stage_model.image_size
        encoded: list[tuple[Tensor | None, Tensor]] = []
        for value, stage, trained in zip(values, self.cond_stages, self.cond_sizes, strict=True):
            if value is None:
                shape = null_shape(stage, trained, trained_on, size or trained_on, self.null_token)
                assert self.null_token is not None  # null_shape says what is wrong
                tokens = given[0].new_full((len(given[0]), *shape), self.null_token, dtype=torch.int64)
                encoded.append((None, tokens))
                continue
            if self.downsample_cond_size > -1:
                value = F.interpolate(value, size=(self.downsample_cond_size, self.downsample_cond_size))
            with torch.autocast(value.device.type, enabled=False):
                encoded.append(stage.tokens(value))
        return encoded

    @torch.no_grad()
    def decode_to_img(self, index: Tensor, zshape: Any) -> Tensor:
        """Decode codes (B, N) in the permuter's order to images (B, C, H, W).

        zshape: (B, C', h, w), or a list of these, of two levels.
        """
        index = self.permuter(index, reverse=True)
        grids = [tuple(each[2:]) for each in zshape] if isinstance(zshape, list) else tuple(zshape[2:])
        return self.decode_codes(unflatten_codes(index, grids))

    @torch.no_grad()
    def encode_codes(self, x: Tensor) -> Codes:
        """Encode images (B, C, H, W) to codes (B, h, w), in raster order."""
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would change the codes
            return self.first_stage_model.encode_codes(x)

    @torch.no_grad()
    def decode_codes(self, codes: Codes) -> Tensor:
        """Decode codes (B, h, w), in raster order, to images (B, C, H, W)."""
        return self.first_stage_model.decode_codes(codes)

    @torch.no_grad()
    def nll(self, x: Tensor, c: Condition) -> Tensor:
        """Return the negative log-likelihood (B,) of images given their conditions, in nats per image."""
        return self.codes_nll(self.encode_codes(x), self.encode_conditions(c))

    @torch.no_grad()
    def codes_nll(self, codes: Codes, parts: list[Tensor]) -> Tensor:
        """Return what `nll` does of codes (B, h, w), in raster order, given `encode_conditions`'s tokens."""
        condition = torch.cat([tokens.flatten(1) for tokens in parts], dim=1)
        return -self.transformer.log_prob(self.permuter(flatten_codes(codes)), condition).sum(1)

    # ---- training

    def shared_step(self, batch: dict, batch_idx: int | None = None) -> Tensor:
        """Return the loss of a batch, (): of `GPT` the negative log-likelihood, nats per code (eq. 9, 10)."""
        return self.codes_loss(*self.get_codes(batch))

    def codes_loss(self, codes: Tensor, parts: list[Tensor]) -> Tensor:
        """Return the loss, (), of codes (B, N), in the permuter's order, given tokens (B, M_i) each."""
        self.transformer.set_batches_seen(self.batches_seen)
        condition = torch.cat(self._dropped(parts), dim=1)  # (B, M)
        return self.transformer.loss(codes, condition, inputs=self._replaced(codes))

    def get_codes(self, batch: dict) -> tuple[Tensor, list[Tensor]]:
        """Return codes (B, N), in the permuter's order, and the tokens (B, M_i) of each condition.

        They are encoded here, or were encoded before: a batch of `taming.data.codes.CodeDataset` holds them.
        """
        if is_cached(batch):
            codes, parts = self.permuter(flatten_codes(cached_codes(batch))), cached_conditions(self, batch)
        else:
            x, c = self.get_xc(batch)  #                                   (B, C, H, W), each condition
            codes, parts = self.encode_to_z(x)[1], self.encode_conditions(c)
        return codes, [tokens.flatten(1) for tokens in parts]

    def training_step(self, batch: dict, batch_idx: int) -> None:
        """Take one step of the transformer: encode, predict each code from those before it, step, count."""
        loss = self.shared_step(batch, batch_idx)
        self.check_finite({"train/loss": loss}, batch_idx)
        self.manual_backward(loss / self.accumulate_grad_batches)
        if self.gradients_complete():
            optimizer: Any = self.optimizers()
            rate = self.set_learning_rate(optimizer)
            norm = self.clip_grad_norm(self.transformer.parameters())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self.batches_seen += 1
            self.log_dict({"train/lr": rate, "train/grad_norm": norm})
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=self.batch_size_of(batch))

    def forward(self, x: Tensor, c: Condition) -> tuple[Tensor, Tensor]:
        """Return logits (B, N, V) of images, given conditions, and the codes (B, N) they should predict."""
        _, codes = self.encode_to_z(x)
        parts = [tokens.flatten(1) for tokens in self.encode_conditions(c)]
        condition = torch.cat(self._dropped(parts), dim=1)
        return self.transformer.code_logits(self._replaced(codes), condition), codes

    def batch_size_of(self, batch: dict) -> int:
        """Return the number of images of a batch."""
        return len(as_list(cached_codes(batch))[0] if is_cached(batch) else batch[self.first_stage_key])

    def _replaced(self, codes: Tensor) -> Tensor:
        """In training, put random codes in place of some, of each with probability 1 - pkeep."""
        if not self.training or self.pkeep >= 1.0:
            return codes
        keep = torch.rand(codes.shape, device=codes.device) < self.pkeep
        return torch.where(keep, codes, torch.randint_like(codes, self.transformer.vocab_size))

    def _dropped(self, parts: list[Tensor]) -> list[Tensor]:
        """In training, put null tokens in some rows of the conditions, (B, M) each: all or each alone."""
        if not self.training or self.null_token is None:
            return parts
        rates = list(self.cond_dropout) if isinstance(self.cond_dropout, Sequence) else [self.cond_dropout]
        numbers = torch.rand(len(parts[0]), len(rates), device=parts[0].device)  # (B, 1 or parts)
        dropped = numbers < torch.tensor(rates, device=numbers.device)
        each = range(len(parts)) if len(rates) == len(parts) else [0] * len(parts)
        return [
            part.masked_fill(dropped[:, i : i + 1], self.null_token)
            for i, part in zip(each, parts, strict=True)
        ]

    def validators(self) -> dict[str, Any]:
        """Check the conditions."""
        return dict(zip(self.cond_keys, self.cond_stages, strict=True))

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Check values of the conditions while they are on the CPU."""
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        if isinstance(batch, dict) and all(isinstance(batch.get(key), Tensor) for key in self.cond_keys):
            check_tokens(self, [batch[key] for key in self.cond_keys])
        return batch

    def get_xc(self, batch: dict, N: int | None = None) -> tuple[Tensor, Any]:
        """Return images and conditions of the first N items of a batch, as the stages take them."""
        x = self.get_input(batch, self.first_stage_key)[:N]
        self.first_stage_model.check_size(*x.shape[2:])
        pairs = zip(self.cond_keys, self.cond_stages, strict=True)
        c = [stage.from_batch(self.get_input(batch, key)[:N]) for key, stage in pairs]
        check_conditions(self, x, c)
        return x, c if is_list(self.cond_stage_key) else c[0]

    def check_batch(self, batch: dict) -> None:
        """Raise ValueError if images or conditions do not fit the stages and the length of the sequence."""
        if not is_cached(batch):
            x, _ = self.get_xc(batch)
            self.first_stage_model.check_training_size(*x.shape[2:])

    def check_cache(self, header: Any) -> None:
        """Raise ValueError unless a code cache, of this header, is of the stages of this model."""
        check_cache(self, header)

    def on_train_start(self) -> None:
        """Check the code caches that are read: now the weights of a resumed run are there, too."""
        super().on_train_start()
        trainer: Any = self.trainer
        of_module = getattr(trainer.datamodule, "datasets", {}).values()
        for dataset in (*of_module, getattr(trainer.train_dataloader, "dataset", None)):
            if (header := getattr(dataset, "code_header", None)) is not None:
                self.check_cache(header)

    @property
    def tokens_per_image(self) -> int:  # type: ignore[override]
        """Number of codes of an image."""
        return self.first_stage_model.num_codes(*self.first_stage_model.image_size)

    @property
    def validation_metrics(self) -> tuple[str, ...]:
        """Names that validation logs, without "val/"."""
        return "loss", "perplexity"

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Log the loss, averaged over the set."""
        loss, size = self.shared_step(batch, batch_idx), self.batch_size_of(batch)
        self.log("val/loss", loss, on_epoch=True, prog_bar=True, sync_dist=True, batch_size=size)

    def on_validation_epoch_end(self) -> None:
        """Log the perplexity."""
        loss = self.trainer.callback_metrics.get("test/loss" if self.trainer.testing else "val/loss")
        if loss is not None:
            self.log("val/perplexity", loss.exp(), sync_dist=True)  # the same on all ranks

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make AdamW with decay on the weights of linear layers; not on biases, norms and embeddings."""
        decay = [m.weight for m in self.transformer.modules() if isinstance(m, nn.Linear)]
        chosen = {id(p) for p in decay}
        rest = [p for p in self.transformer.parameters() if id(p) not in chosen]
        groups = [{"params": decay, "weight_decay": self.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        return torch.optim.AdamW(
            groups, lr=self.base_learning_rate(), betas=(0.9, 0.95), fused=self.has_fused_step
        )

    # ---- sampling

    def top_k_logits(self, logits: Tensor, k: int) -> Tensor:
        """Return logits (..., V) with all but the k highest at -inf: the 2021 call."""
        return filter_logits(logits, top_k=k)

    @torch.no_grad()
    def sample(
        self, x: Tensor, c: Tensor, steps: int, temperature: float = 1.0, sample: bool = False,
        top_k: int | None = None, callback: Callable[[int], object] | None = None, *,
        top_p: float | None = None, generator: Generators = None,
    ) -> Tensor:
        """Continue codes x (B, n) under condition tokens c (B, M) by `steps`: (B, n + steps); the 2021 call.

        Takes the most likely code each time unless `sample`; see `Prior.sample`.
        """
        options = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p, greedy=not sample)
        return self.transformer.sample(
            c, (1, x.shape[1] + steps), options, known=x, generator=generator,
            codebook_size=self.codebook_size,
            callback=None if callback is None else lambda step, codes: callback(step),
        )

    @property
    def codebook_size(self) -> int:
        """Number of codes that the first stage can decode; the transformer's vocabulary may hold more."""
        return self.first_stage_model.codebook_size

    def latent_shape(self, height: int | None = None, width: int | None = None) -> Grid:
        """Return the grid (h, w) of an image of that size in pixels, of the training size when left out."""
        trained = self.first_stage_model.image_size
        return self.first_stage_model.code_shape(height or trained[0], width or trained[1])

    def coarse_shape(self, height: int | None = None, width: int | None = None) -> Size:
        """Return what `latent_shape` does, of two levels the grid of the coarser one."""
        return as_list(self.latent_shape(height, width))[0]

    def check_options(self, options: SamplingOptions) -> None:
        """Raise ValueError for options of sampling that this model cannot follow; see `check` there."""
        options.check(
            codebook_size=self.codebook_size, window_width=self.coarse_shape()[1],
            has_null=self.null_token is not None, in_steps=getattr(self.transformer, "in_steps", False),
        )

    @torch.no_grad()
    def generate(
        self, c_indices: Tensor | Sequence[Tensor], options: SamplingOptions | None = None, *,
        size: Size | None = None, known: Codes | None = None, mask: Tensor | None = None,
        generator: Generators = None, callback: Callable[[int, Tensor], object] | None = None, **changes: Any,
    ) -> Tensor:
        """Generate images (B, C, H, W) in [-1, 1] given what `encode_conditions` gave, or tokens (B, M).

        Images larger than in training are sampled through a window of the training size that moves every
        `stride` codes, and so are images with codes that stay.

        Args:
            c_indices: the conditions.
            options: see `SamplingOptions`; `changes` are applied on top, `top_k=100` for instance.
            size: (H, W) in pixels; the training size when None.
            known, mask: codes (B, h, w), raster order, that stay where the mask (B, h, w) or (h, w) is True.
                Of two levels the mask is of the coarser grid, and the codes below it stay as well.
            generator, callback: see `taming.sampling.sample_tokens`.

        Raises:
            ValueError: a size that is not a multiple of f, or below the training size; a permuter other than
                raster order, where the window has to move; guidance without a null token.
            taming.sampling.Cancelled: the callback returned False.
        """
        codes = self.sample_codes(
            c_indices, options, size=size, known=known, mask=mask, generator=generator, callback=callback,
            **changes,
        )
        return self.decode_codes(codes).clamp(-1.0, 1.0)

    @torch.no_grad()
    def sample_codes(
        self, c_indices: Tensor | Sequence[Tensor], options: SamplingOptions | None = None, *,
        size: Size | None = None, known: Codes | None = None, mask: Tensor | None = None, **arguments: Any,
    ) -> Codes:
        """Sample the codes (B, h, w), in raster order, of the images that `generate` would return."""
        samplers = {name: arguments.pop(name) for name in ("generator", "callback") if name in arguments}
        options = resolve(options, arguments)
        parts = [c_indices] if isinstance(c_indices, Tensor) else list(c_indices)
        window = self.latent_shape()
        shape = self.latent_shape(*size) if size else window
        null = None if self.null_token is None else self._without_conditions(parts)
        if shape == window and known is None and not options.wavefront:
            condition, null_tokens = (
                None if each is None else torch.cat([part.flatten(1) for part in each], dim=1)
                for each in (parts, null)
            )
            codes = self.transformer.sample(
                condition, shape, options, null_condition=null_tokens, codebook_size=self.codebook_size,
                **samplers,
            )
            return unflatten_codes(self.permuter(codes, reverse=True), shape)
        self.check_window()
        return self.transformer.sample_window(
            parts, options, shape=shape, window=window, known=known, mask=mask, null_condition=null,
            condition_windows=self.condition_windows(parts), codebook_size=self.codebook_size, **samplers,
        )

    def check_window(self) -> None:
        """Raise ValueError unless a window can slide over codes: a grid of the image, in raster order."""
        if not (first := self.first_stage_model).spatial:
            raise ValueError(
                f"the codes of {type(first).__name__} have no place in the image: no window can slide over "
                f"them, and no part be kept; generate whole images of {first.image_size[0]}x"
                f"{first.image_size[1]} pixels"
            )
        if not self.permuter.is_raster:
            h, w = self.coarse_shape()
            raise ValueError(
                f"the codes are in the order of {type(self.permuter).__name__}: a window can only slide over "
                f"raster order; generate the training size, {h}x{w} codes"
            )

    def window_nll(self, c_indices: Tensor | Sequence[Tensor], codes: Codes) -> Codes:
        """Return the nats (B, h, w) of each code of a grid of any size; see `taming.sampling.window_nll`."""
        parts = [c_indices] if isinstance(c_indices, Tensor) else list(c_indices)
        return self.transformer.window_nll(
            parts, codes, window=self.latent_shape(), condition_windows=self.condition_windows(parts)
        )

    def _without_conditions(self, parts: list[Tensor]) -> list[Tensor]:
        """Return what guidance leads away from: null tokens, but conditions that were never dropped stay."""
        assert self.null_token is not None
        rates = list(self.cond_dropout) if isinstance(self.cond_dropout, Sequence) else [1.0] * len(parts)
        if len(rates) != len(parts):  # tokens of all conditions in one
            rates = [1.0] * len(parts)
        return [
            part.new_full(part.shape, self.null_token) if rate > 0 else part
            for part, rate in zip(parts, rates, strict=True)
        ]

    def condition_windows(self, parts: list[Tensor]) -> list[Size | None]:
        """Return the training size in the grid of each condition; None for tokens."""
        if len(parts) != len(self.cond_stages):
            return [None] * len(parts)  # tokens of all conditions in one
        factors = [stage.factor for stage in self.cond_stages]
        return [
            None if part.ndim == 2 or factor is None else (size[0] // factor, size[1] // factor)
            for part, factor, size in zip(parts, factors, self.cond_sizes, strict=True)
        ]

    # ---- images for the log

    @torch.no_grad()
    def log_images(
        self, batch: dict, temperature: float | None = None, top_k: int | None = 100,
        callback: Callable[[int], object] | None = None, lr_interface: bool = False, *, max_images: int = 8,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Return what is worth looking at: inputs, reconstructions, samples from half the codes or none."""
        if lr_interface:
            raise ValueError("lr_interface: samplers of 2021 only; name the low resolution as cond_stage_key")
        images: dict[str, Tensor] = {}
        c: list[Tensor | None]
        if is_cached(batch):  # there are no inputs to show
            few = {key: x[:max_images].to(self.device) for key, x in batch.items() if isinstance(x, Tensor)}
            codes, parts = cached_codes(few), cached_conditions(self, few)
            c = conditions_to_show(self, few)
        else:
            x, c_given = self.get_xc(batch, max_images)
            values = [c_given] if isinstance(c_given, Tensor) else c_given
            x, c = x.to(self.device), [value.to(self.device) for value in values]
            codes, parts = self.encode_codes(x), self.encode_conditions(c)
            images["inputs"] = x
        condition = torch.cat([part.flatten(1) for part in parts], dim=1)
        z = self.permuter(flatten_codes(codes))
        half, shapes = z.shape[1] // 2, [(0, 0, *grid.shape[1:]) for grid in as_list(codes)]
        zshape = shapes if isinstance(codes, list) else shapes[0]
        top_k = None if top_k is None else min(top_k, self.codebook_size)
        images["reconstructions"] = self.decode_to_img(z, zshape)
        for key, shown in self.show_conditions(c, next(iter(images.values()))).items():
            images["conditioning" if len(self.cond_keys) == 1 else f"conditioning_{key}"] = shown
        if isinstance(codes, list):  # of two levels the upper half of both grids
            options = SamplingOptions(temperature=temperature or 1.0, top_k=top_k)
            upper = torch.zeros(self.coarse_shape(), dtype=torch.bool)
            upper[: len(upper) // 2] = True
            given: dict[str, dict] = {"samples_half": {"known": codes, "mask": upper}, "samples": {}}
            return images | {name: self.generate(parts, options, **known) for name, known in given.items()}
        for name, kept in (("samples_half", z[:, :half]), ("samples", z[:, :0])):
            sampled = self.sample(
                kept, condition, z.shape[1] - kept.shape[1], temperature=temperature or 1.0, sample=True,
                top_k=top_k, callback=callback,
            )
            images[name] = self.decode_to_img(sampled, zshape)
        return images

    def show_conditions(self, c: Condition, x: Tensor, datasets: Iterable | None = None) -> dict[str, Tensor]:
        """Show conditions as images (B, 1 or 3, H, W) by their keys; see `conditioning.show_conditions`.

        `datasets` are those of the run by default.
        """
        if datasets is None:
            datasets = getattr(getattr(self._trainer, "datamodule", None), "datasets", {}).values()
        return show_conditions(self, c, x, datasets)
