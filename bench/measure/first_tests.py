"""A plugin of pytest that collects all tests and runs the first of each file, for a rehearsal."""

from __future__ import annotations

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps the first test of each file, after markers have left out what they leave out."""
    first = {item.path: item for item in reversed(items)}
    config.hook.pytest_deselected(items=[item for item in items if first[item.path] is not item])
    items[:] = [item for item in items if first[item.path] is item]
