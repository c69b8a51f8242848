"""What every test shares: reproducible random numbers, few threads, and no GPU test without a GPU."""

import logging
import os
import random
import signal

import numpy as np
import pytest
import torch

import taming.config

# More than one thread only gets in the way of tensors of this size. A ddp trainer, and every process that
# a test starts, counts the threads anew unless the variable is there.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # it is ignored where tests are started by nohup


@pytest.fixture(autouse=True)
def _reproducible():
    """Give each test the same random numbers, whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _same_environment():
    """Forget what a test wrote to the environment, where a trainer leaves LOCAL_RANK."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _default_allow_list(monkeypatch):
    """Forget what a test allowed configurations to name."""
    monkeypatch.setattr(taming.config, "_allowed", ())


@pytest.fixture(autouse=True)
def _default_log_level():
    """Forget that main() quiets the reading of checkpoints."""
    yield
    logging.getLogger("taming.checkpoint").setLevel(logging.NOTSET)


def pytest_collection_modifyitems(items):
    """Skip tests marked `gpu` where CUDA is absent."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs CUDA, which this machine does not have"))
