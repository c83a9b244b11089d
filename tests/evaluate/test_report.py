"""The page of answers."""

from __future__ import annotations

import base64
import math
import re
from html.parser import HTMLParser

import pytest

from megablip.evaluate.report import HEIGHT, WIDTH, write_report
from megablip.evaluate.tasks import Answer

HOSTILE = "</figcaption><script>alert(1)</script>\" onerror='alert(2)' &amp;"


class Tags(HTMLParser):
    """Names of all tags and attributes, and the text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def page(tmp_path, *, title="t", metrics=(), groups=None, pictures=()):
    path = tmp_path / "report.html"
    write_report(path, title=title, metrics=list(metrics), group="kind", groups=groups or {}, pictures=list(pictures))
    return path.read_text(encoding="utf-8")


def points(page):
    line = re.search(r'points="([^"]*)"', page)[1]
    return [tuple(map(float, point.split(","))) for point in line.split()]


def losses(*values):
    return [{"tokens_seen": 10 * n, "loss": value} for n, value in enumerate(values, 1)]


def test_hostile_text_stays_text(tmp_path):
    found = Tags(page(tmp_path, title=HOSTILE, pictures=[(b"x", Answer(HOSTILE, HOSTILE, HOSTILE))]))
    assert "script" not in found.tags
    assert not any(name.startswith("on") for name, _ in found.attributes)
    assert ("alt", HOSTILE) in found.attributes
    assert found.text.count("alert(1)") == 4  # title twice, truth, answer


def test_a_key_that_is_no_text_does_not_end_the_report(tmp_path):
    assert "<figure" in page(tmp_path, pictures=[(b"x", Answer("caf\udce9 é", "é", "日本"))])
    assert "日本" in page(tmp_path, pictures=[(b"x", Answer("k", "é", "日本"))])


def test_a_picture_is_in_the_page_and_marked(tmp_path):
    data = bytes(range(256))
    text = page(tmp_path, pictures=[(data, Answer("k", "1", "1")), (data, Answer("k", "1", "2"))])
    assert text.count(base64.b64encode(data).decode()) == 2
    assert text.index('class="right"') < text.index('class="wrong"')


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    found = Tags(page(tmp_path, metrics=losses(3, 2, 1), pictures=[(b"x", Answer("k", "1", "1"))]))
    assert not {"link", "script", "iframe"} & set(found.tags)
    assert all(value.startswith("data:") for name, value in found.attributes if name in ("src", "href"))


def test_the_table(tmp_path):
    text = page(tmp_path, groups={"3": {"items": 12, "exact": 0.25, "characters": 0.5, "refused": 0.0}})
    assert re.findall(r"<td>([^<]*)</td>", text) == ["3", "12", "0.250", "0.500", "0.000"]


def test_the_curve_fills_its_box(tmp_path):
    drawn = points(page(tmp_path, metrics=losses(5, 4, 1)))
    assert drawn == [
        (pytest.approx(WIDTH / 3, abs=0.1), 0.0),
        (pytest.approx(2 * WIDTH / 3, abs=0.1), HEIGHT / 4),
        (WIDTH, HEIGHT),
    ]


def test_a_long_curve_is_smoothed(tmp_path):
    drawn = points(page(tmp_path, metrics=losses(*[1.0, 3.0] * 100)))
    heights = {y for _, y in drawn[2:]}
    assert len(drawn) == 200
    assert len(heights) == 1, "pairs average to the same value"


def test_losses_that_are_no_numbers_leave_the_curve_whole(tmp_path):
    drawn = points(page(tmp_path, metrics=losses(5, math.nan, 4, math.inf, 1)))
    assert len(drawn) == 3
    assert all(math.isfinite(x) and math.isfinite(y) for x, y in drawn)


@pytest.mark.parametrize("metrics", [[], losses(3), losses(math.nan, math.nan)])
def test_a_page_without_a_curve(tmp_path, metrics):
    assert "<svg" not in page(tmp_path, metrics=metrics)


def test_a_flat_curve(tmp_path):
    assert len(points(page(tmp_path, metrics=losses(2, 2)))) == 2
