"""The tour on three recipes and a few windows: the whole path from the bundled model to the page."""

from __future__ import annotations

import itertools
import re

import pytest

from qoqlab import recipes, tour


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Output text and HTML of a short tour."""
    folder = tmp_path_factory.mktemp("tour")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tour, "LENGTH", 64)
        patch.setattr(tour, "CALIBRATION_WINDOWS", 2)
        patch.setattr(tour, "TEST_WINDOWS", 2)
        patch.setattr(tour, "tour_recipes", lambda: [recipes.get(n) for n in ("fp16", "rtn-w4a8kv4-g128", "qoq-g128")])
        assert tour.main(["--out", str(folder / "deep" / "tour.html")]) == 0
    return (folder / "deep" / "tour.html").read_text()


def test_page_is_self_contained(page):
    """Plotly is embedded exactly once and nothing is fetched from elsewhere."""
    assert len(re.findall(r"<script[^>]*>/\*\*\n\* plotly\.js", page)) == 1
    # links in visible markup and resources; plotly.js itself mentions addresses in its code
    markup = re.sub(r"<script.*?</script>", "", page, flags=re.S)
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", markup)
    assert not re.search(r"<script[^>]+src=", page)


def test_page_shows_table_and_every_figure(page):
    """Both models, all recipes, and one plotly figure per promised picture."""
    for text in ("bundled", "planted", "rtn-w4a8kv4-g128", "qoq-g128", "gap to fp16"):
        assert text in page
    assert page.count("Plotly.newPlot(") == 11


def test_ladder_ends_in_the_preset_and_adds_one_thing_at_a_time():
    """Every rung differs from the one before in its steps or in its formats, never in both; the last one is qoq-g128."""
    rungs = recipes.ladder()
    assert rungs[-1].steps == recipes.get("qoq-g128").steps and rungs[-1].scheme == recipes.get("qoq-g128").scheme
    for before, after in itertools.pairwise(rungs):
        assert (before.steps != after.steps) != (before.scheme != after.scheme)
        assert {s.name for s in before.steps} <= {s.name for s in after.steps}


def test_verdict_is_made_of_the_numbers():
    """The sentence quotes both gaps and calls an easy model easy."""
    import pandas as pd

    rows = [("a", "fp16", 0.0), ("a", "rtn-w4a8kv4-g128", 4.0), ("a", "qoq", 1.0), ("b", "fp16", 0.0)]
    rows += [("b", "rtn-w4a8kv4-g128", 0.2), ("b", "qoq", 0.1)]
    table = pd.DataFrame([{"model": m, "step": s, "gap": g, "fp16": 10.0} for m, s, g in rows])
    text = tour.verdict(table)
    assert "loses 4.00 perplexity and QoQ 1.00, 25% of that" in text
    assert text.count("easy to quantise") == 1
