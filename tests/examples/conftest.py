"""What the tests of an example share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tensors are too small here for more threads to be faster, and a busy machine makes them much slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def shapes() -> Any:
    """All airfoils of the data set, for modules that have put the example on the path."""
    import dataset

    return dataset.load()[0]
