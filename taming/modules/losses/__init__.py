"""Losses of the first stage. `DummyLoss` is found here too: configs of 2021 name it so."""

from taming.modules.losses.vqperceptual import DummyLoss

__all__ = ["DummyLoss"]
