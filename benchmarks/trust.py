"""What comes out on hard cases, ours beside two peers: `python -m benchmarks.trust`.

Each call is written as the package's users write it (`benchmarks/_trust.py`). A cell is the relative error of the
number returned, or how it was refused; a wrong number returned without a word is marked.
"""

from __future__ import annotations

from importlib.metadata import version

import jax

from ._peers import installed
from ._trust import CASES, outcome

PEERS = ("jaxopt", "optimistix")


def cell(call, case) -> tuple[str, bool]:
    """`(text, whether it is a wrong number)`; wrong: off by more than 1e-3, or any number where there is none."""
    if call is None:
        return "no such call", False
    said, error = outcome(call, case.truth)
    if said:
        return f"refused: {said}", False
    if not error <= max(1e-3, case.tolerance):
        return ("WRONG, a number" if error != error else f"WRONG, {error:.1e}"), True
    return f"{error:.1e}", False


def main() -> None:
    """Prints the table as Markdown, and how many wrong numbers each package returned."""
    jax.config.update("jax_enable_x64", True)
    names = ["jax", "bilevel", *PEERS]
    print(", ".join(f"{name} {version(name)}" for name in names if installed(name)) + "\n")
    peers = [name for name in PEERS if installed(name)]
    for name in set(PEERS) - set(peers):
        print(f"{name} is not installed: skipped")
    print("| case | bilevel | " + " | ".join(peers) + " |")
    print("|---|---" + "|---" * len(peers) + "|")
    wrong = dict.fromkeys(["bilevel", *peers], 0)
    for name, make in CASES.items():
        case = make()
        row = []
        for who in wrong:
            text, bad = cell(case.ours if who == "bilevel" else case.peers.get(who), case)
            wrong[who] += bad
            row.append(text)
        print(f"| {name} | " + " | ".join(row) + " |", flush=True)
        jax.clear_caches()
    print("\nwrong numbers without a word: " + ", ".join(f"{who} {count}" for who, count in wrong.items()))


if __name__ == "__main__":
    main()
