"""Curves in a bounded place keep their shape, and a holder of an earlier state is told no more than it lacks."""

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.watch.gains import gains
from trainer.watch.table import Table, finite


def test_a_full_table_keeps_the_means() -> None:
    table = Table("b", rows=8)
    for step in range(1, 101):
        assert table.add(step, {"x": step, "even": step if step % 2 == 0 else None})
    told = table.since()
    assert len(told["at"]) <= 8 and told["at"][-1] == 100
    width = told["at"][1] - told["at"][0]
    for at, mean in list(zip(told["at"], told["columns"]["x"], strict=True))[:-1]:
        assert mean == pytest.approx(at - (width - 1) / 2)
    assert all(v is not None for v in told["columns"]["even"])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=16), st.data())
def test_a_viewer_that_follows_has_what_a_new_one_gets(sizes: list[int], data: Any) -> None:
    table, held, cursor, step = Table("b", rows=6), {"at": [], "columns": {}}, "", 0
    for size in sizes:
        for _ in range(size):
            step += data.draw(st.integers(1, 3))
            row = data.draw(st.dictionaries(st.sampled_from("abc"), st.one_of(st.none(), st.floats(-5, 5)), max_size=3))
            table.add(step, row)
        told = json.loads(json.dumps(table.since(cursor), allow_nan=False))
        begin, cursor = told["from"], told["cursor"]
        held["at"] = held["at"][:begin] + told["at"]
        for key, column in told["columns"].items():
            held["columns"][key] = (held["columns"].get(key, []) + [None] * begin)[:begin] + column
    assert held == {key: table.since()[key] for key in ("at", "columns")}


def test_what_is_no_number_is_left_out() -> None:
    table = Table("b", columns=3)
    assert table.add(1, {"a": 1, "b": "text", "c": None, "d": math.nan, "e": math.inf, "f": {"x": 1}, "g": True, "h": 10**400})
    assert table.since()["columns"] == {"a": [1.0], "g": [1.0]}
    assert table.add(2, {"i": 1, "j": 2, "k" * 500: 3}) and table.left_out == 2
    assert not table.add(2, {"a": 5}) and not table.add(1, {"a": 5})
    assert table.since()["columns"]["a"] == [1.0, None]
    assert finite(10**400) is None and finite("1") is None


@pytest.mark.parametrize("cursor", ["", "x", "b-0.3", "other-1.1", "b-1.", "b-1.-4", "b-1." + "9" * 400, "b-1.²"])
def test_a_cursor_that_is_none_gives_everything_or_nothing_more(cursor: str) -> None:
    table = Table("b")
    table.add(1, {"a": 1})
    told = table.since(cursor)
    assert told["from"] == 0 and told["at"] == [1]


def test_gains_in_the_units_of_the_alarm() -> None:
    first = {"reward/total_mean": 0.0, "heldout_cnn": -4.0, "distance": 30.0, "class_hit": 0.5, "n": 1000}
    first |= {"reward/taste/mean": 5.0, "reward/taste/std": 2.0}
    now = first | {"reward/total_mean": 1.5, "heldout_cnn": -3.0, "distance": 60.0, "class_hit": 0.5, "reward/taste/mean": 7.0}
    got = gains(first, now, {"taste": -1.0})
    want = {"trained": 1.5, "heldout_cnn": 1.0, "taste": -1.0, "distance": -math.log(2), "class hit": 0.0}
    assert got == pytest.approx({**{f"gain/{key}": value for key, value in want.items()}, "apart": 2.5})
    assert gains(first, first, {})["apart"] == 0
    assert gains({}, now, {"taste": 1.0}) == {} and gains({"distance": 0.0}, {"distance": 1.0}, {}) == {}
    assert gains({"class_hit": 0.0}, {"class_hit": 1.0, "distance": "far"}, {})["gain/class hit"] > 4
