"""Tuning against its peers, in one run: `python -m benchmarks.tuning [CASE …] [--seconds 20]`.

Every method minimizes the same criterion on the same folds. A line gives validation and test loss, seconds and model
fits (one for each fold of each evaluation). Ours is timed twice: `first` with compilation, `again` without, as for
every later data set of the same shape. Optuna (TPE) gets `--seconds`, and at least twenty times what ours took. The
loops with jaxopt and optimistix are the same outer L-BFGS-B on their implicit hypergradients, with inner and adjoint
tolerances of 1e-6; they are run where the inner problem is smooth. All but ours are compiled before they are timed.
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

from . import _peers
from ._tuning_cases import CASES, Case


class Line(NamedTuple):
    """What one method reached."""

    method: str
    x: np.ndarray
    validation: float
    seconds: float
    fits: int


@eqx.filter_jit
def _value(problem, x, y0):
    found = bilevel.solve(problem.inner, x, y0, rtol=1e-6, throw=False)
    return problem.outer(x, found.y)


def ours(case: Case) -> list[Line]:
    """With compilation, and without."""
    lines = []
    x0, y0 = case.problem.initial()
    for word in ("first", "again"):
        begin = time.perf_counter()
        found = bilevel.minimize(case.problem, x0, y0, bounds=case.bounds, tol=1e-5, max_steps=case.steps)
        seconds = time.perf_counter() - begin
        x = np.asarray(found.x)
        lines.append(Line(f"ours, {word}", x, found.value, seconds, found.hypergradients * case.folds))
    return lines


def grid(case: Case) -> Line | None:
    """Thirty values of one number for all entries of x, which is what a grid can hold."""
    if case.shared is None:
        return None
    _, y0 = case.problem.initial()
    tried = []
    jax.block_until_ready(_value(case.problem, case.shared(0.0), y0))
    begin = time.perf_counter()
    for t in np.linspace(*case.line, 30):
        x = case.shared(t)
        tried.append((float(_value(case.problem, x, y0)), np.asarray(x)))
    seconds = time.perf_counter() - begin
    value, x = min(tried, key=lambda pair: pair[0])
    return Line("grid, one for all", x, value, seconds, 30 * case.folds)


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
        return value if np.isfinite(value) else 1e10

    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    begin = time.perf_counter()
    study.optimize(objective, timeout=seconds)
    seconds = time.perf_counter() - begin
    x = np.array([study.best_params[f"x{i}"] for i in range(x0.size)]).reshape(x0.shape)
    return Line(f"Optuna, seed {seed}", x, study.best_value, seconds, len(study.trials) * case.folds)


def loop(case: Case, package: str) -> Line | None:
    """L-BFGS-B on a peer's hypergradient, compiled before it is timed."""
    if not case.smooth or not _peers.installed(package):
        return None
    x0, y0 = case.problem.initial()
    gradient = _peers.PEERS[package](case.problem, y0)
    count = 0

    def function(x):
        nonlocal count
        count += 1
        at = jnp.asarray(x, float).reshape(x0.shape)
        return float(_value(case.problem, at, y0)), np.asarray(gradient(at, 1e-6, 1e-6), float).ravel()

    function(np.asarray(x0, float).ravel())
    ends: Any = [np.broadcast_to(side, x0.shape).ravel() for side in case.bounds]
    sides = scipy.optimize.Bounds(ends[0], ends[1])
    begin = time.perf_counter()
    found = scipy.optimize.minimize(
        function, np.asarray(x0, float).ravel(), jac=True, bounds=sides, method="L-BFGS-B",
        options={"maxiter": case.steps},
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    return Line(f"{package} loop", found.x.reshape(x0.shape), float(found.fun), seconds, (count - 1) * case.folds)


def main() -> None:
    """Prints a table a case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=list(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--seconds", type=float, default=20.0, help="for Optuna, at least")
    parser.add_argument("--seeds", type=int, default=1, help="of Optuna")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    for name in arguments.cases:
        case = CASES[name]()
        x0 = case.problem.initial()[0]
        print(f"\n{name}: {x0.size} hyperparameters")
        print(f"  {'method':22s}{'validation':>14s}{'test':>14s}{'seconds':>10s}{'fits':>8s}")
        lines = ours(case)
        show(case, lines)
        for line in (grid(case), *(loop(case, package) for package in _peers.PEERS)):
            show(case, [line] if line is not None else [])
        if _peers.installed("optuna"):
            for seed in range(arguments.seeds):
                show(case, [optuna_search(case, max(arguments.seconds, 20 * lines[-1].seconds), seed)])


def show(case: Case, lines: list[Line]) -> None:
    """Prints what methods reached, with the test loss of the model refitted at their x."""
    for line in lines:
        test = case.test(jnp.asarray(line.x, float))
        print(f"  {line.method:22s}{line.validation:14.6g}{test:14.6g}{line.seconds:10.2f}{line.fits:8d}", flush=True)


if __name__ == "__main__":
    main()
