import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gossamer.core import GossamerError
from gossamer.report import build, render

HOSTILE = "<script>alert('x')</script>&\"long\"" + "name_" * 40
ROLES = ("attention.q", "mlp.down")
META: dict[str, Any] = {
    "model": "nano",
    "parameters": 6_612_480,
    "data": "the packaged held-out text",
    "context": 512,
    "tokens": 16_352,
    "commands": ["gossamer compare nano --methods wanda,teal --sparsity 0.3,0.5"],
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    "device": "a processor",
    "threads": 2,
    "commit": "a81bc81de0f1",
    "started": "2026-01-20T10:11:12+00:00",
    "seconds": 262.3,
    "seed": 0,
}
CLAIMS: list[dict[str, Any]] = [
    {"method": "wanda", "verdict": "holds", "sentence": "Wanda beats magnitude.",
     "paper": "7.26 against 17.29", "ours": "29.5 against 31.9", "seeds": [0, 1, 2],
     "device": "a processor", "commit": "a81bc81de0f1", "tier": "smoke", "date": "2026-01-20"},
    {"method": "window", "verdict": "not testable here", "sentence": "Stable over 4M tokens."},
    {"method": "teal", "verdict": "fails", "sentence": HOSTILE},
]  # fmt: skip


def row(method: str, sparsity: float, perplexity: float | None, **more: Any) -> dict[str, Any]:
    base = {
        "method": method, "family": "weights", "sparsity": sparsity,
        "achieved_sparsity": sparsity, "pattern": "row", "perplexity": perplexity, "kl": 0.1,
        "agreement": 0.8, "bytes_stored": 14e6, "bytes_moved": 12.9e6, "bytes_moved_limit": 9e6,
        "tokens_per_second": None, "simulated": True, "seconds": 3.0, "seed": 0,
    }  # fmt: skip
    return {**base, **more}


def layers(low: float, high: float) -> list[dict[str, Any]]:
    cells = [(block, role) for block in range(4) for role in ROLES]
    return [
        {"name": f"layers.{b}.{r}", "role": r, "block": b, "sparsity": low if b else high}
        for b, r in cells
    ]


def results() -> list[dict[str, Any]]:
    return [
        row(
            "dense", 0.0, 7.12, family=None, pattern=None, simulated=False, tokens_per_second=184.0
        ),
        row("random", 0.3, 260.0),
        row("random", 0.5, 7e6),
        row("wanda", 0.3, 7.95, layers=layers(0.3, 0.3)),
        row("wanda", 0.5, 29.5),
        row("wanda", 0.5, 78.5, pattern="2:4"),
        row("magnitude:allocation=erk", 0.5, 36.0, layers=layers(0.4, 0.8)),
        row("magnitude", 0.7, None),
        row("teal", 0.25, 7.5, family="activations", pattern=None),
        row("broken", 0.5, nan, note=HOSTILE),
        row("endless", 0.5, inf),
        row(HOSTILE, 0.5, 44.0),
        row(
            "kernel",
            0.5,
            30.0,
            simulated=False,
            tokens_per_second=240.0,
            dense_tokens_per_second=184.0,
        ),
    ]


class Checker(HTMLParser):
    """Fails on elements that are closed in the wrong order or not at all."""

    VOID = frozenset({"meta", "link", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parse(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    return checker


@pytest.fixture(scope="module")
def page() -> str:
    return render(results(), CLAIMS, META)


def test_well_formed_and_self_contained(page: str):
    checker = parse(page)
    assert page.startswith("<!doctype html>")
    assert re.findall(r"https?://|//[a-z]+\.[a-z]", page) == []
    assert "@import" not in page
    assert "url(" not in page.replace("url(#clip-", "")
    for tag, attributes in checker.tags:
        assert tag not in {"iframe", "img", "object", "embed"}
        assert not str(attributes.get("src", ""))
        assert attributes.get("href") in (None, "data:,")
    ids = [a["id"] for _, a in checker.tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_every_row_is_in_both_tables(page: str):
    bodies = re.findall(r"<tbody>(.*?)</tbody>", page, re.S)
    assert [body.count("<tr") for body in bodies] == [13, 13, 3]
    for name in ("dense", "random", "wanda", "allocation=erk", "teal", "broken", "kernel"):
        assert name in bodies[0]
        assert name in bodies[1]


def test_names_and_notes_are_escaped(page: str):
    assert "alert('x')" not in page.replace("&#39;", "")
    assert page.count("<script>") == 1
    text = "".join(parse(page).text)
    assert HOSTILE in text


def test_what_must_be_seen(page: str):
    text = re.sub(r"\s+", " ", "".join(parse(page).text).replace("\u202f", " "))
    assert "With 50 % of weights removed, wanda is best" in text
    assert text.count("simulated: no speed") > 10
    assert "not finite" in text
    assert "7.0 × 10⁶" in text
    assert "29.5 against 31.9" in text
    assert "seeds 0, 1, 2" in text
    assert "$ gossamer compare nano" in text
    for fact in ("a81bc81de0f1", "a processor", "torch 2.13.0", "4 min 22 s"):
        assert fact in text
    assert "wanda removes the same share from every layer" in text


def test_markers_and_tooltips(page: str):
    weights = re.search(r'<svg viewBox="0 0 1040 400".*?</svg>', page, re.S)
    assert weights is not None
    drawing = weights.group(0)
    # Rows of weights: all but dense and teal. Three hold no number, two lie above the axis.
    assert drawing.count('<g class="point') == 11
    assert drawing.count('class="cross"') == 3
    assert drawing.count("l-5-9z") == 2
    assert "perplexity 78.50" in drawing
    places = re.findall(r' (?:cx|cy|x|y|x1|x2|y1|y2)="([^"]*)"', drawing)
    assert all(-1 <= float(place) <= 1041 for place in places)
    assert "nan" not in " ".join(re.findall(r' d="([^"]*)"', drawing))


def test_the_speed_plot_holds_only_measured_rows(page: str):
    section = page[page.index('id="speed"') : page.index('id="numbers"')]
    drawing = re.search(r"<svg.*?</svg>", section, re.S)
    assert drawing is not None
    assert drawing.group(0).count('<g class="point') == 2
    assert "11 of 13 rows are" in section


def test_per_layer_maps(page: str):
    section = page[page.index('id="layers"') : page.index('id="claims"')]
    assert section.count('class="heat"') == 5 + 8  # the key, and four blocks of two matrices
    assert "layers.0.mlp.down" in section


@pytest.mark.parametrize("count", [0, 1, 2, 60])
def test_few_and_many_rows(count: int):
    rows = [row("dense", 0, 7.0, simulated=False)] * (count > 0)
    rows += [row(f"m{i // 3}", (0.3, 0.5, 0.7)[i % 3], 8.0 + i) for i in range(count - 1)]
    page = render(rows, [], {})
    parse(page)
    assert page.count('<th scope="row"') == 2 * count
    assert "No claim has been run yet" in page


def test_only_simulated_rows_are_explained():
    dense = row("dense", 0, 7.0, simulated=False, tokens_per_second=50.0)
    page = render([dense, row("a", 0.5, 9)], [], META)
    section = page[page.index('id="speed"') : page.index('id="numbers"')]
    assert "<svg" not in section
    assert "Every row but dense is" in section
    assert "which leaves dense at 50.0 tokens/s" in section


@pytest.mark.parametrize(
    ("model", "title"),
    [("nano", "nano"), ("/a/b/ref-20m/", "ref-20m"), ("./ref", "ref"), ("org/model", "org/model")],
)
def test_a_folder_is_titled_by_its_name(model: str, title: str):
    page = render(results(), [], {"model": model})
    assert f"<h1>{title}</h1>" in page
    assert f"<dd>{model}</dd>" in page


def test_a_dense_row_that_is_broken_or_missing():
    parse(render([row("dense", 0, None, simulated=False), row("a", 0.5, 9.0)], [], META))
    parse(render([row("a", 0.5, 9.0), row("b", 0.5, None)], [], META))


def test_writes_atomically_and_names_the_file(tmp_path: Path):
    assert build(results(), CLAIMS, META, tmp_path / "report") == tmp_path / "report" / "index.html"
    path = build(results(), CLAIMS, META, tmp_path / "page.html")
    assert path.read_text(encoding="utf-8") == render(results(), CLAIMS, META)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.html", "report"]


def test_a_place_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(GossamerError, match="cannot write to"):
        build(results(), [], META, tmp_path / "file" / "index.html")
    (tmp_path / "taken.html").mkdir()
    with pytest.raises(GossamerError, match="cannot write"):
        build(results(), [], META, tmp_path / "taken.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "taken.html"]


CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


def browse(profile: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run headless Chromium offline with a profile of its own."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--disable-gpu", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
        "--enable-logging=stderr", f"--user-data-dir={profile}",
    ]  # fmt: skip
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--no-sandbox")
    return subprocess.run(
        [*command, *words], capture_output=True, text=True, timeout=90, check=True
    )


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_shows_it(tmp_path: Path):
    path = build(results(), CLAIMS, META, tmp_path / "index.html")
    done = browse(tmp_path / "a", "--dump-dom", path.as_uri())
    assert "CONSOLE" not in done.stderr
    # The script ran: every head of a sortable table became a button.
    assert done.stdout.count('<button type="button">') == 8 + 7
    shot = tmp_path / "shot.png"
    for theme in (0, 1):
        browse(
            tmp_path / f"b{theme}", f"--blink-settings=preferredColorScheme={theme}",
            "--window-size=1280,2600", f"--screenshot={shot}", path.as_uri(),
        )  # fmt: skip
        with Image.open(shot) as picture:
            pixels = picture.convert("RGB").resize((320, 650))
            colours = {pixels.getpixel((x, y)) for x in range(320) for y in range(650)}
            back = sum(pixels.getpixel((2, 2))) / 3
        assert len(colours) > 500
        assert back < 60 if theme == 0 else back > 200


def test_weight_reads_are_plotted_and_listed_by_the_bytes_read():
    more = {"family": "activations", "unit": "weight reads", "pattern": None, "bytes_blocks": 10e6}
    dense = row("dense", 0.0, 7.0, family=None, pattern=None, bytes_moved=12e6)
    rows = [
        dense,
        row("cett", 0.5, 7.1, bytes_moved=12e6, bytes_moved_limit=10.79e6, **more),
        row("teal", 0.5, 7.9, bytes_moved=12e6, bytes_moved_limit=7.05e6, **more),
    ]
    page = render(rows, [], META)
    text = " ".join(parse(page).text).replace("\u202f", " ")
    assert "87.9 % of bytes read" in text
    assert "50.5 % of bytes read" in text
    assert "share of block weight bytes unread" in text
    assert "share of weight reads removed" not in text
    assert 'best-mark">best<' not in page


def test_a_speed_stands_beside_its_gain_over_the_dense_model_of_its_moment():
    timed = {"simulated": False, "tokens_per_second": 240.0, "dense_tokens_per_second": 230.0}
    rows = [
        row("dense", 0.0, 7.0, family=None, simulated=False, tokens_per_second=120.0),
        row("kernel", 0.5, 8.0, **timed),
    ]
    page = render(rows, [], META)
    assert page.count("<br><small>1.04× dense beside it</small>") == 2
    assert "240 tokens/s, 1.04× dense" in page
    assert "2.00×" not in page
