"""Every test of this folder that asks for `name` runs once for each family; `--matrix` writes what became of it."""

import pytest
from families import FAMILIES


@pytest.fixture(params=tuple(FAMILIES))
def name(request: pytest.FixtureRequest) -> str:
    """A family."""
    return request.param
