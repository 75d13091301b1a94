"""Which pictures of a folder are taken."""

from pathlib import Path

from tests.trainer.realbench.folders import IDS, fill
from trainer.realbench.pictures import entry
from trainer.realbench.prompts import BenchPrompt


def test_no_more_than_asked_for_of_prompts_and_others_together(tmp_path: Path) -> None:
    folder = fill(tmp_path / "photos", 0.7, [*IDS[:10], *(f"other {i}" for i in range(20))], side=16)
    prompts = [BenchPrompt(name, name) for name in IDS]
    for most, prompted, count in ((None, 10, 30), (25, 10, 25), (10, 10, 10), (4, 4, 4)):
        taken = entry("photographs", folder, prompts, most, extra=True).pictures
        assert (sum(one.prompt is not None for one in taken), len(taken)) == (prompted, count)
