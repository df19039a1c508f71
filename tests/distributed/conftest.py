"""Processes that the tests of this folder share: starting them takes longer than most tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.processes import Processes, processes


@pytest.fixture(scope="session")
def four() -> Iterator[Processes]:
    with processes(4) as pool:
        yield pool
