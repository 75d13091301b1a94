"""The README names only what exists."""

import re
from pathlib import Path

from services.registry import REWARDS
from trainer.registry import REGISTRY

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```\n(.*?)```", TEXT, re.S) for line in block.splitlines() if line.strip()]


def test_make_verbs_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {m for line in COMMANDS for m in re.findall(r"^make ([a-z-]+)", line)}
    assert {"demo", "test", "serve"} <= named <= targets
    listed = re.search(r"lists the verbs: `([^`]+)`, and `([^`]+)`", TEXT)
    assert listed and set(f"{listed[1]} {listed[2]}".split()) <= targets


def test_files_and_recipes_exist() -> None:
    for path in re.findall(r"(?<![\w/])(?:examples|trainer|world|tests|bench|docs|scripts)/[\w./-]+\w", TEXT):
        if not path.startswith("tests/data/") and "*" not in path:
            assert (ROOT / path).exists(), path
    recipes = {p.stem for p in (ROOT / "trainer" / "recipes").glob("*.yaml")}
    table = TEXT[TEXT.index("| recipe |") : TEXT.index("## What there is")]
    assert set(re.findall(r"^\| `(\w+)`", table, re.M)) == recipes


def test_tables_match_the_registries() -> None:
    rewards = TEXT[TEXT.index("| reward |") : TEXT.index("| policy |")]
    assert set(re.findall(r"^\| `(\w+)`", rewards, re.M)) == set(REWARDS)
    policies = TEXT[TEXT.index("| policy |") : TEXT.index("Losses:")]
    assert set(re.findall(r"^\| `(\w+)`", policies, re.M)) == set(REGISTRY["policy"])
    losses = re.search(r"Losses: (.*?)\. Steps", TEXT, re.S)
    assert losses and set(re.findall(r"`(\w+)`", losses[1])) == {*REGISTRY["loss"], *REGISTRY["forward_loss"]}


def test_the_tree_is_the_tree() -> None:
    tree = TEXT[TEXT.index("## The tree") : TEXT.index("`make` alone")]
    named = set(re.findall(r"^(\w+)/ ", tree, re.M))
    there = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")} - {"runs", "build", "dist"}
    assert named == {name for name in there if not name.endswith("egg-info") and name != "__pycache__"}
