"""Results: JSON that comes back, tables, and comparisons that are not allowed."""

import json
import math

import pytest

from taming.cli.compare import run as compare
from taming.eval.results import (
    FILE_NAME,
    Result,
    append_result,
    check_comparable,
    is_lower_better,
    latest,
    read_results,
    table,
)

NETWORK = {"name": "EffLite0", "sha256": "a" * 64}


def result(value=1.5, count=100, **sampling):
    return Result(
        {"name": "generation", "count": count, "network": NETWORK}, {"gFD-EffLite0": value, "precision": 0.5},
        {"precision": 0.01}, {"checkpoint": "last.ckpt"}, sampling,
    )


def test_a_result_comes_back(tmp_path):
    first, second = result(), result(2.5, top_k="100")
    for each in (first, second):
        file = append_result(each, tmp_path / "run")
    assert file.name == FILE_NAME and read_results(tmp_path / "run") == [first, second]
    assert len(file.read_text().splitlines()) == 2


def test_numbers_that_are_not_finite_are_null():
    line = result(math.nan).to_json()
    assert json.loads(line)["metrics"]["gFD-EffLite0"] is None
    assert math.isnan(Result.from_json(line).metrics["gFD-EffLite0"])


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "3",
        '{"metrics": {}}',
        '{"protocol": {}, "metrics": 3}',
        '{"protocol": {}, "metrics": {}, "x": {}}',
    ],
)
def test_lines_that_are_no_results_are_named(tmp_path, line):
    (tmp_path / FILE_NAME).write_text(f"{result().to_json()}\n{line}\n")
    with pytest.raises(ValueError, match=f"{FILE_NAME}, line 2"):
        read_results(tmp_path)
    with pytest.raises(ValueError, match="line 2"):
        append_result(result(), tmp_path)


def test_another_protocol_does_not_compare():
    check_comparable({"a": result(), "b": result(3.0, guidance="2")})
    other = result(count=50)
    other.protocol["network"] = NETWORK | {"sha256": "b" * 64}
    with pytest.raises(ValueError, match=r"count: 100 and 50; network.sha256: a{16} and b{16}$"):
        check_comparable({"a": result(), "b": result(), "c": other})


def test_the_last_of_each_way_of_sampling_counts():
    results = [result(1.0), result(2.0, top_k="100"), result(3.0)]
    assert [each.metrics["gFD-EffLite0"] for each in latest(results)] == [3.0, 2.0]


def test_tables_mark_the_best():
    lines = table({"a": result(1.5), "b": result(0.5)}).splitlines()
    assert "0.5 *" in lines[2] and "1.5 *" not in lines[1]
    assert all("0.5 +- 0.01 *" in line for line in lines[1:])
    assert table({"": result()}).splitlines() == ["gFD-EffLite0  1.5", "precision     0.5 +- 0.01"]


@pytest.mark.parametrize(("name", "lower"), [
    ("gFD-EffLite0", True), ("rFID", True), ("sFID", True), ("gsFID", True), ("KID-EffLite0", True),
    ("ST-LPIPS-VGG", True), ("nats per code", True), ("PSNR", False), ("IS", False), ("recall", False),
    ("usage", False), ("rFID from the reference", True), ("bits per dim of the codes", True), ("L1", True),
])
def test_what_is_better(name, lower):
    assert is_lower_better(name) == lower


def options(*runs, protocol=None):
    import argparse

    return argparse.Namespace(runs=list(runs), protocol=protocol)


def test_compare_prints_runs_side_by_side(tmp_path, capsys):
    append_result(result(1.5), tmp_path / "a")
    append_result(result(0.5, top_k="100"), tmp_path / "b")
    compare(options(tmp_path / "a", tmp_path / "b"))
    out = capsys.readouterr().out.splitlines()
    assert out[1] == "generation" and out[3].startswith("a  ") and out[4].startswith("b top_k 100")


def test_compare_needs_a_common_protocol(tmp_path):
    append_result(result(), tmp_path / "a")
    append_result(Result({"name": "likelihood"}, {"nats per code": 4.0}), tmp_path / "b")
    with pytest.raises(ValueError, match="a: generation; .*b: likelihood"):
        compare(options(tmp_path / "a", tmp_path / "b"))
    append_result(result(count=50), tmp_path / "c")
    with pytest.raises(ValueError, match="count: 100 and 50"):
        compare(options(tmp_path / "a", tmp_path / "c"))
