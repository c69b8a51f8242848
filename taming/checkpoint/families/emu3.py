"""The vision tokenizer of Emu3 (Wang et al. 2024, arXiv 2409.18869), which is of video."""

from taming.checkpoint.families.base import Config, Family, State


def _matches(state: State) -> bool:
    return "quant_conv.conv.weight" in state and state["quant_conv.conv.weight"].ndim == 5


def _config(state: State) -> Config:
    raise ValueError(
        "it is a tokenizer of video, whose convolutions and batch normalizations also run over time (an "
        "image goes in four times); this package has tokenizers of images only. Take Emu3.5's, or another "
        "one of docs/checkpoints.md"
    )


EMU3 = Family("Emu3 vision tokenizer", "github.com/baaivision/Emu3", "Apache-2.0", _matches, _config, dict)
