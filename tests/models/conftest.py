"""Fixtures of the tests of single models."""

import pytest
from support import REAL_DATA


@pytest.fixture(scope="session")
def ants_bees(tmp_path_factory):
    """Links to every third photograph of ../shared/data/ants_bees: 83 for training, 52 for validation, 1 other file."""
    root = tmp_path_factory.mktemp("ants_bees")
    for folder in sorted((REAL_DATA / "ants_bees").glob("*/*")):
        target = root / folder.parent.name / folder.name
        target.mkdir(parents=True)
        files = sorted(folder.iterdir())
        for path in [*files[::3], *(path for path in files if path.suffix != ".jpg")]:
            if not (target / path.name).exists():
                (target / path.name).symlink_to(path)
    return root
