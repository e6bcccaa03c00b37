"""Tuning against its peers, in one run: `python -m benchmarks.tuning [CASE …] [--seconds 20]`.

Every method minimizes the same criterion on the same folds. A line gives validation and test loss, seconds, seconds
until a value within 1 % and within 1e-4 (relative) of the best of all methods was seen, and model fits (one for each
fold of each evaluation). Ours is timed twice: `first` with compilation, `again` without, as for every later data set
of the same shape. Optuna (TPE) gets `--seconds`, and at least twenty times what ours took, but no more than `--limit`.
The loops with jaxopt and optimistix are the same outer L-BFGS-B on their implicit hypergradients, warm-started, with
inner and adjoint tolerances of 1e-6, where the inner problem is smooth. They end where the line search finds nothing
better, ours where its projected gradient has fallen to 1e-7 (denoiser: 1e-10), and all at the limit. All but ours are
compiled before they are timed, and all have one thread of BLAS. On the multinomial model ours uses
`method="trust-region"`, else the default.
"""

from __future__ import annotations

import argparse
import time
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

import bilevel
from bilevel._compiling import one_thread

from . import _peers, one_of
from ._tuning_cases import CASES, Case

MOST = 10**5
"""Steps of an inner solver: sweeps of coordinate descent at a bound of the penalty, on features that nearly repeat each
other, are many and short."""


class Line(NamedTuple):
    """What one method reached."""

    method: str
    x: np.ndarray
    validation: float
    seconds: float
    fits: int
    seen: list[tuple[float, float]]  # (seconds, value) of what was evaluated

    def until(self, value: float) -> float:
        """Seconds until a value as good as this was seen, or infinity."""
        return min((seconds for seconds, v in self.seen if v <= value), default=float("inf"))


STEPS = 10**4
"""Steps of the outer methods, which time ends."""


_FAILS = (jax.errors.JaxRuntimeError, ValueError)
"""What JAX raises out of a callback, the one or the other."""


class _OutOfTime(Exception):
    pass


@eqx.filter_jit
def _value(problem, x, y0):
    found = bilevel.solve(problem.inner, x, y0, rtol=1e-6, throw=False)
    return problem.outer(x, found.y)


def ours(case: Case, limit: float) -> list[Line]:
    """With compilation, and without."""
    lines = []
    x0, y0 = case.problem.initial()
    for word in ("first", "again"):
        seen = []
        begin = time.perf_counter()

        def note(state, seen=seen, begin=begin):
            seen.append((time.perf_counter() - begin, state.value))
            if seen[-1][0] > limit:
                raise StopIteration

        found = bilevel.minimize(
            case.problem, x0, y0, method=case.method, bounds=case.bounds, tol=case.tol, max_steps=STEPS, callback=note,
            max_inner_steps=MOST,
        )  # fmt: skip
        seconds = time.perf_counter() - begin
        x = np.asarray(found.x)
        lines.append(Line(f"ours, {word}", x, found.value, seconds, found.hypergradients * case.folds, seen))
    return lines


def grid(case: Case) -> Line | None:
    """Thirty values of one number for all entries of x, which is what a grid can hold."""
    if case.shared is None:
        return None
    _, y0 = case.problem.initial()
    tried, seen = [], []
    jax.block_until_ready(_value(case.problem, case.shared(0.0), y0))
    begin = time.perf_counter()
    for t in np.linspace(*case.line, 30):
        x = case.shared(t)
        tried.append((float(_value(case.problem, x, y0)), np.asarray(x)))
        seen.append((time.perf_counter() - begin, tried[-1][0]))
    seconds = time.perf_counter() - begin
    value, x = min(tried, key=lambda pair: pair[0])
    return Line("grid, one for all", x, value, seconds, 30 * case.folds, seen)


def optuna_search(case: Case, seconds: float, seed: int) -> Line:
    """TPE on every entry of x."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    x0, y0 = case.problem.initial()
    jax.block_until_ready(_value(case.problem, x0, y0))
    lower, upper = (np.broadcast_to(side, x0.shape).ravel() for side in case.bounds)

    def objective(trial):
        x = [
            trial.suggest_float(f"x{i}", float(a), float(b)) for i, (a, b) in enumerate(zip(lower, upper, strict=True))
        ]
        value = float(_value(case.problem, jnp.asarray(x, float).reshape(x0.shape), y0))
        seen.append((time.perf_counter() - begin, value))
        return value if np.isfinite(value) else 1e10

    seen = []
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    begin = time.perf_counter()
    study.optimize(objective, timeout=seconds)
    seconds = time.perf_counter() - begin
    x = np.array([study.best_params[f"x{i}"] for i in range(x0.size)]).reshape(x0.shape)
    return Line(f"Optuna, seed {seed}", x, study.best_value, seconds, len(study.trials) * case.folds, seen)


def loop(case: Case, package: str, limit: float) -> Line | None:
    """L-BFGS-B on a peer's hypergradient, compiled before it is timed."""
    if not case.smooth or not _peers.installed(package):
        return None
    x0, y0 = case.problem.initial()
    both = jax.jit(jax.value_and_grad(_peers.OUTER[package](case.problem), has_aux=True))
    start = y0
    seen, begin = [], time.perf_counter()

    def function(x):
        nonlocal start
        (value, y), slope = both(jnp.asarray(x, float).reshape(x0.shape), start, 1e-6, 1e-6)
        value, slope, start = float(value), np.asarray(slope, float).ravel(), y
        seconds = time.perf_counter() - begin
        if seen and seconds > limit:
            raise _OutOfTime
        seen.append((seconds, value))
        points.append(np.array(x))
        return value, slope

    points: list[np.ndarray] = []
    try:
        function(np.asarray(x0, float).ravel())
    except _FAILS as error:
        print(f"  {package} loop: fails at its first hypergradient ({type(error).__name__})")
        return None
    ends: Any = [np.broadcast_to(side, x0.shape).ravel() for side in case.bounds]
    sides = scipy.optimize.Bounds(ends[0], ends[1])
    seen.clear()
    points.clear()
    start = y0
    begin = time.perf_counter()
    try:
        scipy.optimize.minimize(
            function, np.asarray(x0, float).ravel(), jac=True, bounds=sides, method="L-BFGS-B",
            options={"maxiter": STEPS, "maxfun": STEPS, "ftol": 0.0, "gtol": 0.0, "maxcor": 20},
        )  # fmt: skip
    except _OutOfTime:
        pass
    except _FAILS as error:
        print(f"  {package} loop: fails after {len(seen)} hypergradients ({type(error).__name__})")
    seconds = time.perf_counter() - begin
    best = int(np.argmin([value for _, value in seen]))
    return Line(f"{package} loop", points[best].reshape(x0.shape), seen[best][1], seconds, len(seen) * case.folds, seen)


def main() -> None:
    """Prints a table a case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "cases", nargs="*", type=one_of(CASES), metavar="CASE", help=f"of {', '.join(CASES)}; by default all"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="for Optuna, at least")
    parser.add_argument("--limit", type=float, default=200.0, help="seconds, of every other method's run")
    parser.add_argument("--seeds", type=int, default=1, help="of Optuna")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    with one_thread():
        for name in arguments.cases or CASES:
            compare(name, arguments)


def compare(name: str, arguments: argparse.Namespace) -> None:
    """Runs every method on a case, and prints."""
    case = CASES[name]()
    x0 = case.problem.initial()[0]
    loops = (loop(case, package, arguments.limit) for package in _peers.PEERS)
    lines = [line for line in (*ours(case, arguments.limit), grid(case), *loops) if line is not None]
    if _peers.installed("optuna"):
        seconds = min(arguments.limit, max(arguments.seconds, 20 * lines[1].seconds))
        lines += [optuna_search(case, seconds, seed) for seed in range(arguments.seeds)]
    show(name, case, x0.size, lines)


def show(name: str, case: Case, size: int, lines: list[Line]) -> None:
    """Prints what methods reached, with the test loss of the model refitted at their x."""
    print(f"\n{name}: {size} hyperparameters")
    print(f"  {'method':22s}{'validation':>12s}{'test':>12s}{'seconds':>9s}{'to 1 %':>9s}{'to 1e-4':>9s}{'fits':>7s}")
    best = min(line.validation for line in lines)
    for line in lines:
        test = case.test(jnp.asarray(line.x, float))
        until = (line.until(best + share * abs(best)) for share in (1e-2, 1e-4))
        words = "".join(f"{f'{s:.2f}' if np.isfinite(s) else 'no':>9s}" for s in until)
        print(
            f"  {line.method:22s}{line.validation:12.6g}{test:12.6g}{line.seconds:9.2f}{words}{line.fits:7d}",
            flush=True,
        )
    mine = lines[1]
    for line in lines[2:]:  # where there are several minima, the best of all methods is luck
        if line.method.endswith("loop"):
            own, theirs = (one.until(line.validation * (1 + 1e-4)) for one in (mine, line))
            own = f"{own:.2f} s" if np.isfinite(own) else "never"
            print(f"  to within 1e-4 of where the {line.method} ends: it {theirs:.2f} s, ours, again {own}")


if __name__ == "__main__":
    main()
