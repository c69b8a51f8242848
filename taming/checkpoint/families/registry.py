"""All families, in the order in which they are tried."""

from taming.checkpoint.families.base import Family, Published, State
from taming.checkpoint.families.llamagen_gpt import LLAMAGEN_GPT
from taming.checkpoint.families.maskbit import MASKBIT
from taming.checkpoint.families.maskgit import MASKGIT
from taming.checkpoint.families.open_magvit2 import OPEN_MAGVIT2
from taming.checkpoint.families.rar import RAR
from taming.checkpoint.families.titok import TITOK
from taming.checkpoint.families.var import VAR

FAMILIES: tuple[Family, ...] = (
    LLAMAGEN_GPT,
    RAR,
    MASKBIT,
    MASKGIT,
    OPEN_MAGVIT2,
    TITOK,
    VAR,
)


def identify(state: State) -> Published | None:
    """Return what a state dict is, by the names and shapes of its tensors; None if it is of no known family.

    Raises:
        ValueError: it is of a known family, but no model of this package can be of its sizes.
    """
    for family in FAMILIES:
        if family.matches(state):
            return Published(family, family.config(state), family.translate(state))
    return None
