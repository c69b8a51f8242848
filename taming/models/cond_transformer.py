"""Stage 2: a transformer over the codes of a frozen VQGAN, given a condition (Esser et al. 2021, sec. 3.2).

B batch, C channels, H W pixels, h w latent grid, N = h*w codes, M condition tokens, V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.config import instantiate_from_config
from taming.models.base import ImageModel
from taming.models.condition_pictures import draw_conditions
from taming.models.conditioning import (
    UNCONDITIONAL,
    Size,
    build_cond_stage,
    build_first_stage,
    check_conditions,
    check_null_token,
    check_sizes,
    condition_sizes,
    is_list,
    null_shape,
)
from taming.modules.transformer.permuter import Identity
from taming.sampling import filter_logits, sample_tokens, sample_window
from taming.sampling.filters import Number
from taming.sampling.schedules import Setting

Condition = Tensor | Sequence[Tensor | None]


class Net2NetTransformer(ImageModel):
    """p(s | c): the codes s of an image, one after the other, after the condition's tokens c (eq. 9 and 10).

    Args:
        transformer_config: `{target, params}` of the network, `GPT`.
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
            classes or codes, for instance; `vocab_size` must count it.
        cond_size: side, or [height, width], in pixels of a condition that is no picture of the image's size,
            beside an image of the training size; a list where there are several conditions.

    Raises:
        ValueError: a vocabulary smaller than the codebook or the condition, or without the null token; a
            block size below M + N - 1.
        FileNotFoundError: no checkpoint of the first stage where `ckpt_path` says.
    """

    def __init__(
        self, transformer_config: dict, first_stage_config: dict, cond_stage_config: dict | str | Sequence,
        permuter_config: dict | None = None, ckpt_path: str | None = None, ignore_keys: tuple[str, ...] = (),
        first_stage_key: str = "image", cond_stage_key: str | Sequence[str] = "depth",
        downsample_cond_size: int = -1,
        pkeep: float = 1.0, sos_token: int = 0, unconditional: bool = False, *, monitor: str | None = None,
        weight_decay: float = 0.01, scheduler_config: dict | None = None,
        cond_dropout: float | Sequence[float] = 0.0, null_token: int | None = None,
        cond_size: int | Sequence | None = None,
    ):
        super().__init__(monitor, scheduler_config)
        self.be_unconditional = unconditional or cond_stage_config == UNCONDITIONAL
        self.cond_dropout, self.null_token = cond_dropout, null_token
        self.sos_token, self.pkeep, self.weight_decay = sos_token, pkeep, weight_decay
        self.first_stage_key = first_stage_key
        self.cond_stage_key = first_stage_key if self.be_unconditional else cond_stage_key
        self.downsample_cond_size = downsample_cond_size
        self.first_stage_model = build_first_stage(first_stage_config)
        cond_stage_config = UNCONDITIONAL if self.be_unconditional else cond_stage_config
        self.cond_stage_model = build_cond_stage(cond_stage_config, self.first_stage_model, sos_token)
        self.permuter = instantiate_from_config(permuter_config) if permuter_config else Identity()
        self.transformer = instantiate_from_config(transformer_config)
        stages, several = self.cond_stages, isinstance(self.cond_stage_model, nn.ModuleList)
        if is_list(self.cond_stage_key) != several or (several and len(self.cond_stage_key) != len(stages)):
            raise ValueError(
                f"cond_stage_key: {self.cond_stage_key}, but {len(stages)} condition stages: a list of "
                "stages needs a list of as many keys"
            )
        resolution = getattr(self.first_stage_model, "resolution", None)
        self.cond_sizes = condition_sizes(cond_size, downsample_cond_size, resolution, len(stages))
        config = self.transformer.config
        check_sizes(config, self.first_stage_model, stages, self.cond_sizes)
        check_null_token(null_token, cond_dropout, config.vocab_size, stages)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    @property
    def cond_stages(self) -> list[nn.Module]:
        """The condition stages, one or several."""
        stage = self.cond_stage_model
        return list(stage) if isinstance(stage, nn.ModuleList) else [stage]

    @property
    def cond_keys(self) -> list[str]:
        """The entry of the batch of each condition stage."""
        return list(self.cond_stage_key) if is_list(self.cond_stage_key) else [self.cond_stage_key]

    def train(self, mode: bool = True) -> "Net2NetTransformer":
        """Switch the transformer; the stages are frozen and stay in eval mode."""
        super().train(mode)
        self.first_stage_model.eval()
        self.cond_stage_model.eval()
        return self

    # ---- images and conditions <-> codes

    @torch.no_grad()
    def encode_to_z(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) to (quant (B, embed_dim, h, w), codes (B, N) in the permuter's order)."""
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would change the codes
            quant, _, info = self.first_stage_model.encode(x)
        return quant, self.permuter(info[2].view(x.shape[0], -1))

    @torch.no_grad()
    def encode_to_c(self, c: Condition) -> tuple[Tensor | list[Tensor], Tensor]:
        """The condition, as the batch has it, to (quant, tokens (B, M)); of several, a list of quants."""
        encoded = self._encode_each(c)
        quants = [quant for quant, _ in encoded]
        tokens = torch.cat([tokens.flatten(1) for _, tokens in encoded], dim=1)
        return quants if isinstance(self.cond_stage_model, nn.ModuleList) else quants[0], tokens

    @torch.no_grad()
    def encode_conditions(self, c: Condition, size: Size | None = None) -> list[Tensor]:
        """Each condition as `generate` takes it: codes (B, h, w) of pictures, else tokens (B, M).

        Of several conditions, those that are None become null tokens, for an image of `size` (H, W) pixels.

        Raises:
            ValueError: a None, but the model has no null token; all are None.
        """
        return [tokens for _, tokens in self._encode_each(c, size)]

    def _encode_each(self, c: Condition, size: Size | None = None) -> list[tuple[Tensor, Tensor]]:
        """Quant and tokens, (B, h, w) or (B, M), of each condition."""
        values = [c] if torch.is_tensor(c) else list(c)
        given = [value for value in values if value is not None]
        if len(values) != len(self.cond_stages) or not given:
            raise ValueError(f"{len(given)} conditions are given, but the model has {len(self.cond_stages)}")
        encoded = []
        for value, stage, trained in zip(values, self.cond_stages, self.cond_sizes, strict=True):
            if value is None:
                side = self.first_stage_model.resolution
                shape = null_shape(stage, trained, side, size or (side, side), self.null_token)
                tokens = torch.full((len(given[0]), *shape), self.null_token, device=given[0].device)
                encoded.append((None, tokens))
                continue
            if self.downsample_cond_size > -1:
                value = F.interpolate(value, size=(self.downsample_cond_size, self.downsample_cond_size))
            with torch.autocast(value.device.type, enabled=False):
                quant, _, info = stage.encode(value)
            shape = quant.shape[2:] if quant.ndim == 4 else (-1,)
            encoded.append((quant, info[2].view(len(value), *shape)))
        return encoded

    @torch.no_grad()
    def decode_to_img(self, index: Tensor, zshape: tuple[int, int, int, int]) -> Tensor:
        """Codes (B, N) in the permuter's order to images (B, C, H, W); zshape is (B, embed_dim, h, w)."""
        index = self.permuter(index, reverse=True)
        return self.first_stage_model.decode_code(index.reshape(-1, *zshape[2:]))

    # ---- training

    def forward(self, x: Tensor, c: Condition) -> tuple[Tensor, Tensor]:
        """Images and conditions to (logits (B, N, V), the codes (B, N) they should predict)."""
        _, target = self.encode_to_z(x)
        parts = [tokens.flatten(1) for tokens in self.encode_conditions(c)]
        if self.training and self.null_token is not None:
            parts = self._dropped(parts)
        condition = torch.cat(parts, dim=1)
        codes = target
        if self.training and self.pkeep < 1.0:
            keep = torch.rand(codes.shape, device=codes.device) < self.pkeep
            codes = torch.where(keep, codes, torch.randint_like(codes, self.transformer.config.vocab_size))
        tokens = torch.cat((condition, codes), dim=1)  # (B, M + N)
        logits, _ = self.transformer(tokens[:, :-1])
        return logits[:, condition.shape[1] - 1:], target  # the last condition token predicts the first code

    def _dropped(self, parts: list[Tensor]) -> list[Tensor]:
        """Condition tokens, (B, M) each, with null tokens in some rows: in all parts, or each on its own."""
        each = is_list(self.cond_dropout)
        rates = list(self.cond_dropout) if each else [self.cond_dropout]
        numbers = torch.rand(len(parts[0]), len(rates), device=parts[0].device)  # (B, 1 or parts)
        dropped = numbers < torch.tensor(rates, device=numbers.device)
        return [
            part.masked_fill(dropped[:, i : i + 1] if each else dropped, self.null_token)
            for i, part in enumerate(parts)
        ]

    def shared_step(self, batch: dict) -> Tensor:
        """Mean negative log-likelihood per code, in nats."""
        x, c = self.get_xc(batch)
        logits, target = self(x, c)
        return F.cross_entropy(logits.flatten(0, 1).float(), target.flatten())

    def get_xc(self, batch: dict, N: int | None = None) -> tuple[Tensor, Tensor | list[Tensor]]:
        """Images and conditions of the first N items of a batch, as the stages take them."""
        x = self.get_input(batch, self.first_stage_key)[:N]
        c = []
        for key, stage in zip(self.cond_keys, self.cond_stages, strict=True):
            value = self.get_input(batch, key)[:N]
            c.append(stage.one_hot(value) if value.ndim == 3 else value)  # label ids
        check_conditions(self, x, c)
        return x, c if is_list(self.cond_stage_key) else c[0]

    def training_step(self, batch: dict, batch_idx: int) -> None:
        loss = self.shared_step(batch)
        self.check_finite({"train/loss": loss}, batch_idx)
        self.update_weights(loss, [(self.optimizers(), self.transformer.parameters())])
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch[self.first_stage_key]))

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        loss, size = self.shared_step(batch), len(batch[self.first_stage_key])
        self.log("val/loss", loss, on_epoch=True, prog_bar=True, sync_dist=True, batch_size=size)

    def on_validation_epoch_end(self) -> None:
        loss = self.trainer.callback_metrics.get("test/loss" if self.trainer.testing else "val/loss")
        if loss is not None:
            self.log("val/perplexity", loss.exp(), sync_dist=True)  # the same on all ranks

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW with decay on the weights of linear layers; not on biases, norms and embeddings."""
        decay = [m.weight for m in self.transformer.modules() if isinstance(m, nn.Linear)]
        chosen = {id(p) for p in decay}
        rest = [p for p in self.transformer.parameters() if id(p) not in chosen]
        groups = [{"params": decay, "weight_decay": self.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=self.base_learning_rate(), betas=(0.9, 0.95))

    # ---- sampling

    def top_k_logits(self, logits: Tensor, k: int) -> Tensor:
        """Logits (..., V) with all but the k highest at -inf: the 2021 call."""
        return filter_logits(logits, top_k=k)

    @torch.no_grad()
    def sample(
        self, x: Tensor, c: Tensor, steps: int, temperature: float = 1.0, sample: bool = False,
        top_k: int | None = None, callback: Callable[[int], None] | None = None, *,
        top_p: float | None = None, generator=None,
    ) -> Tensor:
        """Continue codes x (B, n) under condition tokens c (B, M) by `steps`: (B, n + steps).

        Takes the most likely code each time unless `sample`; see `taming.sampling.sample_tokens`.
        """
        drawn = sample_tokens(
            self.transformer, torch.cat((c, x), dim=1), steps, temperature=temperature, top_k=top_k,
            top_p=top_p, greedy=not sample, generator=generator, codebook_size=self.n_codes,
            callback=None if callback is None else lambda step, codes: callback(step),
        )
        return torch.cat((x, drawn), dim=1)

    @property
    def n_codes(self) -> int | None:
        """Tokens that the first stage can decode; the transformer's vocabulary may hold more."""
        return getattr(self.first_stage_model, "n_tokens", None)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Latent grid (h, w) of an image of that size in pixels; of the training size when left out."""
        stage = self.first_stage_model
        height, width = height or stage.resolution, width or stage.resolution
        stage.check_size(height, width)
        return height // stage.factor, width // stage.factor

    @torch.no_grad()
    def generate(
        self, c_indices: Tensor | Sequence[Tensor], *, size: Size | None = None, stride: int = 1,
        known: Tensor | None = None, mask: Tensor | None = None, wavefront: bool = False,
        temperature: Setting = 1.0, top_k: Number | None = None, top_p: Number | None = None,
        min_p: Number | None = None, guidance: Setting = 1.0, generator=None,
        callback: Callable[[int, Tensor], object] | None = None,
    ) -> Tensor:
        """Draw whole images (B, C, H, W) in [-1, 1] given what `encode_conditions` gave, or tokens (B, M).

        `size` is (H, W) in pixels, the training size when None. Larger pictures are drawn through a window of
        the training size that moves every `stride` codes, and so are pictures of which codes `known`
        (B, h, w), in raster order, stay where `mask` (B, h, w) or (h, w) is True; see
        `taming.sampling.sample_window`. The settings are those of `taming.sampling.sample_tokens`. Guidance
        other than 1 needs a model with a `null_token`.

        Raises:
            ValueError: a size that is no multiple of f, or below the training size; a permuter other than
                raster order, where the window has to move; guidance without a null token.
            taming.sampling.Cancelled: the callback returned False.
        """
        codes = self.draw_codes(
            c_indices, size=size, stride=stride, known=known, mask=mask, wavefront=wavefront,
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, guidance=guidance,
            generator=generator, callback=callback,
        )
        return self.first_stage_model.decode_code(codes).clamp(-1.0, 1.0)

    @torch.no_grad()
    def draw_codes(
        self, c_indices: Tensor | Sequence[Tensor], *, size: Size | None = None, stride: int = 1,
        known: Tensor | None = None, mask: Tensor | None = None, wavefront: bool = False, **settings,
    ) -> Tensor:
        """The codes (B, h, w), in raster order, of the images that `generate` would draw."""
        parts = [c_indices] if torch.is_tensor(c_indices) else list(c_indices)
        window = self.latent_shape()
        shape = self.latent_shape(*size) if size else window
        null = None if self.null_token is None else self._without_conditions(parts)
        settings["n_codes"] = self.n_codes
        if shape == window and known is None and not wavefront:
            prefix, null = (
                None if each is None else torch.cat([part.flatten(1) for part in each], dim=1)
                for each in (parts, null)
            )
            steps = shape[0] * shape[1]
            codes = sample_tokens(self.transformer, prefix, steps, null_prefix=null, **settings)
            return self.permuter(codes, reverse=True).view(-1, *shape)
        if not isinstance(self.permuter, Identity):
            raise ValueError(
                f"the codes are in the order of {type(self.permuter).__name__}: a window can only slide over "
                f"raster order; draw the training size, {window[0]}x{window[1]} codes"
            )
        return sample_window(
            self.transformer, parts, shape=shape, window=window, stride=stride, known=known, mask=mask,
            wavefront=wavefront, null_condition=null, condition_windows=self.condition_windows(parts),
            **settings,
        )

    def _without_conditions(self, parts: list[Tensor]) -> list[Tensor]:
        """What guidance leads away from: null tokens, but conditions that were never dropped stay."""
        rates = self.cond_dropout if is_list(self.cond_dropout) else [1.0] * len(parts)
        if len(rates) != len(parts):  # tokens of all conditions in one
            rates = [1.0] * len(parts)
        return [
            torch.full_like(part, self.null_token) if rate > 0 else part
            for part, rate in zip(parts, rates, strict=True)
        ]

    def condition_windows(self, parts: list[Tensor]) -> list[Size | None]:
        """The training size in the grid of each condition; None for tokens."""
        if len(parts) != len(self.cond_stages):
            return [None] * len(parts)  # tokens of all conditions in one
        factors = [getattr(stage, "factor", None) for stage in self.cond_stages]
        return [
            None if part.ndim == 2 or factor is None else (size[0] // factor, size[1] // factor)
            for part, factor, size in zip(parts, factors, self.cond_sizes, strict=True)
        ]

    @torch.no_grad()
    def log_images(
        self, batch: dict, max_images: int = 8, top_k: int | None = 100, **kwargs
    ) -> dict[str, Tensor]:
        """The pictures worth looking at: inputs, reconstructions, samples from half the codes or none."""
        x, c = self.get_xc(batch, max_images)
        x, c = x.to(self.device), c.to(self.device) if torch.is_tensor(c) else [v.to(self.device) for v in c]
        quant, z = self.encode_to_z(x)
        _, condition = self.encode_to_c(c)
        half = z.shape[1] // 2
        top_k = None if top_k is None else min(top_k, self.n_codes or self.transformer.config.vocab_size)
        pictures = {"inputs": x, "reconstructions": self.decode_to_img(z, quant.shape)}
        for key, drawn in self.draw_conditions(c, x).items():
            pictures["conditioning" if len(self.cond_keys) == 1 else f"conditioning_{key}"] = drawn
        for name, given in (("samples_half", z[:, :half]), ("samples", z[:, :0])):
            drawn = self.sample(given, condition, z.shape[1] - given.shape[1], sample=True, top_k=top_k)
            pictures[name] = self.decode_to_img(drawn, quant.shape)
        return pictures

    def draw_conditions(self, c: Condition, x: Tensor, datasets: Iterable | None = None) -> dict[str, Tensor]:
        """Conditions as pictures (B, 1 or 3, H, W) by their keys, see `condition_pictures.draw_conditions`.

        `datasets` are those of the run by default.
        """
        if datasets is None:
            datasets = getattr(getattr(self._trainer, "datamodule", None), "datasets", {}).values()
        return draw_conditions(self, c, x, datasets)
