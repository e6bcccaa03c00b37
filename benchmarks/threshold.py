"""What a dense matrix and float32 cost against a gradient, which sets the defaults: `python -m benchmarks.threshold`.

Prints, per size of a logistic problem, milliseconds of one gradient, one Hessian-vector product, the dense Hessian and
its factorization, in float64 and float32. `bilevel.linear.DENSE_LIMIT` and `first_reduction` are read off it.
"""

from __future__ import annotations

import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from bilevel._precision import lowered
from bilevel.linear import Direct, linear_system

from ._problems import logistic_problem

SIZES = [(1000, 50), (2000, 200), (20000, 500), (2000, 1000), (4000, 2000), (4000, 3000)]


def milliseconds(function, *arguments, repeats: int = 5) -> float:
    """The median time of a jitted call."""
    function = eqx.filter_jit(function)
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times))


def main() -> None:
    """Prints the table."""
    jax.config.update("jax_enable_x64", True)
    print(
        f"{'n, d':>14s} {'dtype':>8s} {'gradient':>9s} {'product':>9s} {'matrix':>9s} {'factor':>9s}  matrix/gradient"
    )
    for n, d in SIZES:
        full = logistic_problem(n, d, "decaying", -6.0)
        for arguments in (full, lowered(full)):
            problem, x, y = arguments
            y = y + jnp.asarray(0.01, y.dtype)
            gradient = milliseconds(lambda p, x, y: p.inner.optimality(x, y), problem, x, y)
            product = milliseconds(lambda p, x, y: linear_system(p.inner, x, y)[1].mv(y), problem, x, y)
            matrix = milliseconds(lambda p, x, y: linear_system(p.inner, x, y)[1].matrix(), problem, x, y)
            factor = milliseconds(lambda p, x, y: Direct().prepare(linear_system(p.inner, x, y)[1]), problem, x, y)
            print(
                f"{f'{n}, {d}':>14s} {y.dtype!s:>8s} {gradient:9.2f} {product:9.2f} {matrix:9.2f} {factor:9.2f}  "
                f"{matrix / gradient:8.1f}"
            )


if __name__ == "__main__":
    main()
