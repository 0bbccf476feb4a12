"""The README's Python runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
# One block names weights that have to be fetched.
OFFLINE = [block for block in BLOCKS if 'pretrained="openai"' not in block]


@pytest.mark.parametrize("block", OFFLINE, ids=range(len(OFFLINE)))
def test_a_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fsa").symlink_to(ROOT / "fsa")
    scope: dict = {}
    exec(block, scope)
    if "save(" in block:
        assert (tmp_path / "fsa-out" / "scene-5-overlay.png").exists()
    if "features" in scope:
        assert scope["features"].shape == (1, 70, 512)
    if "adapted" in scope:
        assert scope["adapted"].shape == (1, 12, 196, 64)


def test_only_the_block_of_downloads_is_left_out():
    assert len(BLOCKS) == len(OFFLINE) + 1 == 5
