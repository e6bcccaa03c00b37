"""Where the outer function is the inner objective, h is the optimal value: no adjoint system is solved."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from bilevel import BilevelProblem, ImplicitAdjoint, Minimization

from .helpers import glm

CASE = glm("logistic", 3, 60, 12, 1e2)
INNER = CASE.problem.inner
FUNCTION = INNER.objective
SAME = BilevelProblem(Minimization(FUNCTION), FUNCTION)


def optimal(x):
    return bilevel.solve(INNER, x, CASE.y0, rtol=1e-13).y


def truth(x):
    return jax.grad(FUNCTION)(x, optimal(x))


@pytest.mark.long
def test_the_gradient_is_that_of_the_optimal_value():
    found = bilevel.hypergradient(SAME, CASE.x, CASE.y0, rtol=1e-8)
    exact = truth(CASE.x)
    wrong = float(jnp.linalg.norm(found.gradient - exact))
    assert wrong <= 1e-8 * float(jnp.linalg.norm(exact))
    assert wrong <= 3 * float(found.error)
    assert float(found.adjoint_residual) == 0
    np.testing.assert_allclose(found.gradient, jax.grad(FUNCTION)(CASE.x, found.y), rtol=1e-12)
    np.testing.assert_allclose(found.value, FUNCTION(CASE.x, found.y), rtol=1e-14)


def test_no_adjoint_system_is_solved():
    """With a matrix-free solver each solve costs products: one solve, the correction's, is what is left."""
    adjoint = ImplicitAdjoint(bilevel.ConjugateGradient())
    same = bilevel.estimate(SAME, CASE.x, optimal(CASE.x) + 1e-3, adjoint)
    other = bilevel.estimate(BilevelProblem(INNER, lambda x, y: FUNCTION(x, y)), CASE.x, same.y + 1e-3, adjoint)
    assert int(same.products) < 0.7 * int(other.products)


def test_its_error_is_estimated_like_any_other():
    exact, best = truth(CASE.x), optimal(CASE.x)
    direction = jnp.cos(jnp.arange(best.size, dtype=best.dtype))
    for size in (1e-2, 1e-3):
        found = bilevel.estimate(SAME, CASE.x, best + size * direction)
        ratio = float(found.error) / float(jnp.linalg.norm(found.gradient - exact))
        assert 1 / 1.3 < ratio < 1.3


def test_an_outer_function_flat_at_the_solution_needs_no_adjoint_either():
    scaled = BilevelProblem(INNER, lambda x, y: 3 * FUNCTION(x, y) + jnp.sum(x**2))
    found = bilevel.hypergradient(scaled, CASE.x, optimal(CASE.x), rtol=1e-8)
    np.testing.assert_allclose(found.gradient, 3 * truth(CASE.x) + 2 * CASE.x, rtol=1e-8)


@pytest.mark.long
def test_second_derivatives_and_transforms_of_the_value():
    value = lambda x: bilevel.hypergradient(SAME, x, CASE.y0).value
    np.testing.assert_allclose(jax.grad(value)(CASE.x), truth(CASE.x), rtol=1e-6)
    gradient = lambda x: bilevel.hypergradient(SAME, x, CASE.y0).gradient
    hessian = jax.jacfwd(gradient)(CASE.x)
    np.testing.assert_allclose(hessian, jax.jacfwd(truth)(CASE.x), rtol=1e-6, atol=1e-9)


class Loss(eqx.Module):
    """Data as leaves."""

    target: jax.Array

    def __call__(self, x, y):
        return jnp.sum((y - self.target) ** 2) + jnp.sum(jnp.exp(x) * y**2)


def test_equal_data_count_as_the_same_function_and_stay_together():
    target = jnp.arange(1.0, 4.0)
    problem = BilevelProblem(Minimization(Loss(target)), Loss(target + 0))
    assert problem.value_only
    assert not BilevelProblem(Minimization(Loss(target)), Loss(target + 1)).value_only
    assert not BilevelProblem(Minimization(Loss(target)), lambda x, y: Loss(target)(x, y)).value_only
    moved = eqx.tree_at(lambda p: p.outer.target, problem, 2 * target)  # new data: of both
    assert moved.inner.objective is moved.outer
    x = jnp.zeros(3)
    np.testing.assert_allclose(bilevel.hypergradient(moved, x, x, rtol=1e-10).gradient, target**2, rtol=1e-9)
