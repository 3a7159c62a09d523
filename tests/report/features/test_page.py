import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gossamer.core import GossamerError
from gossamer.report.features import Example, Feature, build_page, render
from gossamer.report.features.facts import choose, imported_facts, page_facts, parse_numbers
from gossamer.report.features.page import as_json
from tests.report.features.browser import CHROMIUM, browse, said, with_driver
from tests.report.features.made import HOOK, made

FACTS = {"title": "tiny", "lede": "A dictionary.", "figures": [("Features", "40")]}


def features() -> list[Feature]:
    return list(made().book.features(range(40)))


def embedded(page: str) -> dict[str, Any]:
    """The data in a page."""
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]


def spelt(value: Any, tokens: list[str]) -> Any:
    """Token numbers as texts again, wherever a page has them."""
    if isinstance(value, dict):
        out = {key: spelt(inside, tokens) for key, inside in value.items()}
        if "t" in out:
            out["t"] = [tokens[number] for number in value["t"]]
        for side in ("up", "down"):
            if side in out:
                out[side] = [[tokens[number], change] for number, change in value[side]]
        return out
    return [spelt(one, tokens) for one in value] if isinstance(value, list) else value


def test_a_page_holds_every_feature_in_full():
    held = embedded(render(features(), FACTS))
    assert spelt(held["features"], held["tokens"]) == [as_json(f, str) for f in features()]
    assert len(set(held["tokens"])) == len(held["tokens"])


def test_a_page_needs_nothing_from_outside():
    page = render(features(), FACTS)
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "default-src 'none'" in page
    assert "connect-src" not in page
    assert "url(" not in page
    assert "connect-src 'self'" in render(None, FACTS)
    assert embedded(render(None, FACTS)) == {"features": None, "tokens": []}


def test_text_cannot_leave_its_place():
    evil = "</script><script>alert(1)</script>"
    feature = replace(
        features()[3], explanation=evil, positive=((evil, 1.0),), fires=(evil,),
        groups=(replace(features()[3].groups[0], examples=(Example((evil,), (1.0,), 0),)),),
    )  # fmt: skip
    page = render([feature], {**FACTS, "title": evil, "notes": [evil], "table": [(evil, evil)]})
    assert page.count("alert(1)</script>") == 0
    assert embedded(page)["features"][0]["words"] == evil

    class Scripts(HTMLParser):
        count = 0

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            self.count += tag == "script"

    parser = Scripts()
    parser.feed(page)
    assert parser.count == 2


def test_numbers_of_features():
    assert parse_numbers("3,17, 40-43,41") == [3, 17, 40, 41, 42, 43]
    for wrong in ("", "a", "3,,4", "-1", "5-3", "1-", "0-9999999", "٣x"):
        with pytest.raises(GossamerError, match="features are"):
            parse_numbers(wrong)


def test_which_features_a_page_holds():
    book = made().book
    assert choose(book, 100) == list(range(40))
    assert choose(book, 6) == [i for i in range(40) if book.firing.counts[i]][:6]
    assert 5 not in choose(book, 10)
    assert choose(book, 1, [9, 5]) == [9, 5]
    with pytest.raises(GossamerError, match="feature 40 does not exist; there are 40, from 0"):
        choose(book, 1, [40])
    with pytest.raises(GossamerError, match="at least 1"):
        choose(book, 0)


def test_facts_say_what_is_left_out():
    book = made().book
    names = {"model": "tiny", "hook": HOOK, "data": "text", "command": "gossamer features show x"}
    facts = page_facts(book, "folder/x", **names, shown=6)
    assert facts["title"] == "x"
    assert "159 tokens" in facts["lede"]
    assert "6 of 40 features" in facts["notes"][0]
    assert dict(facts["figures"])["Features"] == "40"
    assert dict(facts["table"])["Command"] == "gossamer features show x"
    assert page_facts(book, "x", **names, shown=40)["notes"] == []
    assert imported_facts(features(), "a/b.json")["figures"] == [
        ("Features", "40"), ("Explained", "1")
    ]  # fmt: skip


def test_the_page_is_written_whole(tmp_path: Path):
    path = build_page(features(), FACTS, tmp_path / "folder")
    assert path == tmp_path / "folder" / "index.html"
    assert path.read_text(encoding="utf-8") == render(features(), FACTS)
    (tmp_path / "file").write_text("")
    with pytest.raises(GossamerError, match="cannot write"):
        build_page(features(), FACTS, tmp_path / "file" / "x.html")


STEPS = """
const seen = { start: location.hash, title: texts("#detail h2") };
seen.rows = texts("#browse tbody th").length;
seen.where = texts("#where")[0];
await click("#browse th[data-sort=top] button");
seen.largest = texts("#browse tbody th")[0];
seen.sorted = document.querySelector("th[data-sort=top]").getAttribute("aria-sort");
await click("#on");
seen.next = [texts("#browse tbody th").length, texts("#where")[0]];
await type("capital");
seen.found = texts("#browse tbody th");
seen.told = texts("#browse .told");
await type("#5");
seen.alive = texts("#browse tbody th").includes("#5");
await click("#dead");
seen.all = texts("#browse tbody th").includes("#5");
await type("nothing holds this");
seen.none = texts("#browse tbody");
await type("");
await click("#explained");
seen.explained = texts("#browse tbody th");
await click("#browse tbody tr");
seen.hash = location.hash;
seen.shown = texts("#detail h2, #detail .meaning");
seen.heads = texts("#detail h3");
seen.current = document.querySelector("#browse tr[aria-current]").dataset.index;
seen.values = texts("#detail .example .n");
seen.hot = document.querySelectorAll("#detail .tok.hot").length;
const token = document.querySelector("#detail .tok.here");
token.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
seen.tip = [document.getElementById("tip").hidden, texts("#tip")[0]];
await click("#detail .near a");
const next = location.hash.slice(1);
seen.after = [next !== "7", texts("#detail h2")[0] === "Feature " + next];
location.hash = "#5";
await wait(100);
seen.dead = texts("#detail")[0];
return seen;
"""


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_person_clicks_through_it(tmp_path: Path):
    path = tmp_path / "page.html"
    path.write_text(with_driver(render(features(), FACTS), STEPS), encoding="utf-8")
    seen = said(browse(tmp_path / "a", "--dump-dom", path.as_uri()))
    shown = features()
    alive = [f for f in shown if not f.dead]
    assert "error" not in seen
    assert (seen["start"], seen["rows"], seen["title"]) == ("#0", 25, ["Feature 0"])
    assert seen["where"] == f"1 to 25 of {len(alive)}"
    best = max(alive, key=lambda f: f.top)
    assert (seen["largest"], seen["sorted"]) == (f"#{best.index}", "descending")
    assert seen["next"] == [len(alive) - 25, f"26 to {len(alive)} of {len(alive)}"]
    assert seen["found"] == ["#7"]
    assert "Capital letters" in "".join(seen["told"])
    assert (seen["alive"], seen["all"]) == (False, True)
    assert seen["none"] == ["Nothing matches."]
    assert seen["explained"] == ["#7"]
    assert (seen["hash"], seen["current"]) == ("#7", "7")
    assert seen["shown"] == ["Feature 7", "Capital letters"]
    assert {"Positive logits", "Negative logits", "Top activations"} <= set(seen["heads"])
    assert len(seen["values"]) == sum(len(g.examples) for g in shown[7].groups)
    assert seen["hot"] > 3
    first = shown[7].groups[0].examples[0]
    hidden, tip = seen["tip"]
    assert not hidden
    assert tip.startswith(json.dumps(first.tokens[first.at], ensure_ascii=False) + " ")
    assert float(tip.rsplit(" ", 1)[1]) == pytest.approx(first.values[first.at], rel=1e-2)
    assert seen["after"] == [True, True]
    assert "No token of this text fired it" in seen["dead"]


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_it_is_painted(tmp_path: Path):
    path = build_page(features(), FACTS, tmp_path / "index.html")
    shot = tmp_path / "shot.png"
    browse(tmp_path / "b", "--window-size=1280,1400", f"--screenshot={shot}", f"{path.as_uri()}#7")
    with Image.open(shot) as picture:
        pixels = picture.convert("RGB")
        right = pixels.crop((660, 0, 1280, 1400)).resize((310, 700))
        colours = {right.getpixel((x, y)) for x in range(310) for y in range(700)}
    assert len(colours) > 150
