"""Run benchmarks: `make bench`, `python -m bench http --rounds 5`, `python -m bench trainer --quick`, `python -m bench algorithms`,
`python -m bench adversary`, `python -m bench rewriter`, `python -m bench two-policies`."""

import argparse
import sys

from bench import http


def main() -> int:
    if sys.argv[1:2] == ["trainer"]:
        from bench import trainer  # it has options of its own

        return trainer.main(sys.argv[2:])
    if sys.argv[1:2] == ["algorithms"]:
        from bench import algorithms

        return algorithms.main(sys.argv[2:])
    if sys.argv[1:2] == ["adversary"]:
        from bench import adversary

        return adversary.main(sys.argv[2:])
    if sys.argv[1:2] == ["rewriter"]:
        from bench import rewriter

        return rewriter.main(sys.argv[2:])
    if sys.argv[1:2] == ["two-policies"]:
        from bench import two_policies

        return two_policies.main(sys.argv[2:])
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "name", nargs="?", choices=["http"], default="http", help="http: the detector through HTTP against a plain loop"
    )
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds; the median counts (default 5)")
    parser.add_argument("--pictures", type=int, default=256, help="pictures per round and way (default 256)")
    arguments = parser.parse_args()
    return http.run(arguments.rounds, arguments.pictures)


if __name__ == "__main__":
    sys.exit(main())
