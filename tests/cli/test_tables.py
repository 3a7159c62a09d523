"""The documentation's tables are the generated ones."""

from pathlib import Path

import pytest

from gossamer import methods
from gossamer.claims.runner import ledger
from gossamer.cli.tables import claims_page, methods_page


@pytest.mark.parametrize(("name", "made"), [("methods", methods_page), ("claims", claims_page)])
def test_pages_are_up_to_date(name, made):
    page = Path(__file__).parents[2] / "docs" / f"{name}.md"
    assert page.read_text(encoding="utf-8") == made(), "run make docs"


def test_every_method_is_on_the_page():
    assert all(f"`{key}`" in methods_page() for key in methods.keys())


def test_every_record_is_on_the_page():
    page = claims_page()
    assert ledger()
    assert all(record["ours"] in page and record["command"] in page for record in ledger())
