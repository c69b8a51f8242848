"""Stage 2: a transformer over the codes of a frozen VQGAN, given a condition (Esser et al. 2021, sec. 3.2).

B batch, C channels, H W pixels, h w latent grid, N = h*w codes, M condition tokens, V vocabulary.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming.config import instantiate_from_config
from taming.models.base import ImageModel
from taming.modules.transformer.permuter import Identity
from taming.modules.util import SOSProvider
from taming.sampling import filter_logits, sample_tokens, sample_window
from taming.sampling.filters import Number
from taming.sampling.settings import Setting

logger = logging.getLogger(__name__)

UNCONDITIONAL, FIRST_STAGE = "__is_unconditional__", "__is_first_stage__"


class Net2NetTransformer(ImageModel):
    """p(s | c): the codes s of an image, one after the other, after the condition's tokens c (eq. 9 and 10).

    Args:
        transformer_config: `{target, params}` of the network, `GPT`.
        first_stage_config: of the VQGAN whose codes are modelled; its `ckpt_path` says where its weights are.
        cond_stage_config: of what turns the condition into tokens; "__is_unconditional__" for a start token
            alone, "__is_first_stage__" for the first stage itself.
        permuter_config: of the order of the codes; raster when None.
        ckpt_path: checkpoint of this whole model to start from, but for keys that begin with `ignore_keys`.
        first_stage_key, cond_stage_key: entries of the batch.
        downsample_cond_size: side in pixels to which the condition is shrunk before it is encoded, or -1.
        pkeep: probability that an input code is kept in training; the others are replaced by random ones.
        sos_token: the start token of an unconditional model.
        unconditional: the same as "__is_unconditional__".
        monitor: metric by which checkpoints are ranked.
        weight_decay: AdamW's, on the weights of linear layers only.
        scheduler_config: of a callable from batches seen to a factor on the learning rate (warm-up, cosine).
        cond_dropout: probability that `null_token` replaces all condition tokens of an item in training; 0.1
            is usual. Guidance (Ho and Salimans 2022) needs it.
        null_token: the token that stands for no condition, which no condition uses: one more than there are
            classes or codes, for instance; `vocab_size` must count it.

    Raises:
        ValueError: a vocabulary smaller than the codebook or the condition, or without the null token; a
            block size below M + N - 1.
        FileNotFoundError: no checkpoint of the first stage where `ckpt_path` says.
    """

    def __init__(
        self, transformer_config: dict, first_stage_config: dict, cond_stage_config: dict | str,
        permuter_config: dict | None = None, ckpt_path: str | None = None, ignore_keys: tuple[str, ...] = (),
        first_stage_key: str = "image", cond_stage_key: str = "depth", downsample_cond_size: int = -1,
        pkeep: float = 1.0, sos_token: int = 0, unconditional: bool = False, *, monitor: str | None = None,
        weight_decay: float = 0.01, scheduler_config: dict | None = None, cond_dropout: float = 0.0,
        null_token: int | None = None,
    ):
        super().__init__(monitor, scheduler_config)
        self.be_unconditional = unconditional or cond_stage_config == UNCONDITIONAL
        self.cond_dropout, self.null_token = cond_dropout, null_token
        self.sos_token, self.pkeep, self.weight_decay = sos_token, pkeep, weight_decay
        self.first_stage_key = first_stage_key
        self.cond_stage_key = first_stage_key if self.be_unconditional else cond_stage_key
        self.downsample_cond_size = downsample_cond_size
        self.first_stage_model = _frozen(_build_stage(first_stage_config, "first_stage_config"))
        if self.be_unconditional:
            self.cond_stage_model = SOSProvider(sos_token)
        elif cond_stage_config == FIRST_STAGE:
            self.cond_stage_model = self.first_stage_model
        else:
            self.cond_stage_model = _frozen(_build_stage(cond_stage_config, "cond_stage_config"))
        self.permuter = instantiate_from_config(permuter_config) if permuter_config else Identity()
        self.transformer = instantiate_from_config(transformer_config)
        self._check_sizes()
        self._check_null_token()
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def _check_sizes(self) -> None:
        """Both numbers and the fix, where vocabulary or block size cannot hold what the stages give."""
        vocabulary, block = self.transformer.config.vocab_size, self.transformer.config.block_size
        for stage, what in ((self.first_stage_model, "first stage"), (self.cond_stage_model, "condition")):
            tokens = getattr(stage, "n_tokens", None)
            if tokens is not None and tokens > vocabulary:
                raise ValueError(
                    f"vocab_size: {vocabulary} of the transformer is smaller than the {what}'s {tokens} "
                    f"tokens: set transformer_config.params.vocab_size to at least {tokens}"
                )
        resolution = getattr(self.first_stage_model, "resolution", None)
        if resolution is None or not hasattr(self.cond_stage_model, "token_count"):
            return
        grid = self.first_stage_model.token_count(resolution, resolution)
        seen = self.downsample_cond_size if self.downsample_cond_size > -1 else resolution
        condition = self.cond_stage_model.token_count(seen, seen)
        if block < condition + grid - 1:
            raise ValueError(
                f"block_size: {block} of the transformer is too short for {condition} condition tokens and "
                f"{grid} image codes at {resolution} pixels: set transformer_config.params.block_size to at "
                f"least {condition + grid - 1} (condition + codes - 1)"
            )

    def _check_null_token(self) -> None:
        """Errors of what was asked for, a warning where a condition could hold the null token."""
        if not 0.0 <= self.cond_dropout <= 1.0:
            raise ValueError(f"cond_dropout: {self.cond_dropout} is no probability, 0 to 1")
        if self.cond_dropout > 0 and self.be_unconditional:
            raise ValueError(f"cond_dropout: {self.cond_dropout}, but the model has no condition to drop")
        token, vocabulary = self.null_token, self.transformer.config.vocab_size
        if token is None:
            if self.cond_dropout > 0:
                raise ValueError(f"cond_dropout: {self.cond_dropout} needs null_token, a token not in use")
            return
        if not 0 <= token < vocabulary:
            raise ValueError(
                f"null_token: {token} is outside the transformer's vocab_size: {vocabulary}: set "
                f"transformer_config.params.vocab_size to at least {token + 1}, or take another token"
            )
        used = getattr(self.cond_stage_model, "n_tokens", None)
        if used is not None and token < used:
            logger.warning("null_token: %d is one of the condition's %d tokens as well", token, used)

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
    def encode_to_c(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """The condition, as the batch has it, to (quant, tokens (B, M))."""
        if self.downsample_cond_size > -1:
            c = F.interpolate(c, size=(self.downsample_cond_size, self.downsample_cond_size))
        with torch.autocast(c.device.type, enabled=False):
            quant, _, info = self.cond_stage_model.encode(c)
        return quant, info[2].view(c.shape[0], -1)

    @torch.no_grad()
    def decode_to_img(self, index: Tensor, zshape: tuple[int, int, int, int]) -> Tensor:
        """Codes (B, N) in the permuter's order to images (B, C, H, W); zshape is (B, embed_dim, h, w)."""
        index = self.permuter(index, reverse=True)
        return self.first_stage_model.decode_code(index.reshape(-1, *zshape[2:]))

    # ---- training

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Images and conditions to (logits (B, N, V), the codes (B, N) they should predict)."""
        _, target = self.encode_to_z(x)
        _, condition = self.encode_to_c(c)
        if self.training and self.cond_dropout > 0:
            dropped = torch.rand(len(condition), 1, device=condition.device) < self.cond_dropout
            condition = condition.masked_fill(dropped, self.null_token)
        codes = target
        if self.training and self.pkeep < 1.0:
            keep = torch.rand(codes.shape, device=codes.device) < self.pkeep
            codes = torch.where(keep, codes, torch.randint_like(codes, self.transformer.config.vocab_size))
        tokens = torch.cat((condition, codes), dim=1)  # (B, M + N)
        logits, _ = self.transformer(tokens[:, :-1])
        return logits[:, condition.shape[1] - 1:], target  # the last condition token predicts the first code

    def shared_step(self, batch: dict) -> Tensor:
        """Mean negative log-likelihood per code, in nats."""
        x, c = self.get_xc(batch)
        logits, target = self(x, c)
        return F.cross_entropy(logits.flatten(0, 1).float(), target.flatten())

    def get_xc(self, batch: dict, N: int | None = None) -> tuple[Tensor, Tensor]:
        """Images and conditions of the first N items of a batch, as the stages take them."""
        x, c = self.get_input(batch, self.first_stage_key)[:N], self.get_input(batch, self.cond_stage_key)[:N]
        return x, self.cond_stage_model.one_hot(c) if c.ndim == 3 else c  # label ids

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
            top_p=top_p, greedy=not sample, generator=generator, n_codes=self.n_codes,
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
        self, c_indices: Tensor, *, size: tuple[int, int] | None = None, stride: int = 1,
        temperature: Setting = 1.0, top_k: Number | None = None, top_p: Number | None = None,
        min_p: Number | None = None, guidance: Setting = 1.0, generator=None,
        callback: Callable[[int, Tensor], object] | None = None,
    ) -> Tensor:
        """Draw whole images (B, C, H, W) in [-1, 1] given condition tokens (B, M), or codes (B, h, w).

        `size` is (H, W) in pixels, the training size when None. Larger pictures are drawn through a window of
        the training size that moves every `stride` codes, see `taming.sampling.sample_window`; the settings
        are those of `taming.sampling.sample_tokens`. Guidance other than 1 needs a model with a `null_token`.

        Raises:
            ValueError: a size that is no multiple of f, or below the training size; a permuter other than
                raster order, where the window has to move; guidance without a null token.
            taming.sampling.Cancelled: the callback returned False.
        """
        window = self.latent_shape()
        h, w = self.latent_shape(*size) if size else window
        null = None if self.null_token is None else torch.full_like(c_indices, self.null_token)
        settings = dict(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, guidance=guidance,
            generator=generator, callback=callback, n_codes=self.n_codes,
        )
        if (h, w) == window:
            null = None if null is None else null.flatten(1)
            codes = sample_tokens(
                self.transformer, c_indices.flatten(1), h * w, null_prefix=null, **settings
            )
        elif isinstance(self.permuter, Identity):
            codes = sample_window(
                self.transformer, c_indices, shape=(h, w), window=window, stride=stride, null_condition=null,
                **settings,
            ).flatten(1)
        else:
            raise ValueError(
                f"the codes are in the order of {type(self.permuter).__name__}: a window can only slide over "
                f"raster order; draw the training size, {window[0]}x{window[1]} codes"
            )
        return self.decode_to_img(codes, (len(codes), -1, h, w)).clamp(-1.0, 1.0)

    @torch.no_grad()
    def log_images(
        self, batch: dict, max_images: int = 8, top_k: int | None = 100, **kwargs
    ) -> dict[str, Tensor]:
        """The pictures worth looking at: inputs, reconstructions, samples from half the codes or none."""
        x, c = self.get_xc(batch, max_images)
        x, c = x.to(self.device), c.to(self.device)
        quant, z = self.encode_to_z(x)
        _, condition = self.encode_to_c(c)
        half = z.shape[1] // 2
        top_k = None if top_k is None else min(top_k, self.n_codes or self.transformer.config.vocab_size)
        pictures = {"inputs": x, "reconstructions": self.decode_to_img(z, quant.shape)}
        if c.ndim == 4 and self.cond_stage_key != self.first_stage_key:
            if c.shape[1] not in (1, 3):
                c = self.cond_stage_model.to_rgb(c)
            pictures["conditioning"] = c
        elif (layouts := self._draw_layouts(c, x)) is not None:
            pictures["conditioning"] = layouts
        for name, given in (("samples_half", z[:, :half]), ("samples", z[:, :0])):
            drawn = self.sample(given, condition, z.shape[1] - given.shape[1], sample=True, top_k=top_k)
            pictures[name] = self.decode_to_img(drawn, quant.shape)
        return pictures

    def _draw_layouts(self, c: Tensor, x: Tensor) -> Tensor | None:
        """Tokens (B, M) of object layouts as pictures as large as x, by the data set that made them."""
        module = getattr(self._trainer, "datamodule", None)
        for dataset in getattr(module, "datasets", {}).values():
            dataset = getattr(dataset, "data", dataset)  # of a WrappedDataset
            if self.cond_stage_key in getattr(dataset, "conditional_builders", {}):
                height, width = x.shape[-2:]
                return dataset.plot_conditionals(self.cond_stage_key, c, (width, height)).to(x)
        return None


def _frozen(stage: nn.Module) -> nn.Module:
    return stage.eval().requires_grad_(False)


def _build_stage(config: dict, name: str) -> nn.Module:
    """A first or condition stage; its checkpoint, where it names one, must be there."""
    path = (config.get("params") or {}).get("ckpt_path")
    if path is not None and not Path(path).exists():
        raise FileNotFoundError(
            f"{name}.params.ckpt_path: {path} does not exist. Train that stage first (for instance "
            "python main.py --base configs/custom_vqgan.yaml -t), or name its checkpoint or run directory"
        )
    return instantiate_from_config(config)
