"""Every public name of the 2021 code is in its place, with its arguments and attributes: names_2021.txt."""

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

TABLE = Path(__file__).with_name("names_2021.txt")


class Row(NamedTuple):
    """A line of the table: a name in a module or a class, its arguments if it is called, or attributes."""

    path: tuple[str, ...]  # module, class if inside of one
    name: str
    arguments: str | None
    attributes: tuple[str, ...]
    differs: bool

    def __str__(self) -> str:
        return ".".join([*self.path, self.name or "attributes"]) + ("~" if self.differs else "")


def rows() -> Iterator[Row]:
    text = "\n".join(line for line in TABLE.read_text().splitlines() if not line.startswith("#"))
    text = re.sub(r"\n {8,}", " ", text)
    module = owner = ""
    for line in filter(str.strip, text.splitlines()):
        if line.startswith("["):
            module, owner = line.strip("[]"), ""
            continue
        differs = line.startswith("~ ")
        line = line.removeprefix("~ ").partition("   # ")[0].rstrip()
        inside, line = line.startswith("    "), line.strip()
        if not inside:
            owner = ""
        path = (module, owner) if inside else (module,)
        if line.startswith(". "):
            yield Row(path, "", None, tuple(line.split()[1:]), differs)
            continue
        name, called, arguments = line.removeprefix("class ").partition("(")
        yield Row(path, name, arguments.removesuffix(")") if called else None, (), differs)
        if line.startswith("class "):
            owner = name


ROWS = list(rows())


def differences(arguments: str, ours: Callable[..., Any], method: bool = False) -> list[str]:
    """Say where our signature does not accept what one of 2021 did."""
    theirs = inspect.signature(eval(f"lambda {arguments}: None")).parameters
    found = dict(inspect.signature(ours).parameters)
    if method:
        found.pop("self", None)
    by_position = [p.name for p in found.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    kinds = {p.kind for p in found.values()}
    wanted = [p.name for p in theirs.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    problems = []
    if inspect.Parameter.VAR_POSITIONAL not in kinds and by_position[: len(wanted)] != wanted:
        problems.append(f"by position: {by_position}, not {wanted}")
    for p in theirs.values():
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            if p.kind not in kinds:
                problems.append(f"takes no further arguments ({p.kind.description})")
        elif p.name not in found:
            if p.VAR_KEYWORD not in kinds:
                problems.append(f"no argument {p.name}")
        elif p.default is not p.empty:
            default = found[p.name].default
            if default is None:  # the class's own, such as RANDOM_CROP
                default = getattr(ours, p.name.upper(), None)
            if default != p.default:
                problems.append(f"{p.name} is {default!r} by default, not {p.default!r}")
    added = [p.name for p in found.values() if p.name not in theirs and p.default is p.empty
             and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return problems + [f"{name} must be given" for name in added]


@pytest.mark.parametrize("row", [row for row in ROWS if row.name], ids=str)
def test_the_name_is_there_and_takes_what_it_took(row):
    owner: Any = importlib.import_module(row.path[0])
    for name in row.path[1:]:
        owner = getattr(owner, name)
    problems = [] if hasattr(owner, row.name) else [f"no {row.name}"]
    if not problems and row.arguments is not None:
        problems = differences(row.arguments, getattr(owner, row.name), method=len(row.path) > 1)
    assert bool(problems) == row.differs, problems or "differs no longer: take the ~ away"


def test_the_table_is_read():
    assert len(ROWS) > 200 and len({row.path[0] for row in ROWS}) > 15
    assert Row(("taming.modules.util", "ActNorm"), "reverse", "output", (), False) in ROWS
    for arguments in ("a", "b", "a, b, c", "a, b=2", "a, b=1, *, d", "a, b=1, **more"):
        assert differences(arguments, lambda a, b=1, *, c=None: None) or arguments == "a"


def test_a_star_import_gives_what_losses_of_other_code_bases_use():
    names: dict[str, Any] = {}
    exec("from taming.modules.losses.vqperceptual import *", names)
    assert {"F", "nn", "torch", "hinge_d_loss", "adopt_weight", "NLayerDiscriminator"} <= set(names)
    assert "Tensor" not in names


# ---- attributes of instances

DD = dict(
    ch=32, out_ch=3, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(), in_channels=3, resolution=32
)
STAGE = dict(
    ddconfig={**DD, "z_channels": 4, "double_z": False}, n_embed=8, embed_dim=4,
    lossconfig={"target": "taming.modules.losses.DummyLoss"}, monitor="val/rec_loss",
)
LABELS = {**STAGE, "ddconfig": {**STAGE["ddconfig"], "in_channels": 5, "out_ch": 5}}
COSINE = dict(warm_up_steps=0, lr_min=0.1, lr_max=1.0, lr_start=1.0, max_decay_steps=9)
SIZES = dict(vocab_size=9, block_size=16, n_layer=1, n_head=2, n_embd=8)


def vqgan(name: str, **arguments: Any) -> Any:
    return getattr(importlib.import_module("taming.models.vqgan"), name)(**{**STAGE, **arguments})


def transformer() -> Any:
    stage = {"target": "taming.models.vqgan.VQModel", "params": STAGE}
    gpt = {"target": "taming.modules.transformer.mingpt.GPT", "params": {**SIZES, "block_size": 300}}
    module = importlib.import_module("taming.models.cond_transformer")
    return module.Net2NetTransformer(gpt, stage, "__is_unconditional__")


def used(decoder: torch.nn.Module) -> torch.nn.Module:
    decoder(torch.zeros(1, 4, 2, 2))
    return decoder


@pytest.fixture(scope="module")
def make(tmp_path_factory) -> Callable[[str, type], list[Any]]:
    """Build instances of a class of the table, which have all its attributes together."""
    remap = tmp_path_factory.mktemp("remap") / "used.npy"
    np.save(remap, np.array([1, 2, 5]))
    special: dict[str, Callable[[type], Any]] = {
        "LambdaWarmUpCosineScheduler": lambda c: [c(**COSINE)],
        "Net2NetTransformer": lambda c: [transformer()],
        "DummyCondStage": lambda c: [c("objects_bbox")],
        "VQModel": lambda c: [vqgan("VQModel", colorize_nlabels=3)],
        "VQSegmentationModel": lambda c: [c(5, **LABELS)],
        "GumbelVQ": lambda c: [vqgan("GumbelVQ", temperature_scheduler_config={
            "target": "taming.lr_scheduler.LambdaWarmUpCosineScheduler", "params": COSINE})],
        "EMAVQ": lambda c: [vqgan("EMAVQ")],
        "Upsample": lambda c: [c(32, True)],
        "Downsample": lambda c: [c(32, True)],
        "ResnetBlock": lambda c: [
            c(in_channels=32, out_channels=64, conv_shortcut=conv, dropout=0.0) for conv in (True, False)
        ],
        "AttnBlock": lambda c: [c(32)],
        "Model": lambda c: [c(**DD)],
        "Encoder": lambda c: [c(**DD, z_channels=4)],
        "Decoder": lambda c: [used(c(**DD, z_channels=4))],
        "VUNet": lambda c: [c(**DD, c_channels=1, z_channels=4)],
        "SimpleDecoder": lambda c: [c(32, 3)],
        "UpsampleDecoder": lambda c: [c(32, 3, 32, 1, 32)],
        "LPIPS": lambda c: [c(random_trunk=True)],
        "NetLinLayer": lambda c: [c(4)],
        "vgg16": lambda c: [c(pretrained=False)],
        "VQLPIPSWithDiscriminator": lambda c: [c(0)],
        "CoordStage": lambda c: [c(9, 4)],
        "GPTConfig": lambda c: [c(9, 16)],
        "GPT": lambda c: [c(**SIZES)],
        "CodeGPT": lambda c: [c(**SIZES, in_channels=3)],
        "ActNorm": lambda c: [c(4)],
        "Labelator": lambda c: [c(9)],
        "SOSProvider": lambda c: [c(0)],
        "VectorQuantizer": lambda c: [c(9, 4, 0.25)],
        "VectorQuantizer2": lambda c: [c(9, 4, 0.25, remap=str(remap))],
        "GumbelQuantize": lambda c: [c(4, 4, 9, remap=str(remap))],
        "EmbeddingEMA": lambda c: [c(9, 4)],
        "EMAVectorQuantizer": lambda c: [c(9, 4, 0.25, remap=str(remap))],
        "KeyNotFoundError": lambda c: [c("cause")],
        "WrappedDataset": lambda c: [c([1])],
        "DataModuleFromConfig": lambda c: [c(1)],
        "SetupCallback": lambda c: [c("now", {})],
        "ImageLogger": lambda c: [c(750, 4)],
    }
    permuter = {name: lambda c: [c(4, 4)] for name in (
        "Subsample", "ZCurve", "SpiralOut", "SpiralIn", "Random", "AlternateParsing"
    )}
    builders = {**special, **permuter}

    def build(name: str, kind: type) -> list[Any]:
        block = importlib.import_module("taming.modules.transformer.mingpt")
        if name in ("CausalSelfAttention", "Block"):
            return [kind(block.GPTConfig(**SIZES))]
        return builders[name](kind) if name in builders else [kind()]

    return build


def assignments(kind: type) -> set[str]:
    """Return the attributes that the methods of a class of ours set on self."""
    if not kind.__module__.startswith("taming."):
        return set()
    nodes = ast.walk(ast.parse(textwrap.dedent(inspect.getsource(kind))))
    found = [node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
    return {node.attr for node in found if isinstance(node.value, ast.Name) and node.value.id == "self"}


@pytest.mark.parametrize("row", [row for row in ROWS if row.attributes], ids=str)
def test_instances_have_the_attributes(row, make):
    module, name = row.path
    kind = getattr(importlib.import_module(module), name)
    if module.startswith("taming.data."):  # built from files: what its constructors set
        assigned = set().union(*(assignments(base) for base in kind.__mro__))
        missing = [a for a in row.attributes if a not in assigned and not hasattr(kind, a)]
    else:
        instances = make(name, kind)
        missing = [a for a in row.attributes if not any(hasattr(instance, a) for instance in instances)]
    assert missing == (list(row.attributes) if row.differs else [])
