"""Makes the repository importable wherever pytest starts, and keeps torch to one thread so that
the suite is quick on a shared machine."""

import logging
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

torch.set_num_threads(1)
# Machines differ in speed, so no example has a deadline; no database, so nothing is left behind.
settings.register_profile("klora", deadline=None, database=None, max_examples=60)
settings.load_profile("klora")


@pytest.fixture
def log(caplog):
    """The extension's log does not propagate: the hosts print it through its own handler."""
    logger = logging.getLogger("lib_klora")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
