"""All families, in the order in which they are tried."""

from torch import Tensor

from taming.checkpoint.families import dalle, diffusers, llamagen, taming
from taming.checkpoint.families.base import Family, Published, State
from taming.checkpoint.families.dalle_mini import DALLE_MINI
from taming.checkpoint.families.emu3 import EMU3
from taming.checkpoint.families.ibq import IBQ
from taming.checkpoint.families.llamagen_gpt import LLAMAGEN_GPT
from taming.checkpoint.families.maskbit import MASKBIT
from taming.checkpoint.families.maskgit import MASKGIT
from taming.checkpoint.families.maskgit_generator import MASKBIT_GENERATOR, TITOK_BERT, TITOK_UVIT
from taming.checkpoint.families.movq import MOVQ
from taming.checkpoint.families.open_magvit2 import OPEN_MAGVIT2
from taming.checkpoint.families.rar import RAR
from taming.checkpoint.families.titok import TITOK
from taming.checkpoint.families.transgan import TRANSGAN
from taming.checkpoint.families.var import VAR
from taming.checkpoint.families.vqvae2 import VQ_VAE_2

FAMILIES: tuple[Family, ...] = (
    *llamagen.FAMILIES,
    *diffusers.FAMILIES,
    MOVQ,
    DALLE_MINI,
    IBQ,
    *taming.FAMILIES,
    *dalle.FAMILIES,
    VQ_VAE_2,
    TRANSGAN,
    EMU3,
    LLAMAGEN_GPT,
    RAR,
    MASKBIT,
    MASKGIT,
    OPEN_MAGVIT2,
    TITOK,
    VAR,
    TITOK_BERT,
    TITOK_UVIT,
    MASKBIT_GENERATOR,
)

# Beginnings of the names of a tokenizer inside the file of another model: of latent diffusion, of Janus, and
# of Janus and Chameleon in transformers.
PARTS = ("first_stage_model.", "gen_vision_model.", "model.vqmodel.")
PRIOR = "transformer."  # begins the names of a model over codes: its tokenizer is a part, not the model


def identify(state: State) -> Published | None:
    """Return what a state dict is, by the names and shapes of its tensors; None if it is of no known family.

    They may be on the meta device.
    """
    tensors = {_unwrapped(key): value for key, value in state.items() if isinstance(value, Tensor)}
    for part in ("", *(() if any(key.startswith(PRIOR) for key in tensors) else PARTS)):
        inside = {key.removeprefix(part): value for key, value in tensors.items() if key.startswith(part)}
        for family in FAMILIES if inside else ():
            if family.part in (None, part) and _matches(family, inside):
                return Published(family, part, inside)
    return None


def _unwrapped(key: str) -> str:
    """Return a name without what DataParallel and torch.compile add to it."""
    return key.removeprefix("module.").replace("_orig_mod.", "")


def _matches(family: Family, state: State) -> bool:
    try:
        return family.matches(state)
    except Exception:  # a tensor has other dimensions than the family's
        return False
