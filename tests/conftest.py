"""What tests of any room may ask for."""

from __future__ import annotations

from pathlib import Path

import pytest

from keeptune.lab.folder import write_lab
from keeptune.progress import Silent


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which the lab stands as files: pre-trained models, tasks with known answers, recipes."""
    folder = tmp_path_factory.mktemp("lab")
    write_lab(folder, progress=Silent())
    return folder
