"""The alarm sees the trap of the measured table, and leaves the good run alone."""

from typing import Any

import pytest

from trainer import alarm
from trainer.config import AlarmConfig

KEYS = ("step", "reward/total_mean", "heldout_cnn", "distance", "class_hit")
TRAP = [(0, -5.3, -2.8, 13, 0.79), (20, 4.3, 1.9, 74, 0.42), (40, 8.1, 3.0, 198, 0.14), (80, 24.0, 5.6, 232, 0.10)]
GOOD = [
    (0, -5.0, -4.1, 12.9, 0.79),
    (20, -1.1, -2.8, 8.2, 0.81),
    (40, -1.2, -2.8, 7.6, 0.81),
    (60, -0.8, -2.7, 6.9, 0.83),
    (80, -2.3, -3.6, 8.7, 0.83),
]


def rows(table: list[tuple[float, ...]]) -> list[dict[str, float]]:
    return [dict(zip(KEYS, row, strict=True)) for row in table]


def test_the_trap_raises_it_at_the_second_bad_evaluation() -> None:
    trap = rows(TRAP)
    assert alarm.check(trap[:2], AlarmConfig()) is None
    raised = alarm.check(trap[:3], AlarmConfig())
    assert raised is not None
    assert raised.best_step == 0
    assert "distance" in raised.reason and "class hit" in raised.reason


def test_patience_one_raises_it_at_the_first() -> None:
    raised = alarm.check(rows(TRAP)[:2], AlarmConfig(patience=1))
    assert raised is not None and raised.step == 20


def test_the_good_run_is_left_alone_and_its_best_is_the_nearest() -> None:
    good = rows(GOOD)
    assert all(alarm.check(good[: n + 1], AlarmConfig()) is None for n in range(len(good)))
    assert alarm.best(good)["step"] == 60


def test_off_never_raises() -> None:
    assert alarm.check(rows(TRAP), AlarmConfig(action="off")) is None


def test_a_checkpoint_whose_class_hit_fell_is_not_best() -> None:
    table = rows([(0, 0.0, 0.0, 10, 0.8), (10, 1.0, 0.0, 5, 0.6), (20, 1.0, 0.0, 8, 0.8)])
    assert alarm.best(table)["step"] == 20


def test_without_monitors_the_highest_reward_is_best_and_nothing_is_raised() -> None:
    table = [{"step": 0, "reward/total_mean": 0.0}, {"step": 10, "reward/total_mean": 2.0}]
    assert alarm.best(table)["step"] == 10
    assert alarm.check([*table, {"step": 20, "reward/total_mean": 1.0}], AlarmConfig(patience=1)) is None


def test_no_evaluation_is_an_error() -> None:
    with pytest.raises(ValueError, match="no evaluation"):
        alarm.best([])


def test_an_evaluation_without_scores_is_no_evidence() -> None:
    table = rows(TRAP[:2])
    missing: list[dict[str, Any]] = [*table, {**table[1], "step": 40, "reward/total_mean": None, "distance": None}]
    assert alarm.check(missing, AlarmConfig()) is None
    assert alarm.best(missing)["step"] == 0
