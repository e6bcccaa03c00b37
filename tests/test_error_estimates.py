"""The error estimate over a thousand random problems: how often it holds, how sharp it is, how often it declines."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from bilevel.adjoint._evaluate import evaluate_value
from bilevel.linear import linear_system

from .helpers import KINDS, directions, distance, glm, reference, slopes, smooth

LONG = [
    pytest.param("estimate", 1000, marks=pytest.mark.slow),
    pytest.param("hypergradient", 500, marks=pytest.mark.slow),
]


@pytest.mark.long
@pytest.mark.parametrize(("call", "count"), [("estimate", 200), *LONG])
def test_a_thousand_problems(call, count):
    """Below 3 .error in at least 99 of 100; median ratio of estimate to truth between 1/2 and 2; untrusted apart."""
    ratios, untrusted, floored = [], 0, 0
    for seed in range(count):
        random = np.random.default_rng(seed)
        case = glm(KINDS[seed % 4], seed, 20, 4, 10.0 ** random.uniform(0, 4))
        truth = reference(*case)
        if call == "estimate":
            away = 10.0 ** random.uniform(-4, -1.5) * jnp.linalg.norm(truth.y) * directions(4, 1, seed)[0]
            found = bilevel.estimate(case.problem, case.x, truth.y + away)
        else:
            found = bilevel.hypergradient(*case, rtol=10.0 ** random.uniform(-7, -2), throw=False)
        if not found.converged:
            untrusted += 1
            continue
        wrong = distance(found.gradient, truth.gradient)
        assert np.isfinite(found.error)
        if wrong <= max(1e-13, 10 * truth.floor):
            floored += wrong <= 3 * float(found.error)  # round-off of both
            continue
        ratios.append(float(found.error) / wrong)
    ratios = np.asarray(ratios)
    print(f"{call}: {count} problems, {untrusted} declined, {len(ratios)} above round-off, below 3 .error: "
          f"{np.mean(ratios > 1 / 3):.2%}, median ratio {np.median(ratios):.3f}, "
          f"5 to 95 %: {np.quantile(ratios, 0.05):.3f} to {np.quantile(ratios, 0.95):.3f}")  # fmt: skip
    assert np.mean(ratios > 1 / 3) >= 0.99
    assert 0.5 < np.median(ratios) < 2
    assert untrusted < 0.2 * count
    assert len(ratios) > 0.2 * count or call == "hypergradient"  # or the test says nothing


@pytest.mark.parametrize("value_only", [False, True])
def test_the_value_given_to_line_searches_is_of_third_order(value_only):
    """G at y*, from a y beside it, with the adjoint and the step that the gradient's error is made of anyway."""
    case, solver = smooth(), bilevel.Direct()
    inner, x = case.problem.inner, case.x
    problem = bilevel.BilevelProblem(inner, inner.objective) if value_only else case.problem
    truth = reference(problem, x, case.y0)
    away = jnp.asarray([0.003, 0.01, 0.03])
    points = truth.y + away[None, :, None] * directions(6, 3)[:, None, :]

    def refined(y):
        if not value_only:
            return bilevel.ImplicitAdjoint(solver, correction=None).estimate(problem, x, y).refined
        state = solver.prepare(linear_system(inner, x, y)[1])
        return evaluate_value(problem, x, y, lambda flat: flat, solver, state).refined

    wrong = eqx.filter_jit(jax.vmap(jax.vmap(refined)))(points) - problem.outer(x, truth.y)
    np.testing.assert_allclose(slopes(jnp.linalg.norm(wrong, axis=0)[None], away), 3, atol=0.2)
