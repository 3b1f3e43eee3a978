"""What pytest itself is told."""

from __future__ import annotations

import gc

import pytest


def pytest_collection_finish() -> None:
    """Tracing makes many objects beside torch's own: to look through all, again and again, takes a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-goldens",
        action="store_true",
        help="write what is emitted now to tests/goldens, instead of comparing with it",
    )
