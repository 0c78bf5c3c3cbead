"""What `steered` makes, as fixtures; the names of the fixtures are those of its functions."""

from __future__ import annotations

import pytest
import steered

__all__ = ["asked", "host", "plain", "refuse"]


@pytest.fixture(scope="module")
def host():
    return steered.host()


@pytest.fixture(scope="module")
def asked():
    return steered.asked()


@pytest.fixture(scope="module")
def refuse():
    return steered.refuse()


@pytest.fixture(scope="module")
def plain():
    return steered.plain()
