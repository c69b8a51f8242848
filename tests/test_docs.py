"""What README.md, CONTRIBUTING.md and docs/ say is true: examples run, commands, names and links exist."""

import importlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from PIL import Image

import taming
from taming.checkpoint import load_model, save_exported
from taming.cli import COMMANDS, main
from taming.cli.parser import build_parser
from taming.config import find_config, instantiate_from_config
from taming.training import arguments
from tests.tiny import TRANSFORMER, VQGAN

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks" / "README.md"])
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a page in a language; "" for those without one."""
    text = page.read_text(encoding="utf-8")
    fences = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
    return [block for found, block in fences if found == language]


def command_lines(page: Path) -> list[str]:
    """Return the lines to type into a shell, with continued ones joined and comments left out."""
    text = "\n".join(block for language in ("", "sh") for block in blocks(page, language))
    lines = [line.split("  #")[0].strip() for line in text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


# ---- CONTRIBUTING.md: parts of one's own

PARTS = ROOT / "CONTRIBUTING.md"


def parts() -> dict[str, str]:
    """Return the files that CONTRIBUTING.md shows, by the names in their first lines."""
    named = [block.split("\n", 1) for language in ("python", "yaml") for block in blocks(PARTS, language)]
    return {first.removeprefix("# "): rest for first, rest in named}


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """A folder with the files of CONTRIBUTING.md and a few photos, from which my_parts can be imported."""
    for name, text in parts().items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    numbers = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for split in ("train", "test"):
        rows = [f"{split}_{i}.png,{i % 2},{i // 2}" for i in range(4)]
        (tmp_path / "photos" / f"{split}.csv").write_text("\n".join(["file,day,sea", *rows]))
        for row in rows:
            pixels = numbers.integers(0, 256, (70, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / row.split(",")[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "my_parts"]:
        del sys.modules[name]


def test_examples_are_short():
    long = {name: len(text.splitlines()) for name, text in parts().items() if len(text.splitlines()) > 35}
    assert len(parts()) == 7 and not long


@pytest.mark.slow
def test_parts_of_ones_own_train_and_sample(workshop, monkeypatch):
    lines = [line for line in command_lines(PARTS) if line.startswith("python -m taming ")]
    assert len(lines) == 3
    for line in lines:
        words = shlex.split(line)[3:]
        if words[0] == "train":
            words += ["--max_steps", "2"]
        words = [str(next(iter(Path().glob(word)), word)) if "*" in word else word for word in words]
        assert main(words) == 0, line
    assert len(list((workshop / "samples" / "samples").glob("*.png"))) == 2

    monkeypatch.setattr("taming.config._allowed", ())
    run = next(Path("logs").glob("*_gru_transformer"))
    with pytest.raises(ValueError, match="my_parts"):
        load_model(run)
    taming.allow_targets("my_parts")
    model, _, step = load_model(run, taming.Net2NetTransformer)
    condition = model.encode_conditions(torch.tensor([[1, 0]]))
    codes = model.sample_codes(condition, size=(64, 96), stride=8, seed=3)
    assert codes.shape == (1, 16, 24) and step == 2
    assert type(model.transformer).__name__ == "GRUPrior" and model.codebook_size == 256


def test_the_quantizer_of_the_example_is_consistent(workshop):
    taming.allow_targets("my_parts")
    quantizer = instantiate_from_config(
        {"target": "my_parts.quantizer.SignQuantizer", "params": {"channels": 5}}
    )
    z = torch.randn(2, 5, 3, 4, requires_grad=True)
    z_q, loss, info = quantizer(z)
    assert torch.equal(quantizer.indices_to_codes(info.indices), z_q.detach()) and z_q.abs().eq(1).all()
    assert info.indices.max() < quantizer.codebook_size == 32
    z_q.sum().backward()
    assert torch.equal(z.grad, torch.ones_like(z)) and loss > 0


# ---- README.md: the notebook


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    """A folder with a tiny run and a photo, and the code of the README with their names in it."""
    (code,) = blocks(ROOT / "README.md", "python")[:1]
    config = OmegaConf.create(TRANSFORMER)
    config.model.params.first_stage_config = OmegaConf.create(VQGAN).model
    config.model.params.first_stage_config.params.n_embed = 128
    config.model.params.transformer_config.params.vocab_size = 128
    monkeypatch.chdir(tmp_path)
    save_exported(instantiate_from_config(config.model), config, tmp_path / "logs" / "RUN")
    Image.new("RGB", (40, 36), "teal").save("photo.jpg")
    (tmp_path / "snippet.py").write_text(code)
    return tmp_path


def test_the_notebook_runs(notebook):
    names = runpy.run_path("snippet.py")
    assert Image.open("image.png").size == (32, 32)
    assert names["codes"].shape == (1, 8, 8) and names["nll"].shape == (1,) and names["nll"] > 0
    assert names["reconstruction"].shape == (1, 3, 32, 32)


@pytest.mark.slow
def test_the_notebook_passes_mypy(notebook):
    words = [sys.executable, "-m", "mypy", "--strict-equality", "--check-untyped-defs"]
    words += ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    done = subprocess.run([*words, str(notebook / "snippet.py")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- commands, names and links of all pages


def parse(words: list[str]) -> None:
    """Read a command line of the documentation; SystemExit or ValueError if it is none."""
    while "=" in words[0] and not words[0].startswith("-"):  # a variable of the environment
        words = words[1:]
    if words[0] == "torchrun":
        script = next(i for i, word in enumerate(words) if word.endswith(".py") or word == "-m")
        words = ["python", *words[script:]]
    if words[0] == "python" and words[1:3] == ["-m", "taming"]:
        words = words[2:]
    if words[0] == "python":
        name, rest = words[1], words[2:]
        assert (ROOT / name).is_file(), name
        if name.startswith("benchmarks/"):
            return
        found = re.search(r'script\("([\w-]+)"', (ROOT / name).read_text())
        name = found[1] if found else "train"
    else:
        assert words[0] == "taming"
        name, rest = words[1], words[2:]
    if name == "train":
        options, *_ = arguments.parse(rest)
        for base in options.base:
            if "/" in base and not base.startswith("my_"):
                find_config(base)
        return
    module = importlib.import_module(f"taming.cli.{name.replace('-', '_')}")
    if name in ("demo", "bench"):  # their options are those of another command
        return
    build_parser(module).read([word for word in rest if word != "..."])


@by_page
def test_commands_can_be_typed(page, capsys):
    wrong = {}
    for line in command_lines(page):
        if not re.match(r"(\w+=\S* )*(taming|torchrun|python (-m taming|main\.py|\w+/\S+))( |$)", line):
            continue
        try:
            parse(shlex.split(line))
        except (SystemExit, ValueError, OSError, ImportError, AssertionError) as error:
            wrong[line] = f"{error} {capsys.readouterr().err}"
    assert not wrong


def test_a_wrong_command_is_found(capsys):
    for line in ("taming sample -r logs/RUN --smaples 3", "python scripts/sample_fst.py", "taming smaple",
                 "python main.py --base configs/custom_vqgn.yaml -t", "python main.py --bas configs/x.yaml"):
        with pytest.raises((SystemExit, ValueError, OSError, ImportError, AssertionError)):
            parse(shlex.split(line))


def test_training_finds_configurations_by_their_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--base", "demo/vqgan", "--dry-run"]) == 0
    assert "taming.models.vqgan.VQModel" in capsys.readouterr().out


def test_every_command_is_in_the_readme():
    text = (ROOT / "README.md").read_text()
    assert [name for name in COMMANDS if f"taming {name}" not in text] == []


@by_page
def test_names_exist(page):
    """Dotted names of the package, and files, that stand between backticks."""
    missing = []
    text = page.read_text(encoding="utf-8")
    if page.name == "CHANGELOG.md":  # its tables have the old names on the left
        text = re.sub(r"^\| [^|]*\|", "|", text, flags=re.MULTILINE)
    for word in re.findall(r"`([\w./-]+)`", text):
        if re.fullmatch(r"taming(\.\w+)+", word):
            module, _, name = word.rpartition(".")
            try:
                importlib.import_module(word)
            except ImportError:
                if not hasattr(importlib.import_module(module), name):
                    missing.append(word)
        elif re.match(r"(taming|scripts|configs|docs|tests|benchmarks)/", word):
            if not (ROOT / word).exists():
                missing.append(word)
    assert not missing


@by_page
def test_named_tests_exist(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text)
    missing = [
        (file, name) for file, name in named
        if not (ROOT / file).exists() or f"def {name}" not in (ROOT / file).read_text(encoding="utf-8")
    ]
    assert not missing


@by_page
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    broken = [link for link in links if "://" not in link and not (page.parent / link.split("#")[0]).exists()]
    assert not broken


def test_pictures_are_large_enough():
    """Smaller ones look blurred where a browser enlarges them."""
    small = {file.name: size for file in (ROOT / "docs" / "images").glob("*.png")
             if max(size := Image.open(file).size) < 300}
    assert not small


# ---- metadata


def test_the_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["version"] == taming.__version__
    assert {"title", "message", "authors"} <= citation.keys()
    assert "2012.09841" in citation["preferred-citation"]["url"]


def test_hooks_before_commits_run_what_lint_runs():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    entries = " ".join(hook["entry"] for hook in repository["hooks"])
    assert repository["repo"] == "local" and "ruff check" in entries and "mypy" in entries
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"ruff", "mypy"} <= {re.match(r"[\w-]+", each)[0] for each in extras["dev"]}


def test_the_changelog():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert text.startswith("# Changelog") and "## [Unreleased]" in text
    assert f"## [{taming.__version__}]" in text


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_lists_its_targets():
    help = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    missing = [target for target in targets if f"make {target}" not in help]
    assert set(missing) <= {"help", "FORCE"}
