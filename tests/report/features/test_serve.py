import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from gossamer.core import GossamerError
from gossamer.report.features import Shelf, server
from gossamer.report.features.page import as_json
from tests.report.features.browser import CHROMIUM, browse, said, with_driver
from tests.report.features.made import made

FACTS = {"title": "served", "lede": "", "figures": []}


class Driven(Shelf):
    """Serves a page that takes steps on itself."""

    steps = "return null;"

    def page(self) -> str:
        return with_driver(super().page(), self.steps)


def listening(shelf: Shelf) -> Iterator[int]:
    made_server = server(shelf)
    thread = threading.Thread(target=made_server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield made_server.server_port
    finally:
        made_server.shutdown()
        made_server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    yield from listening(Shelf(made().book, FACTS))


def get(port: int, path: str) -> tuple[int, str]:
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def rows(port: int, query: str) -> dict[str, Any]:
    status, text = get(port, f"/rows?{query}")
    assert status == 200
    return json.loads(text)


def test_the_page_comes_without_features(port: int):
    status, page = get(port, "/")
    assert status == 200
    assert '"features":null' in page
    assert len(page) < 60_000


def test_rows_come_sorted_filtered_and_paged(port: int):
    book = made().book
    alive = [i for i in range(40) if book.firing.counts[i]]
    found = rows(port, "")
    assert found["total"] == len(alive)
    assert [row["i"] for row in found["rows"]] == alive[:25]
    found = rows(port, "sort=density&down=1&start=5&count=4")
    order = sorted(alive, key=lambda i: -int(book.firing.counts[i]))
    assert [row["i"] for row in found["rows"]] == order[5:9]
    assert rows(port, "dead=1")["total"] == 40
    assert [row["i"] for row in rows(port, "find=%235&dead=1")["rows"]] == [5]
    assert [row["i"] for row in rows(port, "find=CAPITAL+letters")["rows"]] == [7]
    assert [row["i"] for row in rows(port, "explained=1")["rows"]] == [7]
    assert rows(port, "find=nothing+holds+this") == {"total": 0, "rows": []}
    assert len(rows(port, "dead=1&count=100000")["rows"]) == 40


def test_a_feature_is_that_of_a_page(port: int):
    status, text = get(port, "/feature/9")
    assert status == 200
    assert json.loads(text) == json.loads(json.dumps(as_json(made().book.feature(9), str)))


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/feature/40", 400, "no feature 40; there are 40, from 0"),
        ("/feature/x", 400, "a number was expected"),
        ("/rows?start=x", 400, "a number was expected"),
        ("/rows?sort=luck", 400, "sort is 'luck'"),
        ("/etc/passwd", 404, "there is only /"),
    ],
)
def test_what_it_does_not_have(port: int, path: str, status: int, words: str):
    found, text = get(port, path)
    assert found == status
    assert words in text


def test_a_name_that_only_points_here_is_refused(port: int):
    address = f"http://127.0.0.1:{port}/"
    other = urllib.request.Request(address, headers={"Host": f"evil.example:{port}"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(other, timeout=10)
    assert caught.value.code == 403
    caught.value.close()


def test_a_port_that_is_taken(port: int):
    with pytest.raises(GossamerError, match=f"port {port} cannot be used"):
        server(Shelf(made().book, FACTS), port)
    with pytest.raises(GossamerError, match="port 99999 cannot be used"):
        server(Shelf(made().book, FACTS), 99999)


STEPS = """
await wait(500);
const seen = { rows: texts("#browse tbody th").length, title: texts("#detail h2")[0] };
await click("#browse th[data-sort=density] button");
await wait(500);
seen.first = texts("#browse tbody th")[0];
await type("capital");
await wait(500);
seen.found = texts("#browse tbody th");
await click("#browse tbody tr");
await wait(500);
seen.shown = texts("#detail h2, #detail .meaning");
seen.examples = texts("#detail .example").length;
return seen;
"""


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_person_clicks_through_it(tmp_path: Path):
    book = made().book
    shelf = Driven(book, FACTS)
    shelf.steps = STEPS
    for port in listening(shelf):
        seen = said(browse(tmp_path / "a", "--dump-dom", f"http://127.0.0.1:{port}/#3"))
    assert seen == {
        "rows": 25,
        "title": "Feature 3",
        "first": f"#{int(book.firing.counts.argmax())}",
        "found": ["#7"],
        "shown": ["Feature 7", "Capital letters"],
        "examples": sum(len(g.examples) for g in book.feature(7).groups),
    }
