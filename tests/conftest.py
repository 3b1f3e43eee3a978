"""What pytest itself is told."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-goldens",
        action="store_true",
        help="write what is emitted now to tests/goldens, instead of comparing with it",
    )
