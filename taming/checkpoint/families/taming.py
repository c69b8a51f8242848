"""The VQGANs of Esser et al. 2021, and others that kept their names and their quantizer.

    last.ckpt    of CompVis/taming-transformers, {"state_dict": ...}
    vqgan.ckpt   of Chameleon
"""

from taming.checkpoint.families.base import NO_LOSS, Config, Family, State, plain_weights
from taming.checkpoint.families.convolutional import has_networks, network_sizes, vq_model

CODEBOOK = "quantize.embedding.weight"
RUNNING_MEANS = "quantize.embedding.cluster_size"  # of a codebook that they update
TEMPERATURE = {  # that Gumbel VQGANs were trained with; it has no effect in use
    "target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler",
    "params": {
        "warm_up_steps": 0, "max_decay_steps": 1_000_001, "lr_start": 0.9, "lr_max": 0.9, "lr_min": 1e-6,
    },
}


def quantizer_names(state: State) -> set[str]:
    """Return the names of the quantizer's tensors."""
    return {key for key in state if key.startswith("quantize.")}


def _is_gumbel(state: State) -> bool:
    names = {"quantize.proj.weight", "quantize.proj.bias", "quantize.embed.weight"}
    return quantizer_names(state) == names and has_networks(state)


def _gumbel_config(state: State) -> Config:
    n_embed, embed_dim = state["quantize.embed.weight"].shape
    return vq_model(
        state, 256, target="taming.models.vqgan.GumbelVQ", n_embed=n_embed, embed_dim=embed_dim,
        temperature_scheduler_config=TEMPERATURE,
    )


def is_vqgan(state: State) -> bool:
    """Tell whether it is a VQGAN with a plain codebook under the names of 2021."""
    return quantizer_names(state) == {CODEBOOK} and has_networks(state)


def _is_ema(state: State) -> bool:
    names = {CODEBOOK, RUNNING_MEANS, "quantize.embedding.embed_avg"}
    return quantizer_names(state) == names and has_networks(state)


def _vqgan_config(state: State) -> Config:
    found = vq_model(state, 256)
    ddconfig, params = found["params"]["ddconfig"], found["params"]
    if "colorize" in state:
        labels = state["colorize"].shape[1]
        if (ddconfig["in_channels"], ddconfig["out_ch"]) == (labels, labels):
            target = "taming.models.vqgan.VQSegmentationModel"
            return {"target": target, "params": params | {"n_labels": labels}}
        params["colorize_nlabels"] = labels
    return found


def _is_chameleon(state: State) -> bool:
    no_attention = not any(".attn." in key for key in state)
    return is_vqgan(state) and no_attention and state[CODEBOOK].shape == (8192, 256)


def _is_without_decoder(state: State) -> bool:
    names = {CODEBOOK, "quant_conv.weight", "encoder.conv_in.bias", "encoder.mid.block_1.conv1.weight"}
    return names <= state.keys() and not any(key.startswith("decoder.") for key in state)


def _without_decoder(state: State) -> Config:
    raise ValueError(
        "it is the encoder half of a VQGAN, as transformers keeps of Chameleon's: images cannot be decoded "
        "with it. Get the whole tokenizer, vqgan.ckpt in Chameleon's folder tokenizer"
    )


def _kl_config(state: State) -> Config:
    ddconfig, of_decoder = network_sizes(state, 256)
    if of_decoder:
        raise ValueError(f"encoder and decoder differ in {', '.join(of_decoder)}: AutoencoderKL's do not")
    if not ddconfig["double_z"]:
        raise ValueError("it has no codes, and no mean and log-variance of latents either")
    return {"target": "taming.models.autoencoder_kl.AutoencoderKL", "params": {
        "ddconfig": ddconfig, "lossconfig": NO_LOSS, "embed_dim": state["post_quant_conv.weight"].shape[1],
    }}


def is_kl(state: State) -> bool:
    """Tell whether it is latent diffusion's autoencoder without codes."""
    return not quantizer_names(state) and has_networks(state)


def _latent_config(state: State) -> Config:
    found = vq_model(state, 256)
    if "decoder_config" not in found["params"]:  # which that project's class does not take
        found["target"] = "taming.models.latent_diffusion.VQModel"
    return found


def _is_latent(state: State) -> bool:
    dim = state[CODEBOOK].shape[1] if is_vqgan(state) else 0
    return 0 < dim <= 16 and state["encoder.conv_out.weight"].shape[0] == dim


TAMING = "github.com/CompVis/taming-transformers"
LDM = "github.com/CompVis/latent-diffusion"
GUMBEL = Family("taming GumbelVQ", TAMING, "MIT", _is_gumbel, _gumbel_config, plain_weights)
VQGAN = Family("taming VQGAN", TAMING, "MIT", is_vqgan, _vqgan_config, plain_weights)
EMA_VQGAN = Family(
    "taming EMAVQ", TAMING, "MIT", _is_ema,
    lambda state: vq_model(state, 256, target="taming.models.vqgan.EMAVQ"), plain_weights,
)
CHAMELEON = Family(
    "Chameleon VQGAN", "github.com/facebookresearch/chameleon", "Chameleon Research License", _is_chameleon,
    lambda state: vq_model(state, 512), plain_weights,
)
ENCODER_ONLY = Family(
    "the encoder of a VQGAN", "github.com/huggingface/transformers", "Apache-2.0", _is_without_decoder,
    _without_decoder, dict,
)
LATENT_VQ = Family("latent diffusion VQ", LDM, "MIT", _is_latent, _latent_config, plain_weights)
LATENT_KL = Family("latent diffusion KL", LDM, "MIT", is_kl, _kl_config, plain_weights)
FAMILIES = (GUMBEL, EMA_VQGAN, LATENT_VQ, LATENT_KL, CHAMELEON, ENCODER_ONLY, VQGAN)
