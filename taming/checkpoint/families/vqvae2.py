"""VQ-VAE-2 of rosinality/vq-vae-2-pytorch: a bare state dict, with codes as columns."""

from torch import Tensor

from taming.checkpoint.families.base import Config, Family, State

KEYS = {  # of each quantizer: names there, where codes are columns, and here
    "embed": "embedding.weight", "cluster_size": "embedding.cluster_size", "embed_avg": "embedding.embed_avg",
}


def _to_ours(state: State) -> dict[str, Tensor]:
    found = {}
    for key, value in state.items():
        name, _, kind = key.rpartition(".")
        if name in ("quantize_t", "quantize_b"):
            found[f"{name}.{KEYS[kind]}"] = value.t()
        else:
            found[key] = value
    return found


def _config(state: State) -> Config:
    def number(name: str) -> int:
        return max(int(key.split(".")[2]) for key in state if key.startswith(f"{name}.blocks."))

    convolutions = sum(f"enc_b.blocks.{i}.weight" in state for i in range(number("enc_b") + 1))
    residual = [key for key in state if key.startswith("enc_b.") and key.endswith(".conv.1.weight")]
    embed_dim, n_embed = state["quantize_t.embed"].shape
    sizes = {
        "resolution": 256, "in_channels": state["enc_b.blocks.0.weight"].shape[1],
        "out_ch": state[f"dec.blocks.{number('dec')}.weight"].shape[1],
        "ch": state["dec.blocks.0.weight"].shape[0], "num_res_blocks": len(residual),
        "res_ch": state[residual[0]].shape[0] if residual else 1, "num_down": convolutions - 1,
    }
    return {"target": "taming.models.vqvae2.VQVAE2", "params": {
        "ddconfig": sizes, "n_embed": n_embed, "embed_dim": embed_dim,
    }}


VQ_VAE_2 = Family(
    "VQ-VAE-2 (rosinality)", "github.com/rosinality/vq-vae-2-pytorch", "MIT",
    lambda state: {"quantize_t.embed", "quantize_b.embed", "enc_b.blocks.0.weight"} <= state.keys(),
    _config, _to_ours,
)
