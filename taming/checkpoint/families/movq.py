"""MoVQ (Zheng et al. 2022, arXiv 2209.09002), Kandinsky 2's tokenizer: movq_final.ckpt, a bare state dict."""

from taming.checkpoint.families.base import NO_LOSS, Config, Family, State, plain_weights
from taming.checkpoint.families.convolutional import has_networks, network_sizes

CODEBOOK = "quantize.embedding.weight"


def movq_config(state: State) -> Config:
    """Return the section `model` of a state dict with our names."""
    ddconfig, of_decoder = network_sizes(state, 256)
    if of_decoder:
        raise ValueError(f"encoder and decoder differ in {', '.join(of_decoder)}, which MOVQ's do not")
    n_embed, embed_dim = state[CODEBOOK].shape
    return {"target": "taming.models.movq.MOVQ", "params": {
        "ddconfig": ddconfig, "lossconfig": NO_LOSS, "n_embed": n_embed, "embed_dim": embed_dim,
    }}


def _matches(state: State) -> bool:
    return CODEBOOK in state and has_networks(state, spatial=True)


MOVQ = Family(
    "MOVQ", "github.com/ai-forever/Kandinsky-2", "Apache-2.0", _matches, movq_config, plain_weights,
)
