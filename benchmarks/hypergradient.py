"""Time to a true relative hypergradient error of 1e-6: `python -m benchmarks.hypergradient`.

Ours is called as a user does, `bilevel.hypergradient(problem, x, y0, rtol=1e-6)` without an outer jit; peers are
jitted whole. Compile time is apart, runs are interleaved in one process, the reference is dense Newton in float64.
"""

from __future__ import annotations

import argparse
import time
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np

import bilevel

from ._peers import PEERS, installed, loosest
from ._problems import SIZES, logistic_problem, reference


def timed(function) -> tuple[float, object]:
    """Seconds of one call, its result ready."""
    start = time.perf_counter()
    result = jax.block_until_ready(function())
    return time.perf_counter() - start, result


def run(name: str, accuracy: float, repeats: int) -> dict:
    """One problem: prints and returns the medians."""
    problem, x, y0 = logistic_problem(*SIZES[name])
    _, truth = reference(problem, x, y0)
    size = float(jnp.linalg.norm(truth))

    def ours():
        return bilevel.hypergradient(problem, x, y0, rtol=accuracy).gradient

    calls, notes, compile_seconds = {"bilevel": ours}, {}, {}
    compile_seconds["bilevel"], gradient = timed(ours)
    notes["bilevel"] = f"error {float(jnp.linalg.norm(gradient - truth)) / size:.1e}"
    hg = bilevel.hypergradient(problem, x, y0, rtol=accuracy)
    notes["bilevel"] += (
        f", .error {float(hg.error) / size:.1e}, {int(hg.steps)} solver steps, {int(hg.evaluations)} gradients, "
        f"{int(hg.products)} products"
    )
    for peer, make in PEERS.items():
        if not installed(peer):
            notes[peer] = "not installed, skipped"
            continue
        function = make(problem, y0)
        compile_seconds[peer], _ = timed(lambda f=function: f(x, 1e-2, 1e-2))
        found = loosest(function, x, truth, accuracy)
        if found is None:
            notes[peer] = f"does not reach {accuracy:g}"
            continue
        tol, linear_tol, error = found
        notes[peer] = f"error {error:.1e} at tolerance {tol:.0e}, adjoint {linear_tol:.0e}"
        calls[peer] = lambda f=function, a=(x, tol, linear_tol): f(*a)
    seconds = {peer: [] for peer in calls}
    for _ in range(repeats):
        for peer, call in calls.items():
            seconds[peer].append(timed(call)[0])
    medians = {peer: float(np.median(s)) for peer, s in seconds.items()}
    print(f"\n{name}")
    for peer, note in notes.items():
        if peer in medians:
            ratio = medians[peer] / medians["bilevel"]
            first = compile_seconds[peer]
            print(
                f"  {peer:11s} {medians[peer]:8.3f} s  x{ratio:5.2f}  ({min(seconds[peer]):.3f} to "
                f"{max(seconds[peer]):.3f}; first call {first:.1f} s)  {note}"
            )
        else:
            print(f"  {peer:11s} {note}")
    return medians


def main() -> None:
    """Prints one table per problem, then the ratios against the faster peer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--accuracy", type=float, default=1e-6)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", default="", help="problems whose name contains this")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    names = ["jax", "jaxlib", "jaxopt", "equinox", "lineax", "optimistix"]
    print(", ".join(f"{name} {version(name)}" for name in names if installed(name)))
    print(f"time to a true relative error of {arguments.accuracy:g}, median of {arguments.repeats}, interleaved")
    rows = {}
    for name in SIZES:
        if arguments.only in name:
            rows[name] = run(name, arguments.accuracy, arguments.repeats)
    print("\nfaster peer / bilevel")
    for name, medians in rows.items():
        peers = [s for peer, s in medians.items() if peer != "bilevel"]
        print(f"  {name:32s} {min(peers) / medians['bilevel']:.2f}" if peers else f"  {name:32s} no peer")


if __name__ == "__main__":
    main()
