"""The whole of `make demo`, with two batches of training for each stage."""


import pytest
from PIL import Image

from scripts.demo import main
from taming.cli import demo
from tests.tiny import trouble

FEW = [
    "lightning.trainer.max_steps=2", "data.params.batch_size=2",
    "data.params.train.params.length=4", "data.params.validation.params.length=4",
]


@pytest.mark.slow
def test_both_stages_and_all_pictures(tmp_path, capsys):
    assert main(["-o", str(tmp_path), *FEW]) == 0
    said = capsys.readouterr().out
    assert "nats per code on unseen scenes" in said and str(tmp_path / "samples.png") in said
    sizes = {"samples.png": (530, 530), "panorama.png": (256, 64), "completions.png": (530, 134)}
    assert {name: Image.open(tmp_path / name).size for name in sizes} == sizes
    assert len(list((tmp_path / "samples").glob("*.png"))) == 64
    notes = Image.open(tmp_path / "panorama.png").info
    assert (notes["segmentation"], notes["guidance"], notes["label"]) == ("panorama.png", "2.5", "13")
    assert main(["-o", str(tmp_path), *FEW]) == 0
    assert capsys.readouterr().out.count("is trained already") == 2
    assert len(list(tmp_path.glob("*_demo_vqgan"))) == 1


@pytest.mark.parametrize("by_make", [True, False])
def test_ctrl_c_says_how_the_demo_goes_on(tmp_path, capsys, monkeypatch, by_make):
    monkeypatch.delenv("MAKELEVEL", raising=False)
    if by_make:
        monkeypatch.setenv("MAKELEVEL", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with pytest.raises(SystemExit, match="130"):
        demo.main(["-o", str(tmp_path), *FEW, *trouble(kind="SIGINT", at=2)])
    again = "make demo" if by_make else f"taming demo -o {tmp_path}"
    assert f"stopped after 1 batches; resume with\n  {again}\n" in capsys.readouterr().out
