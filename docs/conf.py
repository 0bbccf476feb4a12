"""Configuration of the documentation site; CONTRIBUTING.md has the command that builds it."""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path
from typing import Any

from docutils import nodes

import fsa

project = "fsa-kernels"
author = "The fsa-kernels authors"
project_copyright = "2026, The fsa-kernels authors"
version = release = fsa.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser", "sphinx_copybutton"]
exclude_patterns = ["_build"]

# Docstrings name objects and arguments in single backquotes; those that are objects become links.
default_role = "py:obj"
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

myst_heading_anchors = 3

html_theme = "furo"
html_title = f"fsa-kernels {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False


_DOCS = Path(__file__).parent
_ROOT = _DOCS.parent
# Pages of the site that lie elsewhere in the repository; what is here says where.
_ELSEWHERE = {
    "contributing": _ROOT / "CONTRIBUTING.md",
    "changelog": _ROOT / "CHANGELOG.md",
    "results": _ROOT / "bench" / "RESULTS.md",
    "log": _ROOT / "bench" / "LOG.md",
    "model-card": _ROOT / "fsa" / "tiny" / "weights" / "MODEL_CARD.md",
}
_LINK = re.compile(r"\[(?P<text>[^][]*)\]\((?!https?:|#)(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


def _read(app: Any, page: str, source: list[str]) -> None:
    """Takes a page from where it lies, and lets links to such pages stay within the site."""
    file = _ELSEWHERE.get(page)
    if file is None:
        folder = (_DOCS / page).parent
    else:
        folder = file.parent
        source[0] = file.read_text(encoding="utf-8")
        app.env.note_dependency(str(file))
    pages = {path: _DOCS / f"{name}.md" for name, path in _ELSEWHERE.items()}

    def relinked(match: re.Match[str]) -> str:
        target = (folder / match["path"]).resolve()
        if target.is_dir():
            # The site has pages and files, but no listings of folders.
            return match["text"]
        path = os.path.relpath(pages.get(target, target), (_DOCS / page).parent)
        return f"[{match['text']}]({path}{match['anchor'] or ''})"

    source[0] = _LINK.sub(relinked, source[0])


def _keep_as_text(app: Any, env: Any, node: Any, content: nodes.Node) -> nodes.Node | None:
    """Leaves names that are no links as text, but lets a name of ours that does not exist fail.

    Nothing is looked up in other projects' inventories, which would take a network.
    """
    if _is_ours(node["reftarget"]) and not _exists(node["reftarget"]):
        return None
    return content


def _is_ours(target: str) -> bool:
    package = target.partition(".")[0]
    return package in ("fsa", "fsa_kernels") and target.replace(".", "").isidentifier()


def _exists(target: str) -> bool:
    """Whether a dotted name is a module, or a member of one."""
    words = target.split(".")
    for count in range(len(words), 0, -1):
        try:
            found = importlib.import_module(".".join(words[:count]))
        except ModuleNotFoundError:
            continue
        for word in words[count:]:
            fields = getattr(found, "__annotations__", {})
            if not hasattr(found, word) and word not in fields:
                return False
            found = getattr(found, word, None)
        return True
    return False


def setup(app: Any) -> None:
    """Connects the handlers."""
    app.connect("source-read", _read)
    app.connect("missing-reference", _keep_as_text)
