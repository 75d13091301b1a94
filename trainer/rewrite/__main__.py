"""`verism-rewrite PROMPT`: several ways to say it, their pictures, and what the reward services think of them."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.rewrite import WORLD

HELP = """\
start the services first (`make serve`), then:
  verism-rewrite "a dog on a beach"                       SmolLM2 writes 8 rewrites, the small world's policy paints 4 pictures of each
  verism-rewrite "a winter coat" --rewriter runs/NAME     the rewriter that a run trained; or a folder, an adapter, a hub id
  verism-rewrite "a coat" --rewriter http://gpu3:8005     a service that has POST /rewrite
  verism-rewrite "a coat" --policy runs/world             the pictures of a trained policy
  verism-rewrite "a coat" --n 24 --budget 1500 --prune    previews early, drops the worst, stays within 1500 forward passes
  verism-rewrite "a coat" --refine 3 --critic critic --rewards detector=URL#logit alignment=URL#margin critic=URL
                                                          a judge (use: rational_rewards) proposes better prompts, up to 3 rounds
  verism-rewrite "a coat" --save out/ --json > out.json   keeps the pictures, and everything that was tried

Every picture is judged by your own prompt, which is painted too, as it stands and from the same noises. `gain` is how much better than
that a rewrite's pictures are, in deviations of the rewards, with its standard error over the pictures; what was chosen among many on
these pictures will do worse on others, which --confirm 8 measures. A rewrite whose alignment falls by more than two standard errors
has lost the subject.

--budget counts forward passes: a token of a rewrite is one of the language model, a step of a picture one of the image model (two with
guidance). --token-cost says how many of the latter one of the former counts as; --look-cost the same of decoding and scoring a picture.

Exit status: 0 done, 2 cannot, 130 interrupted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """`verism-rewrite`; the exit status."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    args = _parser().parse_args(argv)
    from trainer.rewrite import command  # torch loads only once the command line is right

    return command.run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="verism-rewrite",
        description="Rewrite a prompt so that its pictures look real, and see whether they do.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("prompt", help="what the pictures should show")
    add("--rewriter", default="smollm2", help="folder, PEFT adapter, run folder, hub id, URL, or smollm2 (default)")
    add("--base", help="for an adapter: the model it is of, where its folder does not say so")
    add("--instruction", help="what the rewriter is told: a name under trainer/language/instructions, a .txt file, or the text")
    add("--policy", help="what paints: a folder in diffusers format, a hub id, or a run folder (default: the recipe's)")
    add("--recipe", default="world", help="whose policy, size, steps and guidance (default: world)")
    add("--set", action="append", default=[], metavar="key=value", help="a change to the recipe, e.g. eval.steps=20")
    add("--n", type=_count(0), default=8, help="rewrites (default: 8; 0 with --refine: the judge alone)")
    add("--pictures", type=_count(1), default=4, help="pictures of each prompt (default: 4)")
    add("--temperature", type=float, default=1.0, help="of the rewriter (default: 1; 0 is its likeliest answer)")
    add("--max-new-tokens", type=_count(1), default=64, help="longest rewrite (default: 64; a service has its own)")
    add("--seed", type=int, default=0, help="of rewrites and noises (default: 0)")
    add(
        "--rewards",
        nargs="+",
        default=[],
        metavar="name=URL",
        help=f"default: detector#logit and alignment#margin at {WORLD}; #part for a part",
    )
    add("--weight", nargs="+", default=[], metavar="name=number", help="of a reward in the total (default: 1 each)")
    add("--budget", type=float, help="most forward passes of all together (default: no limit)")
    add("--token-cost", type=float, default=1.0, help="passes of the image model that one token counts as (default: 1)")
    add("--look-cost", type=float, default=0.0, help="passes that decoding and scoring one picture counts as (default: 0)")
    add(
        "--prune",
        nargs="?",
        const="auto",
        metavar="AFTER:SHARE,...",
        help="drop the worst after so many steps; auto (default) or ttsnap for a schedule",
    )
    add(
        "--confirm",
        type=_count(0),
        default=0,
        metavar="M",
        help="paint M fresh pictures of the best and of your own prompt, and compare",
    )
    add("--refine", type=_count(0), default=0, metavar="ROUNDS", help="rounds of refined prompts by the critic")
    add("--critic", default=None, help="the reward that proposes prompts (use: rational_rewards)")
    add("--save", type=Path, help="new folder for the pictures and result.json")
    add("--json", action="store_true", help="print the result as JSON")
    return parser


def _count(least: int) -> Any:
    def count(text: str) -> int:
        number = int(text)
        if not least <= number <= 256:
            raise argparse.ArgumentTypeError(f"{text} is not between {least} and 256")
        return number

    return count


if __name__ == "__main__":
    sys.exit(main())
