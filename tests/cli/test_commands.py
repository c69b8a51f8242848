"""`taming` itself: the list of commands, unknown ones, completions, and missing packages."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from taming.cli import COMMANDS, main
from taming.cli.completion import parser_of_all
from taming.cli.parser import build_parser

ROOT = Path(__file__).parents[2]


def modules():
    return {name: importlib.import_module(f"taming.cli.{name.replace('-', '_')}") for name in COMMANDS}


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_all_commands_are_listed(words, capsys):
    assert main(words) == 0
    text = capsys.readouterr().out
    assert [name for name in COMMANDS if not re.search(rf"^  {name} +\w", text, re.MULTILINE)] == []


@pytest.mark.parametrize("word, message", [
    ("smaple", "there is no command 'smaple'; did you mean sample?"),
    ("xyz", "there is no command 'xyz'; there are: train, "),
])
def test_unknown_commands(word, message, capsys):
    assert main([word]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "1.0.0\n"


def test_each_command_has_help_in_one_dialect():
    for name, module in modules().items():
        parser = module.build_parser() if hasattr(module, "main") else build_parser(module)
        flags = [flag for action in parser._actions for flag in action.option_strings]
        text = parser.format_help()
        assert module.__doc__ and all(action.help for action in parser._actions), name
        if name != "train":  # which has the names of Lightning's Trainer, with underscores
            assert not [flag for flag in flags if "_" in flag], name
            assert ("-r" in flags) == ("--run" in flags) and ("-o" in flags) == ("--outdir" in flags), name
            assert not re.search(r"\b(pictures?|likeliest|draw|drawn)\b", text), name


def test_a_command_with_underscores(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["extract_depth", "--help"])
    assert caught.value.code == 0 and "usage: taming extract-depth" in capsys.readouterr().out


@pytest.mark.parametrize("shell, command", [("bash", "complete -o bashdefault"), ("zsh", "#compdef taming")])
def test_completions(shell, command, capsys):
    pytest.importorskip("shtab")
    assert main(["--print-completion", shell]) == 0
    text = capsys.readouterr().out
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    assert command in text and "--num-samples" in text and "extract-segmentation" in text


def test_paths_are_completed_as_files():
    parsers = parser_of_all({"bash": "files"})._subparsers._group_actions[0].choices
    found = {
        name: {action.dest for action in parser._actions if getattr(action, "complete", None)}
        for name, parser in parsers.items()
    }
    assert found["sample"] == {"run", "outdir", "grid"} and "base" in found["train"]


def test_without_shtab(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--print-completion", "bash"]) == 1
    assert "pip install shtab" in capsys.readouterr().err


def run(*words, **more):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(words, capture_output=True, text=True, env=environment, **more)


def test_a_list_of_commands_imports_nothing_else():
    code = "import sys; from taming.cli import main; main([]); sys.exit('torch' in sys.modules)"
    assert run(sys.executable, "-c", code, cwd=ROOT).returncode == 0


@pytest.mark.parametrize("file", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.stem)
def test_scripts_say_how_to_enter_the_environment(file, tmp_path):
    """-S and -I: Python without the packages that are installed."""
    done = run(sys.executable, "-S", "-I", str(file), "--help", cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert " has no package " in done.stderr and "activate" in done.stderr


def test_a_fault_of_ours_is_no_missing_package():
    code = "from taming.cli.environment import needs_packages\nwith needs_packages():\n  import taming.no"
    done = run(sys.executable, "-c", code, cwd=ROOT)
    assert "ModuleNotFoundError: No module named 'taming.no'" in done.stderr
