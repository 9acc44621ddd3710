"""What several test files share: the folder of real models and texts, and where the repository is."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

# Examples are the same in every run; the first one of a kernel includes its compilation, so no example has a deadline.
hypothesis.settings.register_profile("termwise", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("termwise")

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("TERMWISE_SHARED", REPOSITORY.parent / "shared"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that need real models where these are absent, and say so."""
    if (SHARED / "models").is_dir():
        return
    reason = f"no real models in {SHARED} (set TERMWISE_SHARED to a folder with models/ and text/)"
    for item in items:
        if item.get_closest_marker("shared"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def shared() -> Path:
    """The folder with real models (``models/``) and texts (``text/``); use it with the mark ``shared``."""
    return SHARED
