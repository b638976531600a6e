"""The documentation says it all: every reason code, option and environment variable; and its links lead somewhere."""

import re
from pathlib import Path

import pytest

from moe_fx import options
from moe_fx.reasons import CODES

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PARTS = ("**Meaning.**", "**Example.**", "**What to do.**")


def sections() -> dict[str, str]:
    """Code → text of its section in docs/troubleshooting.md."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    found = re.split(r"^### `([^`]+)`$", text, flags=re.MULTILINE)
    return dict(zip(found[1::2], found[2::2], strict=True))


@pytest.mark.parametrize("code", sorted(CODES))
def test_every_code_is_explained(code: str) -> None:
    section = sections().get(code)
    assert section is not None, f"docs/troubleshooting.md has no section '### `{code}`'"
    at = [section.find(part) for part in PARTS]
    assert -1 not in at, f"the section of {code} lacks one of {PARTS}"
    assert at == sorted(at)
    for start, end in zip(at, [*at[1:], len(section)], strict=True):
        assert len(section[start:end].split()) > 3, f"the section of {code} has an empty part"


def test_no_section_is_of_a_code_that_is_gone() -> None:
    assert sections().keys() <= CODES.keys()


@pytest.mark.parametrize("name", [*options.names(), *options.ENVIRONMENT])
def test_every_option_is_documented(name: str) -> None:
    text = (ROOT / "docs" / "options.md").read_text()
    assert re.search(rf"^\| `{name}` \|", text, flags=re.MULTILINE), f"docs/options.md has no row for {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"
