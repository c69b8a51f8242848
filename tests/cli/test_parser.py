"""The dialect of the commands: spellings, names of 2021, suggestions, and errors of one line."""

import errno
from pathlib import Path
from types import SimpleNamespace

import pytest

from taming.cli.options import one_of, path, size
from taming.cli.parser import Parser, execute, exit_status
from taming.util import number


@pytest.fixture
def parser():
    parser = Parser("Do something.")
    add = parser.add_argument
    add("-r", "--run", type=path)
    add("--num-samples", type=number(int, 1), default=64, help="how many")
    add("--num_layouts", type=int)
    add("--seed", type=int, default=0, help="of the samples")
    add("--size", type=size)
    add("--precision", default="32", **one_of("32", "bf16", "16"))
    add("overrides", nargs="*")
    return parser


@pytest.mark.parametrize("words", [
    ["--num-samples", "3"], ["--num_samples", "3"], ["--num_samples=3"], ["--num-s", "3"], ["--num_s", "3"],
])
def test_spellings_of_an_option(parser, words):
    assert parser.read(words).num_samples == 3


def test_other_options_keep_their_own_spelling_and_values(parser):
    options = parser.read(["--num-layouts", "2", "data.a_b=c-d", "--run=~/a_b-c", "x-y_z"])
    assert options.num_layouts == 2 and options.overrides == ["data.a_b=c-d", "x-y_z"]
    assert options.run == Path.home() / "a_b-c"
    assert parser.read(["--", "--num_x"]).overrides == ["--num_x"]


def test_names_of_2021_are_accepted_and_not_shown(parser):
    assert parser.read(["--resume", "logs/x"]).run == parser.read(["-r", "logs/x"]).run == Path("logs/x")
    assert "--resume" not in parser.format_help() and "--run" in parser.format_help()


def test_help_shows_defaults(parser):
    text = " ".join(parser.format_help().split())
    assert "how many; default: 64" in text and "of the samples; default: 0" in text and "None" not in text


@pytest.mark.parametrize("words, message", [
    (["--num-sample-s", "3"], "unknown option --num-sample-s (did you mean --num-samples?)"),
    (["--resum_", "3"], "unknown option --resum_ (did you mean --resume or --run?)"),
    (["--num", "3"], "unknown option --num (it could be --num-samples or --num_layouts)"),
    (["--xyz", "3"], "unknown option --xyz; --help lists the options"),
    (["--precision", "bf61"], "'bf61' is none of 32, bf16, 16 (did you mean bf16?)"),
    (["--size", "64"], "argument --size: 64: give HEIGHTxWIDTH in pixels, 64x256 for instance"),
    (["--num-samples", "0"], "argument --num-samples: 0 is not a whole number of at least 1"),
    (["-x"], "unrecognized arguments: -x"),
])
def test_what_is_wrong_is_one_line(parser, words, message, capsys):
    with pytest.raises(SystemExit) as caught:
        parser.read(words)
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize("text", ["64x256", "64,256", "64X256", "64 x 256"])
def test_sizes_are_height_and_width(text):
    assert size(text) == (64, 256)


def test_a_command_is_a_module(capsys):
    seen = []
    module = SimpleNamespace(
        __doc__="Add.", run=seen.append, add_arguments=lambda parser: parser.add_argument("--a-b", type=int),
    )
    assert execute(module, ["--a_b", "3"], "taming add", {"part": "x"}) == 0
    assert (seen[0].a_b, seen[0].part) == (3, "x")
    with pytest.raises(SystemExit):
        execute(module, ["--help"], "taming add", {})
    assert "usage: taming add [-h] [--a-b A_B]" in capsys.readouterr().out


def test_a_users_error_is_one_line(tmp_path, capsys):
    def command(error):
        raise error

    full = "No space left on device; make room, then start the command again: what is complete is kept"
    for error, message in (
        (ValueError("no such size"), "no such size"), (FileNotFoundError("no run there"), "no run there"),
        (PermissionError(13, "Permission denied", "a/b.png"), "a/b.png: Permission denied"),
        (OSError(errno.ENOSPC, "No space left on device"), full),
        (OSError(errno.ENOSPC, "No space left on device", "a.png"), f"a.png: {full}"),
        (OSError("the pipe is broken"), "the pipe is broken"), (TimeoutError(), "TimeoutError"),
    ):
        assert exit_status(command, error) == 1
        assert capsys.readouterr().err == f"error: {message}\n"
    assert exit_status(open, tmp_path) == 1
    assert capsys.readouterr().err == f"error: {tmp_path}: Is a directory\n"
    assert exit_status(command, KeyboardInterrupt()) == 130
    with pytest.raises(RuntimeError, match="a fault of ours"):
        exit_status(command, RuntimeError("a fault of ours"))
