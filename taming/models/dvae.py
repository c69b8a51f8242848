"""The discrete VAE of DALL-E (Ramesh et al. 2021, "Zero-shot text-to-image generation", section 2.1).

B batch, C channels, H W pixels, h w latent grid (H/f, W/f), K = n_embed codes. Images are in [-1, 1].
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from torch import Tensor

from taming.checkpoint import find_checkpoint, load_weights, read_checkpoint
from taming.checkpoint.families import dalle
from taming.config import instantiate_from_config
from taming.metrics import CodebookUsage, psnr, ssim
from taming.models.autoencoder import Autoencoder, Betas
from taming.models.tokenizer import Tokenizer
from taming.modules.conditioners.base import Size
from taming.modules.conditioners.image import ImageConditioner
from taming.modules.dvae.logit_laplace import logit_laplace_nll, map_pixels, mean_pixels
from taming.modules.dvae.networks import Decoder, Encoder, Sizes
from taming.modules.dvae.relaxation import GumbelSoftmax
from taming.modules.quantizers.base import QuantizerInfo
from taming.parameters import NonNegativeFloat, ParametersOf, Range

DDConfig = Annotated[dict, ParametersOf(Sizes)]


class DVAE(Tokenizer, ImageConditioner, Autoencoder):
    """DALL-E's discrete VAE: logits of codes, a soft relaxation, a logit-Laplace likelihood.

        L = -ln p(x | y) + beta * KL(q(z | x) || uniform)

    In training the decoder sees y, a soft sample of each code (`GumbelSoftmax`); an image's codes are the
    most likely ones. Schedules count batches.

    Args:
        ddconfig: see `taming.modules.dvae.networks.Sizes`.
        n_embed: number of codes K, at least 2.
        temperature_scheduler_config: `{target, params}` of a callable from batches seen to the temperature;
            None: 1.
        kl_weight: beta.
        kl_norm: what the divergence of an image is divided by, as its -ln p is by the number of its values
            C*H*W: "per_pixel" by that as well, as in the paper; "per_token" by the number of its codes.
        kl_scheduler_config: of a callable from batches seen to a factor on `kl_weight`; constant when None.
        ckpt_path, ignore_keys, image_key, monitor, scheduler_config: see `VQModel`.
        betas, weight_decay: AdamW's.

    Raises:
        ValueError: sizes that do not divide; in training, a temperature that is not above 0.
    """

    loss = None  # no networks of its own

    def __init__(
        self, ddconfig: DDConfig, n_embed: Annotated[int, Range(2)] = 8192,
        temperature_scheduler_config: dict | None = None, ckpt_path: str | None = None,
        ignore_keys: tuple[str, ...] = (), image_key: str = "image", monitor: str | None = None, *,
        kl_weight: NonNegativeFloat = 6.6, kl_norm: Literal["per_pixel", "per_token"] = "per_pixel",
        kl_scheduler_config: dict | None = None, betas: Betas = (0.9, 0.999),
        weight_decay: NonNegativeFloat = 1e-4, scheduler_config: dict | None = None,
    ):
        super().__init__(image_key, betas, monitor, scheduler_config)
        sizes = Sizes(**ddconfig)
        self.resolution, self.factor, self.channels = sizes.resolution, sizes.factor, sizes.in_channels
        self.encoder, self.decoder = Encoder(sizes, n_embed), Decoder(sizes, n_embed)
        self.quantize = GumbelSoftmax(n_embed)
        self.val_codes = CodebookUsage(n_embed)
        self.kl_weight, self.kl_norm, self.weight_decay = kl_weight, kl_norm, weight_decay
        temperature, kl = temperature_scheduler_config, kl_scheduler_config
        self.temperature_scheduler = instantiate_from_config(temperature) if temperature else None
        self.kl_scheduler = instantiate_from_config(kl) if kl else None
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    @classmethod
    def from_dall_e(cls, encoder: str | Path, decoder: str | Path) -> Self:
        """Build the model of DALL-E's two files, or of state dicts with their names, in eval mode.

        The files hold pickled networks. Their tensors are read; nothing in them is run. To use the model as a
        first stage, save it: `DVAE.from_dall_e("encoder.pkl", "decoder.pkl").save_pretrained("dall_e")`.

        Raises:
            FileNotFoundError: a file is not there.
            ValueError: a file holds other weights, or asks for code.
        """
        states = {}
        for name, file in (("encoder", encoder), ("decoder", decoder)):
            states[name] = read_checkpoint(find_checkpoint(file))["state_dict"]
            if not {"blocks.input.w", "blocks.output.conv.w"} <= set(states[name]):
                raise ValueError(f"{file} is not the {name} of DALL-E: it has no blocks.input.w")
        whole = {f"{half}.{key}": value for half, state in states.items() for key, value in state.items()}
        model = cls(**dalle.sizes(whole))
        load_weights(model.encoder, states["encoder"], source=encoder)
        load_weights(model.decoder, states["decoder"], source=decoder)
        return model.eval()

    # ---- images <-> codes

    def encode_to_prequant(self, x: Tensor) -> Tensor:
        """Encode images (B, C, H, W) to logits of the codes, (B, K, h, w)."""
        self.check_channels(x)
        with self.own_precision(x):
            return self.encoder(map_pixels(to_unit(x)))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, QuantizerInfo]:
        """Encode images (B, C, H, W) to (weights of the codes (B, K, h, w), nats per code, info)."""
        return self.quantize(self.encode_to_prequant(x))

    def decode(self, weights: Tensor) -> Tensor:
        """Decode weights of the codes (B, K, h, w) to images (B, C, H, W)."""
        return from_unit(mean_pixels(self.decoder(weights)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruct images (B, C, H, W): (reconstructions, divergence in nats per code)."""
        weights, divergence, _ = self.encode(x)
        return self.decode(weights), divergence

    @property
    def codebook_size(self) -> int:
        """Number of different codes."""
        return self.quantize.codebook_size

    @property
    def vocab_size(self) -> int:
        """Number of different tokens, as a condition stage."""
        return self.codebook_size

    @torch.no_grad()
    def encode_codes(self, x: Tensor) -> Tensor:
        """Encode images (B, C, H, W) to their most likely codes (B, h, w), int64."""
        self.check_size(*x.shape[2:])
        return self.encode_to_prequant(x).argmax(1)

    def codes_to_latents(self, codes: Tensor) -> Tensor:
        """Look up codes (B, h, w): (B, n_init, h, w)."""
        return self.decoder.codes_to_latents(codes)

    @torch.no_grad()
    def decode_codes(self, codes: Tensor) -> Tensor:
        """Decode codes (B, h, w) to images (B, C, H, W)."""
        return from_unit(mean_pixels(self.decoder.decode_latents(self.codes_to_latents(codes))))

    def from_tokens(self, tokens: Tensor) -> Tensor:
        """Decode tokens (B, h, w) of a condition to images (B, C, H, W)."""
        return self.decode_codes(tokens)

    def to_rgb(
        self, x: Tensor, size: Size | None = None, *, names: Sequence[str] = (),
        plot: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """Show images as they are, and maps of more channels than three in fixed colours."""
        return Autoencoder.to_rgb(self, x)

    # ---- training

    def set_schedules(self) -> float:
        """Set the temperature for the batches seen so far; return the weight of the divergence."""
        schedule, factor = self.temperature_scheduler, self.kl_scheduler
        temperature = float(schedule(self.batches_seen)) if schedule else 1.0
        if not temperature > 0:
            raise ValueError(
                f"temperature_scheduler_config gives {temperature:g} at batch {self.batches_seen}: the "
                "temperature must stay above 0; DALL-E's ends at 1/16"
            )
        self.quantize.temperature = temperature
        return self.kl_weight * (float(factor(self.batches_seen)) if factor else 1.0)

    def losses(self, x: Tensor, kl_weight: float) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
        """Return loss (), its terms, reconstructions (B, C, H, W) and codes (B, h, w) of images (B, C, H, W).

        The terms are means over images: -ln p per value of a pixel, and the divergence per code, in nats.
        """
        pixels = map_pixels(to_unit(x))  #                       (B, C, H, W) in [0.1, 0.9]
        logits = self.encoder(pixels)  #                         (B, K, h, w)
        weights, divergence, info = self.quantize(logits)  #     (B, K, h, w), ()
        stats = self.decoder(weights)  #                         (B, 2 C, H, W)
        nll = logit_laplace_nll(stats, pixels).mean()
        codes, values = info.indices[0].numel(), pixels[0].numel()
        scale = codes / values if self.kl_norm == "per_pixel" else 1.0
        loss = nll + kl_weight * scale * divergence
        terms = {"rec_loss": nll.detach(), "kl": divergence.detach(), "total_loss": loss.detach()}
        return loss, terms, from_unit(mean_pixels(stats)), info.indices

    def training_step(self, batch: dict, batch_idx: int) -> None:
        """Take one step of encoder and decoder."""
        kl_weight = self.set_schedules()
        x = self.get_images(batch)
        loss, terms, _, _ = self.losses(x, kl_weight)
        log: dict[str, Any] = {f"train/{name}": value for name, value in terms.items()}
        self.check_finite(log, batch_idx)
        self.manual_backward(loss / self.accumulate_grad_batches)
        if self.gradients_complete():
            optimizer: Any = self.optimizers()
            log["train/lr"] = self.set_learning_rate(optimizer)
            log["train/grad_norm"] = self.clip_grad_norm(self.generator_parameters())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self.batches_seen += 1
        log |= {"train/temperature": self.quantize.temperature, "train/kl_weight": kl_weight}
        self.log_dict(log, batch_size=len(x))
        self.log("rec", log["train/rec_loss"], prog_bar=True, logger=False, batch_size=len(x))

    @property
    def validation_metrics(self) -> tuple[str, ...]:
        """Names that validation logs, without "val/"."""
        used = ("codebook_usage_percent", "codebook_perplexity")
        return "rec_loss", "kl", "total_loss", "psnr", "ssim", *used

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Log losses of the most likely codes, PSNR and SSIM, averaged over the set, and count the codes."""
        x = self.get_images(batch)
        _, terms, rec, codes = self.losses(x, self.set_schedules())
        log = {f"val/{name}": value for name, value in terms.items()}
        log |= {"val/psnr": psnr(x, rec).mean(), "val/ssim": ssim(x, rec).mean()}
        self.val_codes.update(codes)
        self.log_dict(log, batch_size=len(x), sync_dist=True, on_epoch=True)

    def on_validation_epoch_start(self) -> None:
        self.val_codes.reset()

    def on_validation_epoch_end(self) -> None:
        used = self.val_codes.compute()
        self.log_dict({
            "val/codebook_usage_percent": 100.0 * used["usage"],
            "val/codebook_perplexity": used["perplexity"],
        }, sync_dist=True)  # the same on all ranks

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make AdamW."""
        return torch.optim.AdamW(
            self.generator_parameters(), lr=self.base_learning_rate(), betas=self.betas,
            weight_decay=self.weight_decay, fused=self.has_fused_step,
        )


def to_unit(x: Tensor) -> Tensor:
    """Map images from [-1, 1] to [0, 1]."""
    return (x + 1) / 2


def from_unit(p: Tensor) -> Tensor:
    """Map images from [0, 1] to [-1, 1]."""
    return 2 * p - 1
