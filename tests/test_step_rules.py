"""The other derivative rules: what each differentiates, and the order of its error in the inner error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from bilevel import (
    FixedPoint,
    ImplicitAdjoint,
    JacobianFreeAdjoint,
    Minimization,
    NeumannAdjoint,
    OneStepAdjoint,
    UnrolledAdjoint,
)

from .helpers import directions, reference, slopes, smooth

CASE = smooth()
TRUTH = reference(*CASE)
WAYS = directions(6, 3)
F = CASE.problem.inner.optimality
H = np.asarray(TRUTH.hessian)
COUPLING = np.asarray(jax.jacfwd(F)(CASE.x, TRUTH.y))
G_X, G_Y = (np.asarray(g) for g in jax.grad(CASE.problem.outer, argnums=(0, 1))(CASE.x, TRUTH.y))


def step():
    """The own step's size: 1 / |F_y|, by power iteration with a safety factor of 1.05."""
    from bilevel.adjoint._others import step_size

    return float(step_size(CASE.problem.inner, CASE.x, TRUTH.y))


def series(terms: int) -> np.ndarray:
    """G_x - F_x' a sum_{k < terms} (I - a F_y)^k G_y at y*."""
    a = step()
    total = sum(np.linalg.matrix_power(np.eye(6) - a * H, k) for k in range(terms))
    return G_X - COUPLING.T @ (a * total @ G_Y)


@pytest.mark.parametrize(
    ("rule", "terms"),
    [(UnrolledAdjoint(7), 7), (NeumannAdjoint(6), 7), (OneStepAdjoint(), 1), (JacobianFreeAdjoint(), 1)],
    ids=["unrolled", "neumann", "one_step", "jacobian_free"],
)
def test_at_the_solution_each_is_its_truncated_series(rule, terms):
    found = bilevel.estimate(CASE.problem, CASE.x, TRUTH.y, rule)
    np.testing.assert_allclose(found.gradient, series(terms), rtol=1e-8)
    bias = np.linalg.norm(series(terms) - TRUTH.gradient)
    assert bias > 1e-3  # order 0: a bias stays at y*, and the error says how large it is
    np.testing.assert_allclose(found.error, bias, rtol=1e-5)


def test_the_step_is_one_over_the_norm():
    assert 0.9 / np.linalg.norm(H, 2) < step() < 1.0 / np.linalg.norm(H, 2) * 1.02


@pytest.mark.parametrize("rule", [UnrolledAdjoint(600), NeumannAdjoint(600)], ids=["unrolled", "neumann"])
def test_with_many_terms_the_order(rule):
    """Unrolling moves the point too, so the inner error is gone; the series stays at y: order one."""
    distances = jnp.asarray([1e-4, 1e-3, 1e-2])
    points = TRUTH.y + distances[None, :, None] * WAYS[:, None, :]
    found = jax.vmap(jax.vmap(lambda y: bilevel.estimate(CASE.problem, CASE.x, y, rule).gradient))(points)
    wrong = jnp.linalg.norm(found - TRUTH.gradient, axis=-1)
    if isinstance(rule, UnrolledAdjoint):
        assert np.max(wrong) < 1e-9
    else:
        np.testing.assert_allclose(slopes(wrong, distances), 1, atol=0.05)


@pytest.mark.long
def test_solve_differentiates_by_the_rule_in_both_modes():
    exact = jax.jacrev(lambda x: bilevel.solve(CASE.problem.inner, x, CASE.y0).y)(CASE.x)
    for rule, close in ((UnrolledAdjoint(600), True), (NeumannAdjoint(600), True), (OneStepAdjoint(), False)):
        solved = lambda x, rule=rule: bilevel.solve(CASE.problem.inner, x, CASE.y0, adjoint=rule).y
        back = jax.jacrev(solved)(CASE.x)
        np.testing.assert_allclose(back, jax.jacfwd(solved)(CASE.x), atol=1e-10)
        assert (np.linalg.norm(back - exact) < 1e-7) == close


def test_a_fixed_point_is_its_own_step():
    """T = cos(A y + x): one step, and the jacobian-free rule, use T_x and nothing else."""
    A = 0.3 * jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)))
    problem = bilevel.BilevelProblem(
        FixedPoint(lambda x, y: jnp.cos(A @ y + x)), lambda x, y: jnp.sum(y**2) + jnp.sum(x)
    )
    x, y0 = jnp.asarray([0.1, 0.4, -0.3, 0.8]), jnp.zeros(4)
    y = bilevel.solve(problem.inner, x, y0).y
    expected = 1 - jnp.sin(A @ y + x) * 2 * y
    for rule in (JacobianFreeAdjoint(), OneStepAdjoint(), UnrolledAdjoint(1), NeumannAdjoint(0)):
        np.testing.assert_allclose(bilevel.estimate(problem, x, y, rule).gradient, expected, rtol=1e-7)


def test_bad_counts():
    for bad in (0, -1):
        with pytest.raises(ValueError, match="steps"):
            UnrolledAdjoint(bad)
    with pytest.raises(ValueError, match="terms"):
        NeumannAdjoint(-1)


@pytest.mark.long
@pytest.mark.parametrize("correction", [None, bilevel.Newton(), bilevel.Jacobi(steps=2)])
def test_the_efficiency_constant_is_the_norm_of_the_estimates_derivative(correction):
    rule = ImplicitAdjoint(correction=correction, guard=False)
    constant = bilevel.efficiency_constant(CASE.problem, CASE.x, rule, y0=CASE.y0)
    t = 1e-5
    points = TRUTH.y + t * jnp.stack([jnp.eye(6), -jnp.eye(6)], axis=1)
    found = jax.vmap(jax.vmap(lambda y: bilevel.estimate(CASE.problem, CASE.x, y, rule).gradient))(points)
    measured = np.linalg.norm(np.asarray(found[:, 0] - found[:, 1]) / (2 * t), 2)
    np.testing.assert_allclose(constant.value, measured, rtol=1e-4, atol=1e-7)
    if correction is None:
        parts = [float(constant.jacobian), float(constant.curvature), float(constant.coupling)]
        assert all(p > 0 for p in parts)
        assert float(constant.value) <= sum(parts)
    assert "value=" in repr(constant)


def test_the_three_parts_of_the_constant_vanish_when_their_cause_does():
    quadratic = smooth(quadratic=True)
    inner = Minimization(lambda x, y: 0.5 * jnp.sum(y**2) - jnp.vdot(x, y[:4]))
    plain = ImplicitAdjoint(correction=None)
    affine = lambda x, y: jnp.sum(y) + jnp.vdot(x, x)
    constant = bilevel.efficiency_constant(bilevel.BilevelProblem(inner, affine), CASE.x, plain, y0=jnp.zeros(6))
    np.testing.assert_allclose(
        [constant.value, constant.jacobian, constant.curvature, constant.coupling], 0, atol=1e-12
    )
    curved = bilevel.efficiency_constant(
        bilevel.BilevelProblem(inner, lambda x, y: jnp.sum(y**2)), CASE.x, plain, y0=jnp.zeros(6)
    )
    np.testing.assert_allclose([curved.value, curved.jacobian, curved.coupling], [2, 0, 0], atol=1e-9)
    mixed = bilevel.efficiency_constant(
        bilevel.BilevelProblem(inner, lambda x, y: jnp.vdot(x, y[:4])), CASE.x, plain, y0=jnp.zeros(6)
    )
    np.testing.assert_allclose([mixed.value, mixed.jacobian, mixed.curvature], [1, 0, 0], atol=1e-9)
    with pytest.raises(TypeError, match="ImplicitAdjoint"):
        bilevel.efficiency_constant(quadratic.problem, quadratic.x, OneStepAdjoint(), y0=quadratic.y0)


@pytest.mark.long
def test_hessian_vector_products_and_their_second_order():
    h = lambda x: CASE.problem.outer(x, bilevel.solve(CASE.problem.inner, x, CASE.y0).y)
    hessian = jax.hessian(h)(CASE.x)
    v = jnp.asarray([1.0, -2.0, 0.5, 3.0])
    exact = hessian @ v
    product = lambda y: bilevel.hessian_vector_product(CASE.problem, CASE.x, y, v)
    np.testing.assert_allclose(product(TRUTH.y), exact, rtol=1e-8)
    distances = jnp.asarray(np.logspace(-3.5, -2, 5))
    wrong = [[float(jnp.linalg.norm(product(TRUTH.y + t * w) - exact)) for t in distances] for w in WAYS]
    np.testing.assert_allclose(slopes(wrong, distances), 2, atol=0.1)
    with pytest.raises(ValueError, match="`v`"):
        bilevel.hessian_vector_product(CASE.problem, CASE.x, TRUTH.y, v[:2])
