"""Masked generators: those of TiTok (Yu et al. 2024), which are MaskGITs, and of MaskBit (Weber et al. 2024).

`generator_titok_l32` and `_b64` are BERTs, `generator_titok_s128` is a U-ViT, over codes in one row.
"""

from torch import Tensor

from taming.checkpoint.families.base import Config, Family, State

HEADS = 16  # of all that are published; the number is not in names and shapes
# of training: the schedule of the masks, and the loss of Yu et al. 2024
TRAINING = {"mask_schedule": "arccos", "label_smoothing": 0.1}
TITOK = {**TRAINING, "unmasked_weight": 0.1, "certainty": "logit"}
BERT = {
    "model.embeddings.word_embeddings.weight", "model.embeddings.position_embeddings.weight",
    "model.encoder.layer.0.attention.self.query.weight", "model.lm_head.weight",
}
UVIT = {
    "embeddings.weight", "pos_embed", "mid_block.attn.qkv.weight", "mid_block.mlp.fc1.weight",
    "lm_head.weight",
}
MASKBIT = {
    "input_proj.weight", "class_emb.weight", "pos_emb", "transformer.layers.0.0.mha.in_proj_weight",
    "prediction_layer.weight",
}


def _count(state: State, prefix: str) -> int:
    """Return the number of blocks under a prefix."""
    depth = prefix.count(".")
    return len({key.split(".")[depth] for key in state if key.startswith(prefix)})


def _sizes(state: State, table: Tensor, head: Tensor, positions: int) -> Config:
    """Return what BERT and U-ViT have in common: the table holds codes, the mask and condition tokens."""
    codes, channels = head.shape
    return {
        "vocab_size": codes, "condition_vocab_size": len(table) - codes - 1, "block_size": positions - 1,
        "n_head": HEADS, "n_embd": channels, **TITOK,
    }


def bert_config(state: State) -> Config:
    """Return the model: sizes from shapes, but for the number of heads."""
    name = "model.embeddings.{}_embeddings.weight"
    sizes = _sizes(
        state, state[name.format("word")], state["model.lm_head.weight"], len(state[name.format("position")])
    )
    return {"target": "taming.modules.priors.maskgit.MaskGIT", "params": {
        **sizes, "n_layer": _count(state, "model.encoder.layer."),
        "n_inner": len(state["model.encoder.layer.0.intermediate.dense.weight"]),
    }}


def uvit_config(state: State) -> Config:
    """Return the model: sizes from shapes, but for the number of heads."""
    sizes = _sizes(state, state["embeddings.weight"], state["lm_head.weight"], state["pos_embed"].shape[1])
    return {"target": "taming.modules.priors.maskgit.UViTMaskGIT", "params": {
        **sizes, "n_layer": 2 * _count(state, "in_blocks.") + 1,
        "n_inner": len(state["mid_block.mlp.fc1.weight"]),
    }}


def maskbit_config(state: State) -> Config:
    """Return the model: sizes from shapes, but for the number of heads.

    Raises:
        ValueError: no number of groups explains the shapes of input and output.
    """
    channels, bits = state["input_proj.weight"].shape
    rows = len(state["prediction_layer.weight"])
    groups = next((n for n in range(1, bits + 1) if bits % n == 0 and n * 2 ** (bits // n) == rows), None)
    if groups is None:
        raise ValueError(f"a MaskBit generator of {bits} bits does not predict {rows} values: no groups fit")
    return {"target": "taming.modules.priors.maskbit.MaskBit", "params": {
        "vocab_size": 2**bits, "condition_vocab_size": len(state["class_emb.weight"]),
        "block_size": state["pos_emb"].shape[1] - 1, "bit_groups": groups,
        "n_layer": _count(state, "transformer.layers."), "n_head": HEADS, "n_embd": channels,
        "n_inner": len(state["transformer.layers.0.1.net.0.weight"]),
        "pre_norm": "norm_after_transformer.weight" in state, **TRAINING,
    }}


def translate(state: State) -> dict[str, Tensor]:
    """Return all tensors but buffers that follow from the sizes; names are the same."""
    buffers = ("model.embeddings.position_ids", "bits_to_indices")
    return {key: value for key, value in state.items() if key not in buffers}


TITOK_BERT = Family(
    name="TiTok generator (BERT)", source="https://github.com/bytedance/1d-tokenizer", licence="Apache-2.0",
    matches=lambda state: state.keys() >= BERT, config=bert_config, translate=translate,
)
TITOK_UVIT = Family(
    name="TiTok generator (U-ViT)", source="https://github.com/bytedance/1d-tokenizer", licence="Apache-2.0",
    matches=lambda state: state.keys() >= UVIT, config=uvit_config, translate=translate,
)
MASKBIT_GENERATOR = Family(
    name="MaskBit generator", source="https://github.com/markweberdev/maskbit", licence="not stated",
    matches=lambda state: state.keys() >= MASKBIT, config=maskbit_config, translate=translate,
)
