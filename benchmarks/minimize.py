"""What a whole outer minimization costs in inner gradients: `python -m benchmarks.minimize`.

The demo's problem: logistic regression on the breast-cancer data, five folds, one, three or thirty log-penalties.
Against `bilevel.minimize`: the same L-BFGS-B loop (SciPy's, same bounds) over hypergradients whose inner problems
are solved from zero to a fixed tolerance of 1e-8 each, by jaxopt's L-BFGS and by the engine's own choice. Both stop at
the same projected gradient; the final values are printed beside each other.
"""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize as so
from sklearn.datasets import load_breast_cancer

import bilevel
from problems.tuning import LogisticTuning

BOUNDS, TOL = (-7.0, 7.0), 1e-5
GROUPS = np.repeat([0, 1, 2], 10)
KINDS = {"one": {"penalties": "shared"}, "three": {"groups": GROUPS}, "thirty": {"penalties": "per-feature"}}


def demo_problem(kind: str):
    """The demo's criterion on the whole data set, features scaled."""
    X, labels = map(np.asarray, load_breast_cancer(return_X_y=True))
    return LogisticTuning((X - X.mean(0)) / X.std(0), labels, cv=5, **KINDS[kind])


def cold(problem, x0, y0, tol: float = 1e-8):
    """`(x, value, inner gradients)` of the same outer loop with inner solves from y0 to |F| <= tol, each counted."""
    from bilevel.solvers import Jaxopt

    @jax.jit
    def evaluate(x):
        found = Jaxopt().find(problem.inner, x, y0, tol=jnp.asarray(tol), max_steps=5000)
        result = bilevel.estimate(problem, x, found.y, bilevel.ImplicitAdjoint(correction=None))
        return result.value, result.gradient, found.evaluations

    spent = 0

    def function(flat):
        nonlocal spent
        value, gradient, evaluations = evaluate(jnp.asarray(flat).reshape(x0.shape))
        spent += int(evaluations) // 2 + 1  # jaxopt counts the value and the gradient of one evaluation apart
        return float(value), np.asarray(gradient, float).ravel()

    first = np.abs(function(np.asarray(x0).ravel())[1]).max()
    spent = 0
    out = so.minimize(
        function, np.asarray(x0).ravel(), jac=True, method="L-BFGS-B", bounds=[BOUNDS] * max(1, np.size(x0)),
        options={"gtol": TOL * max(1.0, first), "ftol": 0.0, "maxiter": 500},
    )  # fmt: skip
    return out.x, float(out.fun), spent


def main() -> None:
    """One line a number of penalties."""
    jax.config.update("jax_enable_x64", True)
    print(f"{'penalties':10s} {'ours: value':>14s} {'gradients':>10s} {'seconds':>8s}   {'cold: value':>14s} "
          f"{'gradients':>10s} {'seconds':>8s}   ratio")  # fmt: skip
    for kind in KINDS:
        problem = demo_problem(kind)
        x0, y0 = problem.initial()
        ours = lambda p=problem, x=x0, y=y0: bilevel.minimize(p, x, y, bounds=BOUNDS, tol=TOL)
        theirs = lambda p=problem, x=x0, y=y0: cold(p, x, y)
        ours()  # compile
        theirs()
        start = time.perf_counter()
        result = ours()
        middle = time.perf_counter()
        _, value, spent = theirs()
        end = time.perf_counter()
        print(
            f"{kind:10s} {float(result.value):14.9f} {result.evaluations:10d} {middle - start:8.2f}   {value:14.9f} "
            f"{spent:10d} {end - middle:8.2f}   {spent / result.evaluations:.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
