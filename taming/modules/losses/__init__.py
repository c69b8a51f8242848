"""Losses of the first stage; configs of 2021 name `taming.modules.losses.DummyLoss`."""

from taming.modules.losses.vqperceptual import DummyLoss

__all__ = ["DummyLoss"]
