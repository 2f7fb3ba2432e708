"""The documentation's Python runs, its links resolve, the site needs no other host."""

import re
from pathlib import Path

import pytest
from support.pages import prelude, run_blocks

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SITE = ROOT / "out" / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
WITH_CODE = [page for page in PAGES if "```python" in page.read_text()]


# dynamo's own
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_page_runs(page: Path, tmp_path: Path) -> None:
    assert run_blocks(page, {**prelude(), "out": tmp_path}) > 0


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_linked_files_exist(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_site_needs_no_other_host() -> None:
    if not SITE.is_dir():
        pytest.skip("the site is not built (make docs)")
    loaded = re.compile(
        r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"'](?:https?:)?//"
        r"|<link\b[^>]*\brel=[\"'](?:stylesheet|preload|icon)[\"'][^>]*\bhref=[\"'](?:https?:)?//"
        r"|@import[^;]*//|url\([\"']?(?:https?:)?//"
    )
    pages = [*SITE.rglob("*.html"), *SITE.rglob("*.css")]
    assert len(pages) > len(PAGES)
    found = {str(page.relative_to(SITE)) for page in pages if loaded.search(page.read_text())}
    assert found == set()
