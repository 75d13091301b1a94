"""What bench/refit.py says of answers: errors, answers by two versions, and how long those near a swap took."""

from dataclasses import replace

import pytest

from bench.refit import Answer, judged


def answers() -> list[Answer]:
    """Three versions, ten seconds each, two pictures a request; picture k has log-odds k + version."""
    made = []
    for n in range(300):
        version, first = 1 + n // 100, n % 50
        logits = (first + version + 1e-6 * (n % 3), first + 1.0 + version)
        made.append(
            Answer(sent=0.1 * n, seconds=0.05 if n != 205 else 0.4, status=200, first=first, version=version, logits=logits)
        )
    return made


def test_sound_answers_are_said_to_be() -> None:
    said = judged(answers())
    assert (said["requests"], said["errors"], said["swaps"], said["mixed"]) == (300, 0, 2, 0)
    assert said["least_move_between_versions"] == pytest.approx(1.0, abs=1e-4)
    assert said["near_swaps"]["requests"] + said["elsewhere"]["requests"] == 300
    assert 4 <= said["near_swaps"]["requests"] <= 16 and said["elsewhere"]["max_ms"] == pytest.approx(400)


def test_an_answer_by_two_versions_and_an_error_are_found() -> None:
    some = answers()
    some[140] = replace(some[140], logits=(some[140].logits[0], some[140].logits[1] + 1.0))  # its second picture by version 3
    some[20] = replace(some[20], logits=(float("nan"), some[20].logits[1]))
    some[30] = replace(some[30], status=503, version=None, logits=())
    said = judged(some)
    assert (said["errors"], said["mixed"]) == (1, 2)
