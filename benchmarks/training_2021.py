"""The training steps of 2021, over the modules of today's models: what `training.py` compares with.

Written from the equations and from what the method did, not for speed: images in contiguous (B, C, H, W)
memory, attention as products with the scores in memory, a forward pass of the whole autoencoder for each of
the two optimizers, LPIPS and the adaptive weight in every generator step whether or not they have an effect,
optimizers that go through the parameters one by one, images encoded anew in every step of stage 2.

B batch, C channels, H W pixels, h w latent grid, N = h*w codes, K codebook size, V vocabulary.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, AdamW

from benchmarks.sampler_2021 import forward_2021


def swish(x: Tensor) -> Tensor:
    """Return x * sigmoid(x), as two operations."""
    return x * torch.sigmoid(x)


def residual(block: Any, x: Tensor) -> Tensor:
    """Run a residual block, (B, C, h, w) to (B, C', h, w)."""
    h = block.conv1(swish(block.norm1(x)))
    h = block.conv2(block.dropout(swish(block.norm2(h))))
    return (x if block.in_channels == block.out_channels else block.nin_shortcut(x)) + h


def attention(block: Any, x: Tensor) -> Tensor:
    """Run self-attention over all positions of (B, C, h, w), with the scores (B, h*w, h*w) in memory."""
    y = block.norm(x)
    q, k, v = (part(y).flatten(2) for part in (block.q, block.k, block.v))  # (B, C, h*w)
    weights = torch.softmax(torch.bmm(q.permute(0, 2, 1), k) * x.shape[1] ** -0.5, dim=2)
    y = torch.bmm(v, weights.permute(0, 2, 1)).reshape(x.shape)
    return x + block.proj_out(y)


def middle(part: Any, h: Tensor) -> Tensor:
    """Run the blocks at the lowest resolution."""
    return residual(part.block_2, attention(part.attn_1, residual(part.block_1, h)))


def level(part: Any, h: Tensor) -> Tensor:
    """Run the blocks of one resolution."""
    for i, block in enumerate(part.block):
        h = residual(block, h)
        h = attention(part.attn[i], h) if len(part.attn) else h
    return h


def encode(model: Any, x: Tensor) -> Tensor:
    """Encode images (B, C, H, W) to latents (B, embed_dim, h, w) before the quantizer."""
    encoder = model.encoder
    h = encoder.conv_in(x)
    for part in encoder.down:
        h = level(part, h)
        if part.downsample is not None:
            h = part.downsample.conv(F.pad(h, (0, 1, 0, 1)))
    return model.quant_conv(encoder.conv_out(swish(encoder.norm_out(middle(encoder.mid, h)))))


def decode(model: Any, z: Tensor) -> Tensor:
    """Decode quantized latents (B, embed_dim, h, w) to images (B, C, H, W)."""
    decoder = model.decoder
    h = middle(decoder.mid, decoder.conv_in(model.post_quant_conv(z)))
    for part in reversed(decoder.up):
        h = level(part, h)
        if part.upsample is not None:
            h = part.upsample.conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))
    return decoder.conv_out(swish(decoder.norm_out(h)))


def nearest(z: Tensor, codes: Tensor) -> Tensor:
    """Return the index (N,) of the nearest code (K, C) of each vector (N, C), all distances in memory."""
    squares = z.square().sum(1, keepdim=True) + codes.square().sum(1)
    return torch.argmin(squares - 2 * torch.einsum("nc,kc->nk", z, codes), dim=1)


def quantize(model: Any, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return quantized latents (B, C, h, w), the codebook's loss and the indices (N,)."""
    quantizer, z = model.quantize, z.permute(0, 2, 3, 1).contiguous()  # (B, h, w, C)
    indices = nearest(z.view(-1, z.shape[-1]), quantizer.embedding.weight)
    z_q = quantizer.embedding(indices).view(z.shape)
    loss = (z_q.detach() - z).square().mean() + quantizer.beta * (z_q - z.detach()).square().mean()
    return (z + (z_q - z).detach()).permute(0, 3, 1, 2).contiguous(), loss, indices


class Stage1Step:
    """Steps of both networks of a VQGAN, one after the other, as two optimizers in one Lightning 1 step.

    Args:
        model: the `VQModel`, with a loss of VQLPIPSWithDiscriminator.
        rate: learning rate.
    """

    def __init__(self, model: Any, rate: float):
        self.model, self.loss = model, model.loss
        self.networks = [[*model.generator_parameters()], [*model.loss.discriminator.parameters()]]
        self.optimizers = [
            Adam(parameters, lr=rate, betas=(0.5, 0.9), foreach=False) for parameters in self.networks
        ]

    def __call__(self, images: Tensor, factor: float) -> dict[str, Tensor]:
        """Take a step with images (B, H, W, C); `factor` is 1 once the discriminator has begun, else 0."""
        x = images.permute(0, 3, 1, 2).to(memory_format=torch.contiguous_format).float()
        log: dict[str, Tensor] = {}
        for number, optimizer in enumerate(self.optimizers):
            for other, parameters in enumerate(self.networks):
                for parameter in parameters:
                    parameter.requires_grad_(other == number)
            z_q, codebook_loss, _ = quantize(self.model, encode(self.model, x))
            rec = decode(self.model, z_q)
            pixels = (x - rec).abs() + self.loss.perceptual_weight * self.distance(x, rec)  # (B, C, H, W)
            if number == 0:
                log["rec_loss"] = pixels.detach().mean()
                loss = self.generator(pixels.mean(), codebook_loss, rec, factor)
            else:
                loss = log["disc_loss"] = self.discriminator(x, rec, factor)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        for parameters in self.networks:
            for parameter in parameters:
                parameter.requires_grad_(True)
        return log

    def distance(self, x: Tensor, rec: Tensor) -> Tensor:
        """Return LPIPS of both batches, (B, 1, 1, 1)."""
        return self.loss.perceptual_loss.network()(x, rec)

    def generator(self, nll: Tensor, codebook_loss: Tensor, rec: Tensor, factor: float) -> Tensor:
        """Return the generator's loss: eq. 4, 6 and 7 of Esser et al. 2021."""
        g_loss = -self.loss.discriminator(rec.contiguous()).mean()
        last = self.model.decoder.conv_out.weight
        nll_grad = torch.autograd.grad(nll, last, retain_graph=True)[0]
        g_grad = torch.autograd.grad(g_loss, last, retain_graph=True)[0]
        weight = (nll_grad.norm() / (g_grad.norm() + 1e-4)).clamp(0.0, 1e4).detach()
        weight = weight * self.loss.discriminator_weight
        return nll + weight * factor * g_loss + self.loss.codebook_weight * codebook_loss

    def discriminator(self, x: Tensor, rec: Tensor, factor: float) -> Tensor:
        """Return the discriminator's hinge loss."""
        real = self.loss.discriminator(x.contiguous().detach())
        fake = self.loss.discriminator(rec.contiguous().detach())
        return factor * 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


class Stage2Step:
    """Steps of a GPT over the codes of images, which are encoded in every step.

    Args:
        model: an unconditional `Net2NetTransformer` over a `VQModel`.
        rate: learning rate.
    """

    def __init__(self, model: Any, rate: float):
        self.model, gpt = model, model.transformer
        decay = [module.weight for module in gpt.modules() if isinstance(module, nn.Linear)]
        rest = without(gpt.parameters(), decay)
        groups = [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = AdamW(groups, lr=rate, betas=(0.9, 0.95), foreach=False)

    def __call__(self, images: Tensor) -> Tensor:
        """Take a step with images (B, H, W, C); return the loss, nats per code."""
        x = images.permute(0, 3, 1, 2).to(memory_format=torch.contiguous_format).float()
        with torch.no_grad():
            codes = quantize(self.model.first_stage_model, encode(self.model.first_stage_model, x))[2]
        codes = codes.view(len(x), -1)  # (B, N)
        kept = torch.bernoulli(torch.full(codes.shape, self.model.pkeep, device=codes.device)).long()
        inputs = kept * codes + (1 - kept) * torch.randint_like(codes, self.model.transformer.vocab_size)
        start = torch.full_like(codes[:, :1], self.model.sos_token)
        tokens = torch.cat((start, inputs), dim=1)[:, :-1]
        logits = forward_2021(self.model.transformer, tokens, None, 0)[0]  # (B, N, V)
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), codes.reshape(-1))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        return loss.detach()


def without(parameters: Iterable[nn.Parameter], others: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return the parameters that are not among the others."""
    known = {id(parameter) for parameter in others}
    return [parameter for parameter in parameters if id(parameter) not in known]
