"""What tests of any room may ask for."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from keeptune.lab.folder import write_lab
from keeptune.progress import Silent


def pytest_collection_finish() -> None:
    """Set what was imported apart: each training collects garbage, and half a second went into passing over that."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which the lab stands as files: pre-trained models, tasks with known answers, recipes."""
    folder = tmp_path_factory.mktemp("lab")
    write_lab(folder, progress=Silent())
    return folder


@pytest.fixture(scope="module", autouse=True)
def own_data_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let no test count openings of certify records in the ledger of whoever runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data-home")))
        yield
