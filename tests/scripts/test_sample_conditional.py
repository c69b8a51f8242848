"""The command of the web page: its arguments, those of 2021 among them, and its errors."""

import sys

import pytest

import taming.config
from taming.cli import command, page
from taming.cli.parser import build_parser
from tests.web.tiny_runs import export

main = command("page")


def parse(words):
    return build_parser(page).read(words)


OTHER = (
    "data={target: main.DataModuleFromConfig, params: {batch_size: 1, validation: {target: "
    "taming.data.landscapes.Landscapes, params: {size: 32, length: 2}}}}"
)


@pytest.fixture
def served(monkeypatch):
    """What would be served, instead of serving it."""
    found = {}

    def launch(session, **options):
        found.update(options, session=session, items=len(session.load(session.runs()[0].name).dataset or ()))
        assert session.outdir.parent.exists()

    monkeypatch.setattr("taming.cli.page.launch", launch)
    return found


def test_by_default_it_is_open_to_this_machine_alone():
    options = parse([])
    assert (options.host, options.port) == ("127.0.0.1", None)
    assert (options.max_upload, options.max_pixels) == (20, 4_000_000)
    assert options.run is None and options.overrides == []


def test_the_arguments_of_2021(tmp_path, served):
    pytest.importorskip("gradio")
    run = export(tmp_path / "run", "class_label")
    assert main(["-r", str(run), "--device", "cpu"]) == 0 and served["items"] == 6
    assert served["host"] == "127.0.0.1" and not served["session"].outdir.exists()
    assert main(["-r", str(run), "--device", "cpu", "data.params.validation.params.length=3"]) == 0
    assert served["items"] == 3
    words = ["-r", str(run), "--device", "cpu", "--ignore_base_data"]
    assert main([*words, OTHER]) == 0 and served["items"] == 2
    assert main(words) == 0 and served["items"] == 0
    assert "no section `data`" in served["session"].load("run").no_data


def test_several_places_and_a_folder_that_keeps_images(tmp_path, served):
    pytest.importorskip("gradio")
    for name in ("a", "b"):
        export(tmp_path / name / "run", "coord")
    out = tmp_path / "kept"
    words = ["-r", str(tmp_path / "a"), "-r", str(tmp_path / "b"), "-o", str(out), "--precision", "bf16"]
    assert main([*words, "--host", "0.0.0.0", "--port", "9", "--device", "cpu"]) == 0
    assert len(served["session"].runs()) == 2 and served["session"].keep == out
    assert (served["host"], served["port"]) == ("0.0.0.0", 9)
    (loaded,) = served["session"]._models.values()
    assert str(next(loaded.model.transformer.parameters()).dtype) == "torch.bfloat16"


@pytest.mark.parametrize("words, message", [
    (["-r", "nowhere"], "error: nowhere does not exist"),
    (["-r", "."], "error: there is no run of a transformer in ."),
    (["--max-upload", "0"], "error: --max-upload and --max-pixels must be above 0"),
])
def test_errors_are_one_line(words, message, tmp_path, monkeypatch, capsys):
    pytest.importorskip("gradio")
    monkeypatch.chdir(tmp_path)
    assert main(words) == 1
    assert capsys.readouterr().err.startswith(message)


def test_only_data_can_be_set(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(["-r", str(tmp_path), "model.params.cond_stage_key=depth"])
    assert "model.params.cond_stage_key=depth would change nothing" in capsys.readouterr().err


def test_a_package_is_allowed_and_a_file_is_no_folder(tmp_path, served, capsys):
    pytest.importorskip("gradio")
    run, file = export(tmp_path / "run", "coord"), tmp_path / "file"
    words = ["-r", str(run), "--device", "cpu"]
    assert main([*words, "--allow", "package_of_mine"]) == 0
    assert "package_of_mine" in taming.config._allowed
    file.touch()
    assert main([*words, "-o", str(file)]) == 1
    assert f"error: --outdir {file}: {file} is a file" in capsys.readouterr().err


def test_without_gradio(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match=r"pip install 'taming\[demo\]'"):
        page.run(parse(["-r", str(tmp_path)]))
