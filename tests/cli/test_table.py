"""Tables: every shipped one reads, and a small one is evaluated as its file says."""

import pytest

from taming.cli import main as taming
from taming.cli import table
from taming.eval.results import read_results
from tests.tiny import train, write_transformer, write_vqgan

SHIPPED = ["semantic_synthesis", "faces", "class_conditional", "reconstruction"]


@pytest.fixture
def any_run(monkeypatch):
    monkeypatch.setattr(table, "find_run", lambda path: path)


@pytest.mark.parametrize("name", [*SHIPPED, *(f"landscapes_{each}" for each in (
    "semantic_synthesis", "unconditional", "class_conditional", "reconstruction"))])
def test_shipped_tables_read(name, any_run):
    found = table.read_table(f"tables/{name}", ["num_images=7"])
    assert found["title"]
    for row, options in found["rows"].items():
        read, published = table.row_options(row, dict(options))
        assert read.num_images == 7 and str(read.target).startswith("logs/*_")
        assert all(isinstance(value, float) for value in published.values())


def test_decoding_of_table_4(any_run):
    rows = table.read_table("tables/class_conditional", [])["rows"]
    read = [table.row_options(name, dict(row)) for name, row in rows.items()]
    assert [(each.top_k, each.top_p, each.acceptance_rate) for each, _ in read] == [
        (973, None, 1.0), (250, None, 1.0), (973, 0.88, 1.0), (600, None, 0.05),
    ]
    assert [published.get("FID") for _, published in read] == [None, 15.98, 15.78, 5.20]


def write(tmp_path, text):
    path = tmp_path / "table.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(("text", "message"), [
    ("title: x", "it needs rows"), ("rows: {}", "it needs rows"), ("rows: {a: }\nrow: 3", "it needs rows"),
    ("rows: {a: }", "the row a names no run"), ("rows: {a: {run: nowhere}}", "no checkpoint at nowhere"),
])
def test_what_is_no_table(tmp_path, capsys, text, message):
    assert taming(["table", write(tmp_path, text)]) == 1
    assert message in capsys.readouterr().err


def test_options_that_do_not_exist(tmp_path, capsys, any_run):
    with pytest.raises(SystemExit):
        taming(["table", write(tmp_path, "rows: {a: {run: x, top_kk: 3}}")])
    assert "unknown option --top-kk" in capsys.readouterr().err
    assert taming(["table", write(tmp_path, "rows: {a: {run: x}}"), "top_k"]) == 1
    assert "top_k: give OPTION=value" in capsys.readouterr().err


def test_a_table_of_two_rows(tmp_path, capsys):
    vqgan = train(write_vqgan(tmp_path), tmp_path / "logs", "vqgan", "--max_steps", 1)
    run = train(write_transformer(tmp_path, vqgan), tmp_path / "logs", "transformer", "--max_steps", 1)
    file = write(tmp_path, (
        f"title: Two rows\nsource: nobody 2021\noptions: {{run: '{tmp_path}/logs/*_transformer', top_k: 2}}\n"
        "rows:\n  samples: {protocol: generation, top_k: 3, published: {FID: 7.5}}\n"
        "  likelihood: {protocol: likelihood}\n"
    ))
    assert taming(["table", file, "num_images=4", "device=cpu", "-o", str(tmp_path / "table.md")]) == 0
    generation, likelihood = read_results(run)
    assert generation.sampling == {"top_k": "3", "seed": "0"} and likelihood.protocol["name"] == "likelihood"
    text = (tmp_path / "table.md").read_text()
    assert text in capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0] == "**Two rows** (nobody 2021)"
    assert lines[4].startswith(f"| samples | {generation.metrics['gFD-EffLite0']:.4g} |")
    assert lines[4].endswith("| 7.5 |")
    assert f"| {likelihood.metrics['nats per code']:.4g} |" in lines[5] and lines[5].endswith("| - |")
    assert lines[-1].startswith("4 images; efflite0 (579344248a93")
