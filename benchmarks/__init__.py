"""Side by side with the peers, in one run: `python -m benchmarks.NAME`. Peers that are not installed are skipped."""

import argparse
from collections.abc import Callable, Iterable


def one_of(cases: Iterable[str]) -> Callable[[str], str]:
    """What argparse makes of a word that has to be one of `cases` (its `choices` refuse an empty list of them)."""

    def word(given: str) -> str:
        if given not in cases:
            raise argparse.ArgumentTypeError(f"no case {given!r}, only {', '.join(cases)}")
        return given

    return word
