"""The pages of the documentation, and the code blocks in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = (
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted(p for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts),
)

_FENCE = re.compile(r"^```(?P<language>[^\n]*)\n(?P<text>.*?)^```$", flags=re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        file: the page.
        line: of its first line of code.
        language: what follows the fence.
        text: the code.
    """

    file: Path
    line: int
    language: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """The command lines of a block of the shell's, those that go on below made one."""
        return self.text.replace("\\\n", "").splitlines()


def blocks(file: Path, language: str | None = None) -> list[Block]:
    """The fenced blocks of a page, of one language or of all."""
    text = file.read_text(encoding="utf-8")
    found = [
        Block(file, text.count("\n", 0, match.start("text")) + 1, match["language"], match["text"])
        for match in _FENCE.finditer(text)
    ]
    return [block for block in found if language in (None, block.language)]


def name_of(file: Path) -> str:
    """A page's path in the repository, for the names of tests."""
    return file.relative_to(ROOT).as_posix()
