"""`import taming`: its names, which are imported when they are used."""

import subprocess
import sys

import pytest

import taming


def test_every_name_is_there_and_listed():
    assert {name for name in taming.__all__ if getattr(taming, name, None) is None} == set()
    assert set(taming.__all__) == set(taming._MODULES) and set(taming.__all__) <= set(dir(taming))
    from taming.models.vqgan import VQModel

    assert taming.VQModel is VQModel


def test_what_is_not_there():
    with pytest.raises(AttributeError, match="module 'taming' has no attribute 'VQmodel'"):
        _ = taming.VQmodel


def test_nothing_is_imported_before_it_is_used():
    code = "import sys, taming; assert not {'torch', 'omegaconf', 'taming.config'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
