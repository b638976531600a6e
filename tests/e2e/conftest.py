"""Every test starts and ends without compiled code, reports and packed weights."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch._dynamo.utils import counters

from .helpers import fresh


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    fresh()
    counters.clear()
    yield
    fresh()
