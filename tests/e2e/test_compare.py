"""A tournament over real HTTP, judged by the tiny vision-language judge, against the judge asked directly."""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from bench.process import running
from services.compare import win_rates
from services.compare_http import places
from services.reward import Pair
from services.rewards.unified_compare import UnifiedCompare
from shared.client import RewardClientSync
from shared.image import encode
from shared.schema import CompareAnswer, CompareGroup, CompareRequest, GroupAnswer, ImageData, Verdict, WinRate
from tests import tiny_judge

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a photo of a leather bag"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    config = tmp_path_factory.mktemp("compare") / "c.yaml"
    judge = {"use": "unified_compare", "folder": str(tiny_judge.made()), "floor": 0, "batch_cap": 16}
    config.write_text(json.dumps({"rewards": {"judge": judge}}))
    with running(config) as served:
        yield served


def pictures(count: int = 5) -> list[NDArray[np.uint8]]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, int(rng.integers(30, 256)), (32, 40, 3), dtype=np.uint8) for _ in range(count)]


def test_a_tournament_is_the_judge_asked_pair_by_pair(url: str) -> None:
    images = pictures()
    with RewardClientSync({"judge": url}, timeout_s=120) as client:
        assert client.info()["judge"].mode == "pairwise"
        table = client.compare(images, ["g"] * 5, [PROMPT] * 5)
    judge = UnifiedCompare.load("judge", {"folder": tiny_judge.made(), "floor": 0}, "cpu")
    p_NN = np.full((5, 5), np.nan)
    for i in range(5):
        for j in range(5):
            if i != j:
                forward, backward = (
                    judge.compare([Pair(a, PROMPT, (b,))])[0] for a, b in ((images[i], images[j]), (images[j], images[i]))
                )
                assert forward.value is not None and backward.value is not None
                p_NN[i, j] = (forward.value + 1 - backward.value) / 2
    assert table.mask_B.all() and table.failures == {}
    np.testing.assert_allclose(table.rates_B, np.nanmean(p_NN, 1), atol=1e-4)
    for verdict in table.groups["g"].pairs:
        assert verdict.value == pytest.approx(p_NN[verdict.first, verdict.second], abs=1e-4)
    assert np.ptp(table.rates_B) > 1e-3, "the pictures matter"
    assert table.groups["g"].shown_first != pytest.approx(0.5, abs=1e-3), (
        "and so does their place, which is why both orders are asked"
    )


def test_swapping_a_pair_flips_the_preference(url: str) -> None:
    a, b = pictures(2)
    with RewardClientSync({"judge": url}, timeout_s=120) as client:
        one, other = client.compare([a, b], ["g"] * 2, [PROMPT] * 2), client.compare([b, a], ["g"] * 2, [PROMPT] * 2)
        score = httpx.post(f"{url}/score", json={"items": [item(a, b)]}).json()["items"][0]["scores"]["judge"]
    assert one.rates_B == pytest.approx(1 - other.rates_B, abs=1e-5) and one.rates_B == pytest.approx(other.rates_B[::-1], abs=1e-5)
    assert score["value"] == pytest.approx(one.rates_B[0], abs=1e-5), "/score with a reference asks the same"


def plain(pixels: NDArray[np.uint8]) -> dict[str, object]:
    image = encode(pixels, "png")
    return {"encoding": "png", "height": image.height, "width": image.width, "data": base64.b64encode(image.data).decode()}


def item(image: NDArray[np.uint8], reference: NDArray[np.uint8]) -> dict[str, object]:
    return {"prompt": PROMPT, "image": plain(image), "references": [plain(reference)]}


def test_one_corrupt_picture_leaves_its_pairs_missing(url: str) -> None:
    images = [plain(pixels) for pixels in pictures(4)]
    images[2]["data"] = str(images[2]["data"])[:80]
    groups = [{"id": "g", "prompt": PROMPT, "images": [0, 1, 2, 3]}, {"id": "none", "images": [0, 1]}]
    answer = httpx.post(f"{url}/v1/compare", json={"reward": "judge", "images": images, "groups": groups}, timeout=120)
    one, two = CompareAnswer.model_validate(answer.json()).groups
    assert [row.pairs for row in one.items] == [2, 2, 0, 2] and [row.missing for row in one.items] == [1, 1, 3, 1]
    assert one.items[2].win_rate is None and one.items[2].error is not None
    assert two.pairs[0].error is not None and two.pairs[0].error.type == "urn:verism:prompt-missing"
    metrics = httpx.get(f"{url}/metrics").text
    assert 'verism_requests_total{code="200",route="/v1/compare"}' in metrics


def test_what_the_documents_show_passes_the_schema() -> None:
    text = (ROOT / "docs" / "wire.md").read_text()
    request, answer = re.findall(r"```jsonc\n(.*?)```", text, re.S)
    asked = CompareRequest.model_validate({**json.loads(request), "request_id": "r"})
    said = CompareAnswer.model_validate_json(answer)
    assert [group.id for group in asked.groups] == [group.id for group in said.groups]
    assert places(asked) == [([0, 1], [])], "the digest is that of the second picture"
    (pair,), items = said.groups[0].pairs, said.groups[0].items
    assert pair.value is not None
    rates = win_rates(np.array([[np.nan, pair.value], [1 - pair.value, np.nan]]))
    assert [row.win_rate for row in items] == pytest.approx(rates.rate_N)
    assert [row.standard_error for row in items] == pytest.approx(rates.error_N, abs=1e-3)
    known = set(re.findall(r"\w+", text[text.index("## Pairs") : text.index("## Errors")]))
    for model in (CompareRequest, CompareGroup, ImageData, GroupAnswer, Verdict, WinRate):
        assert known >= set(model.model_fields), set(model.model_fields) - known
