"""What accuracy costs with each estimator: `python -m benchmarks.accuracy`.

Seconds and products with dF/dy until the *true* relative error of the hypergradient is 1e-3, 1e-6, 1e-9, on the
problems of `benchmarks.hypergradient` and on ridge regression with a condition number of 1e5. Every estimator is asked
for the accuracy through `bilevel.hypergradient(…, rtol=…)`, compiled first, then timed in turns; the reference is
dense Newton in float64. A row that does not get there, by its own word or by the reference, says so.
"""

from __future__ import annotations

import argparse
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from bilevel import ConjugateGradient, Direct, ImplicitAdjoint

from ._problems import SIZES, logistic_problem, reference

ESTIMATORS = {
    "default": None,
    "Newton, dense": ImplicitAdjoint(Direct()),
    "Newton, CG": ImplicitAdjoint(ConjugateGradient()),
    "plain, dense": ImplicitAdjoint(Direct(), correction=None),
    "plain, CG": ImplicitAdjoint(ConjugateGradient(), correction=None),
    "linearized": bilevel.LinearizedAdjoint(),
    "Jacobi": ImplicitAdjoint(correction=bilevel.Jacobi()),
}
ACCURACIES = (1e-3, 1e-6, 1e-9)


class Ridge(eqx.Module):
    """|A y - b|^2 / (2 n), plus exp(x_j) y_j^2 / (2 d) summed where `penalized`."""

    A: jax.Array
    b: jax.Array
    penalized: bool = eqx.field(static=True)

    def __call__(self, x, y):
        loss = 0.5 * jnp.mean((self.A @ y - self.b) ** 2)
        return loss + 0.5 / y.size * jnp.sum(jnp.exp(x) * y**2) if self.penalized else loss


def ridge_problem(n: int = 1000, d: int = 400, cond: float = 1e5, seed: int = 0):
    """`(problem, x, y0)`: features whose scales fall so that the inner Hessian has this condition number."""
    random = np.random.RandomState(seed)
    scales = np.logspace(0, -0.5 * np.log10(cond), d)
    truth = random.randn(d)

    def draw(count):
        A = random.randn(count, d) * scales
        return jnp.asarray(A), jnp.asarray(A @ truth + 0.3 * random.randn(count))

    problem = bilevel.BilevelProblem(bilevel.Minimization(Ridge(*draw(n), True)), Ridge(*draw(n), False))
    return problem, jnp.full(d, np.log(d / cond)), jnp.zeros(d)


def problems():
    """Names and makers."""
    yield "ridge, condition 1e5 (1000, 400)", ridge_problem
    for name, size in SIZES.items():
        yield name, lambda size=size: logistic_problem(*size)


def main() -> None:
    """Prints, per problem and accuracy, a line an estimator, and the default against the fastest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="problems whose name contains this")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    summary = []
    for name, make in problems():
        if arguments.only not in name:
            continue
        problem, x, y0 = make()
        _, truth = reference(problem, x, y0)
        size = float(jnp.linalg.norm(truth))
        for accuracy in ACCURACIES:
            print(f"\n{name}, relative error {accuracy:g}")
            calls, seconds = {}, {}
            for key, rule in ESTIMATORS.items():
                if (key == "Jacobi" and x.size > 500) or ("dense" in key and x.size > 2000):
                    print(f"  {key:14s} not run: what it needs of the matrix alone costs {x.size} products")
                    continue

                def call(problem=problem, x=x, y0=y0, rule=rule, accuracy=accuracy):
                    return bilevel.hypergradient(problem, x, y0, rtol=accuracy, adjoint=rule, throw=False)

                found = call()
                error = float(jnp.linalg.norm(found.gradient - truth)) / size
                facts = f"{int(found.products):6d} products {int(found.evaluations):6d} gradients, error {error:.1e}"
                if not bool(found.converged) or not error <= accuracy:
                    print(f"  {key:14s} does not get there: {found.status.word}, {facts}")
                    continue
                calls[key] = (call, facts)
                seconds[key] = []
            for _ in range(arguments.repeats):
                for key, (call, _) in calls.items():
                    start = time.perf_counter()
                    jax.block_until_ready(call().gradient)
                    seconds[key].append(time.perf_counter() - start)
            medians = {key: float(np.median(s)) for key, s in seconds.items()}
            for key, (_, facts) in calls.items():
                print(f"  {key:14s} {medians[key]:8.4f} s {facts}", flush=True)
            if "default" in medians:
                best = min(medians, key=lambda key: medians[key])
                summary.append((name, accuracy, medians["default"] / medians[best], best))
    print("\ndefault against the fastest")
    for name, accuracy, ratio, best in summary:
        print(f"  {name:36s} {accuracy:7.0e}  {ratio:5.2f}  (fastest: {best})")


if __name__ == "__main__":
    main()
