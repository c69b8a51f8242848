"""The list of configurations, and the place of each by its name."""

import pytest

from taming.cli import command
from taming.config import config_names, find_config, load_config

configs = command("configs")


def test_the_list_says_what_each_is_for(capsys):
    assert configs([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(config_names()) > 40
    assert [line for line in lines if len(line.split(maxsplit=1)[1]) < 15] == []
    assert any(line.startswith("demo/vqgan ") and "a small VQGAN" in line for line in lines)
    assert configs(["demo"]) == 0 and len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize("name", ["demo/vqgan", "demo/vqgan.yaml", "configs/demo/vqgan.yaml"])
def test_one_is_printed_and_found_anywhere(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert configs([name]) == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    assert load_config("mine.yaml") == load_config(find_config(name))
    assert find_config("mine") == find_config("mine.yaml") and find_config(tmp_path / "mine").is_file()


def test_those_here_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = find_config("custom_vqgan")
    (tmp_path / "configs").mkdir()
    for name in ("custom_vqgan", "own"):
        (tmp_path / "configs" / f"{name}.yaml").write_text("a: 1")
    assert load_config(find_config("custom_vqgan")) == load_config(find_config("own")) == {"a": 1}
    assert shipped.is_file() and "own" in config_names()


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.yaml").write_text("a: 1")
    assert find_config("~/own.yaml") == tmp_path / "own.yaml"


def test_what_is_near_is_named(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match=r"demo/vqgn does not exist \(did you mean demo/vqgan"):
        find_config("demo/vqgn")
    with pytest.raises(FileNotFoundError, match="is a folder, not a YAML file"):
        find_config(tmp_path)
    assert configs(["demo/vqgn"]) == 1
    assert "no configuration is called demo/vqgn (did you mean demo/vqgan?)" in capsys.readouterr().err
