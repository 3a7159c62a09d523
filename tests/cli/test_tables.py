"""The documentation's table of methods is the generated one."""

from pathlib import Path

from gossamer import methods
from gossamer.cli.tables import methods_page


def test_methods_page_is_up_to_date():
    page = Path(__file__).parents[2] / "docs" / "methods.md"
    assert page.read_text(encoding="utf-8") == methods_page(), "run make docs"


def test_every_method_is_on_the_page():
    assert all(f"`{key}`" in methods_page() for key in methods.keys())
