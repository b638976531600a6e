"""``pytest tests/oracle --accept-golden`` writes golden_plans.json anew instead of comparing with it."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accept-golden", action="store_true", default=False, help="accept today's plans as golden")
