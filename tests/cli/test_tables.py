"""The documentation's tables are the generated ones."""

from pathlib import Path

import pytest

from gossamer import methods
from gossamer.claims.runner import ledger
from gossamer.cli.tables import claims_page, main, methods_page


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


def test_it_says_how_it_is_called_and_writes_both_pages(capsys, tmp_path):
    assert main(["--help"]) == 0
    assert "usage: python -m gossamer.cli.tables FOLDER" in capsys.readouterr().out
    for words in ([], [str(tmp_path / "nowhere")], ["a", "b"]):
        assert main(words) == 2
        assert "usage:" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 0
    assert {page.name for page in tmp_path.iterdir()} == {"methods.md", "claims.md"}
