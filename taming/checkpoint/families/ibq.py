"""The tokenizers of IBQ (Shi et al. 2024, arXiv 2412.02692) and of Emu3.5, which is the same model.

    imagenet256_1024.ckpt, ...   {"state_dict": ...} with loss.* and running averages model_ema.*

Names are those of the VQGAN of 2021, but a code is the argmax of the inner product. What tells them apart is
four residual blocks a level, or a codebook larger than 2021's.
"""

from taming.checkpoint.families.base import AVERAGES, Config, Family, State, plain_weights
from taming.checkpoint.families.convolutional import count, vq_model
from taming.checkpoint.families.taming import CODEBOOK, is_vqgan

QUANTIZER = "taming.modules.quantizers.index_propagation.IBQ"


def _matches(state: State) -> bool:
    if not is_vqgan(state):
        return False
    size, dim = state[CODEBOOK].shape
    has_averages = any(key.startswith(AVERAGES) for key in state)
    blocks = count(state, r"encoder\.down\.0\.block\.(\d+)\.")
    return dim > 16 and (blocks >= 4 or size > 16384 or has_averages)


def _config(state: State) -> Config:
    n_embed, embed_dim = state[CODEBOOK].shape
    quantizer = {"target": QUANTIZER, "params": {"codebook_size": n_embed, "dim": embed_dim}}
    return vq_model(state, 256, quantizer_config=quantizer)


IBQ = Family("IBQ", "github.com/TencentARC/SEED-Voken", "Apache-2.0", _matches, _config, plain_weights)
