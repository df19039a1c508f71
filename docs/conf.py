"""Configuration of the documentation site: ``make docs``. Nothing is fetched, when it is built or when it is read."""

import re
from pathlib import Path
from typing import Any

from anchor_attention import __version__

project = "anchor-attention"
author = "the anchor-attention maintainers"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
add_module_names = False
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"anchor-attention {version}"
html_show_copyright = False
html_copy_source = False
html_static_path = ["static"]
html_css_files = ["pages.css"]
# Pages for users come before internal ones.
html_search_scorer = str(Path(__file__).parent / "search_scorer.js")


def drop_absent_pages(app: Any, docname: str, source: list[str]) -> None:
    """Takes lines like ``wheels*`` out of the contents if no page has such a name: Sphinx would warn."""
    folder = Path(app.srcdir)
    lines = source[0].splitlines()
    source[0] = "\n".join(
        line for line in lines if not re.fullmatch(r"[\w-]+\*", line) or any(folder.glob(f"{line}.md"))
    )


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", drop_absent_pages)
