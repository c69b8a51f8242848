"""LlamaGen's class-conditional priors (Sun et al. 2024): `c2i_B_256.pt` to `c2i_3B_384.pt`.

Those that are conditioned on text, `t2i_*.pt`, are named and not loaded.
"""

from torch import Tensor

from taming.checkpoint.families.base import Config, Family, State

NAMES = {
    "tok_embeddings.weight", "layers.0.attention.wqkv.weight", "layers.0.feed_forward.w1.weight",
    "norm.weight", "output.weight",
}
CLASSES, TEXT = "cls_embedding.embedding_table.weight", "cls_embedding.cap_proj.fc1.weight"
HEADS = {3200: 32, 4096: 32, 2048: 32}  # of 3B, 7B and 1B; all others have 64 channels in a head
LARGEST_256 = 1024  # channels up to which the first release is of 256 pixels: B and L


def matches(state: State) -> bool:
    """Tell whether names are those of LlamaGen's transformer."""
    named = NAMES <= state.keys() and (CLASSES in state or TEXT in state)
    return named and not any("adaLN" in key or "part_embedding" in key for key in state)


def config(state: State) -> Config:
    """Return the model: sizes from shapes, the number of heads from the width.

    Neither heads nor the size of the images are in names and shapes: B and L are taken for those of 256
    pixels, all larger ones for 384 pixels. Another `layout` may be given: rotary positions fit any.

    Raises:
        ValueError: it is conditioned on text.
    """
    if CLASSES not in state:
        raise ValueError(
            "this LlamaGen prior is conditioned on text, by features of T5, which no condition stage here "
            "gives: take one that is conditioned on classes (c2i)"
        )
    codes, channels = state["output.weight"].shape
    blocks = {key.split(".")[1] for key in state if key.startswith("layers.")}
    side = 16 if channels <= LARGEST_256 else 24
    params = {
        "vocab_size": codes, "layout": [1, [side, side]], "condition_vocab_size": len(state[CLASSES]),
        "n_layer": len(blocks), "n_embd": channels,
        "ffn_dim": len(state["layers.0.feed_forward.w1.weight"]), "rotate_condition": False,
    }
    if channels % 64 == 0:  # else the class asks for n_head
        params["n_head"] = heads = HEADS.get(channels, channels // 64)
        shared = len(state["layers.0.attention.wqkv.weight"]) - channels  # of keys and values
        if shared != 2 * channels:  # fewer; else they are n_head, also where another n_head is given
            params["n_kv_head"] = shared * heads // (2 * channels)
    return {"target": "taming.modules.priors.llama.Llama", "params": params}


def translate(state: State) -> dict[str, Tensor]:
    """Return all tensors: names are the same. Rotary entries and masks that a file may hold are left out."""
    buffers = ("freqs_cis", "causal_mask")
    return {key: value for key, value in state.items() if key not in buffers and "kv_cache" not in key}


LLAMAGEN_GPT = Family(
    name="LlamaGen GPT", source="https://github.com/FoundationVision/LlamaGen", licence="MIT",
    matches=matches, config=config, translate=translate,
)
