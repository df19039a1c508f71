"""The documentation: its examples run, its links lead somewhere, no public name is missing, and the site builds."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import sphinx

import anchor_attention
from anchor_attention import distributed, streaming

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.S)


def run_examples(path: Path) -> None:
    """Runs the Python examples of a page, in order, in one namespace."""
    namespace: dict[str, object] = {"__name__": "examples"}
    for block in python_blocks(path.read_text()):
        exec(compile(block, str(path), "exec"), namespace)


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks((DOCS / page).read_text())])
def test_examples_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_examples(DOCS / page)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", (DOCS / page).read_text()):
        assert link.startswith("http") or (DOCS / link).exists(), f"{page} links to {link}"


def test_every_page_is_in_the_contents() -> None:
    contents = re.findall(r"```{toctree}\n(.*?)```", (DOCS / "index.md").read_text(), flags=re.S)
    patterns = [line for block in contents for line in block.splitlines() if line and not line.startswith(":")]
    for page in PAGES:
        assert page == "index.md" or any(
            Path(page).stem == Path(p).stem or Path(page).match(f"{p}.md") for p in patterns
        )


def test_search_ranks_the_internals_last() -> None:
    contents = re.search(r":caption: Internals\n\n(.*?)```", (DOCS / "index.md").read_text(), flags=re.S).group(1)
    internals = {path.stem for line in contents.split() for path in DOCS.glob(f"{line}.md")}
    scorer = (DOCS / "search_scorer.js").read_text()
    assert set(re.search(r"internals = /\^\((.*)\)\$/", scorer).group(1).split("|")) == internals
    # Where Sphinx keeps the score in a result, and that it calls the scorer with one.
    search = Path(sphinx.__file__).parent / "themes" / "basic" / "static" / "searchtools.js"
    assert "(item[4] = Scorer.score(item))" in search.read_text() and "score = result[4]" in scorer


def test_every_public_name_is_in_the_reference() -> None:
    reference = (DOCS / "api.md").read_text()
    names = [f"anchor_attention.{name}" for name in anchor_attention.__all__]
    names += [f"anchor_attention.streaming.{name}" for name in streaming.__all__]
    names += [f"anchor_attention.distributed.{name}" for name in distributed.__all__]
    missing = [name for name in names if not re.search(rf"{re.escape(name)}\b", reference)]
    assert not missing


def test_dir_lists_the_public_names_and_nothing_else() -> None:
    assert dir(anchor_attention) == sorted(anchor_attention.__all__)
    assert all(hasattr(anchor_attention, name) for name in dir(anchor_attention))


def test_site_builds_without_a_warning_and_fetches_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(DOCS), str(tmp_path)]
    subprocess.run(command, check=True, timeout=300)
    for page in tmp_path.rglob("*.html"):
        fetched = re.findall(
            r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"((?:https?:)?//[^\"]+)", page.read_text()
        )
        assert not fetched, f"{page.name} fetches {fetched}"
    for sheet in tmp_path.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*['\"]?(?:https?:)?//", sheet.read_text()), sheet.name
