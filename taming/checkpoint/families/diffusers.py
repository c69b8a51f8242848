"""Autoencoders of diffusers: VQModel (of aMUSEd, of Kandinsky and of latent diffusion) and AutoencoderKL.

    diffusion_pytorch_model.safetensors or .bin, in the folder vqvae, movq or vae of a pipeline

Attention is made of linear layers there, of 1x1 convolutions here. aMUSEd's (Patil et al. 2024,
arXiv 2401.01808) takes and gives pixels in [0, 1], and has no attention at all, which tells it from others.
"""

import re

import torch
from torch import Tensor

from taming.checkpoint.families.base import Config, Family, State
from taming.checkpoint.families.convolutional import has_networks, highest_first, vq_model
from taming.checkpoint.families.movq import movq_config
from taming.checkpoint.families.taming import LATENT_KL

CODEBOOK = "quantize.embedding.weight"
MAX_LATENTS = 1024  # channels; published are 4 to 32, and twice as many for their variance
RULES = (  # patterns, and what replaces them
    (r"^encoder\.down_blocks\.(\d+)", r"encoder.down.\1"),
    (r"\.resnets\.(\d+)", r".block.\1"),
    (r"\.attentions\.(\d+)", r".attn.\1"),
    (r"\.mid_block\.block\.0", ".mid.block_1"), (r"\.mid_block\.block\.1", ".mid.block_2"),
    (r"\.mid_block\.attn\.0", ".mid.attn_1"),
    (r"\.(down|up)samplers\.0\.", r".\1sample."),
    (r"\.conv_shortcut\.", ".nin_shortcut."), (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.(group_norm|spatial_norm)\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."), (r"\.to_out\.0\.", ".proj_out."),
    # before version 0.17
    (r"\.(q)uery\.|\.(k)ey\.|\.(v)alue\.", r".\1\2\3."), (r"\.proj_attn\.", ".proj_out."),
)


def _to_ours(state: State) -> dict[str, Tensor]:
    found = {}
    for key, value in highest_first(state, "decoder.up_blocks.").items():
        for pattern, ours in RULES:
            key = re.sub(pattern, ours, key)
        is_linear = re.search(r"\.(q|k|v|proj_out)\.weight$", key) and value.ndim == 2
        found[key] = value[:, :, None, None] if is_linear else value
    return found


def _has_names(state: State) -> bool:
    return {"encoder.down_blocks.0.resnets.0.conv1.weight", "decoder.conv_in.weight"} <= state.keys()


def _is_vq(state: State) -> bool:
    return _has_names(state) and CODEBOOK in state


def _vq_config(state: State) -> Config:
    ours = _to_ours(state)
    if has_networks(ours, spatial=True):
        return movq_config(ours)
    if not has_networks(ours):
        raise ValueError("it is a VQModel of diffusers with blocks that are unknown here")
    is_amused = not any("attn" in key for key in ours)
    return vq_model(ours, 256, pixel_range=(0.0, 1.0) if is_amused else None)


def _is_kl(state: State) -> bool:
    return _has_names(state) and not any(key.startswith("quantize.") for key in state)


def _kl_to_ours(state: State) -> dict[str, Tensor]:
    """Translate, and put the identity in place of convolutions that later models have left out."""
    found = _to_ours(state)
    for name, network in (("quant_conv", "encoder.conv_out"), ("post_quant_conv", "decoder.conv_in")):
        if f"{name}.weight" not in found:
            weight = found[f"{network}.weight"]
            channels = weight.shape[0 if name == "quant_conv" else 1]
            if channels > MAX_LATENTS:
                raise ValueError(f"latents of {channels} channels are not images'")
            eye = torch.eye(channels, dtype=weight.dtype, device=weight.device)
            found[f"{name}.weight"], found[f"{name}.bias"] = eye[:, :, None, None], torch.zeros_like(eye[0])
    return found


def _kl_config(state: State) -> Config:
    ours = _kl_to_ours(state)
    if not has_networks(ours):
        raise ValueError("it is an autoencoder of diffusers with blocks that are unknown here")
    return LATENT_KL.config(ours)


DIFFUSERS = "github.com/huggingface/diffusers"
VQ_MODEL = Family("diffusers VQModel", DIFFUSERS, "Apache-2.0", _is_vq, _vq_config, _to_ours)
AUTOENCODER_KL = Family("diffusers AutoencoderKL", DIFFUSERS, "Apache-2.0", _is_kl, _kl_config, _kl_to_ours)
FAMILIES = (VQ_MODEL, AUTOENCODER_KL)
