"""Every link between the documents leads somewhere."""

import re
from pathlib import Path

import pytest
from helpers import ROOT

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=[path.stem for path in DOCUMENTS])
def test_links_lead_to_files_and_headings(document: Path) -> None:
    links = [link for link in LINK.findall(document.read_text(encoding="utf-8")) if "://" not in link]
    dead = []
    for link in links:
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert not dead


def test_links_are_found_and_headings_become_anchors() -> None:
    assert LINK.findall("see [a](b.md#c) and [d\ne](f.png)") == ["b.md#c", "f.png"]
    assert {"quickstart", "for-model-owners"} <= anchors(ROOT / "README.md")
    assert {"3-the-dial", "the-setting-recommended"} <= anchors(ROOT / "docs" / "results.md")
