"""What is least certain of the hardware is run first on it: a GPU may be had for minutes."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("first_on_gpu") is None)
