"""What an eye that had not seen the code found: wrong numbers and wrong words, each right or refused now."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import bilevel
from bilevel import BilevelProblem, Composite, ImplicitAdjoint, Minimization, NotConverged, prox


@pytest.mark.long
def test_a_prox_that_maps_nan_to_a_number_hides_nothing():
    A = jnp.ones((3, 2)).at[1, 1].set(jnp.nan)
    inner = Composite(lambda x, y: 0.5 * jnp.sum((A @ y - 1) ** 2) + x * jnp.sum(y**2), prox.l1(0.1))
    with pytest.raises(NotConverged, match="`A`"):
        bilevel.solve(inner, jnp.array(0.1), jnp.ones(2))
    found = bilevel.hypergradient(
        BilevelProblem(inner, lambda x, y: jnp.sum(y)), jnp.array(0.1), jnp.ones(2), throw=False
    )
    assert found.status == "non_finite"


def saddle(x, y):
    return 0.5 * (y[0] ** 2 - y[1] ** 2) - x * y[0] - x * y[1]


@pytest.mark.parametrize("way", ["operator", "krylov", "lu"])
def test_a_saddle_is_no_minimum_whoever_solves(way):
    operator = (lambda x, y: lx.DiagonalLinearOperator(jnp.array([1.0, -1.0]))) if way == "operator" else None
    solver = {"operator": None, "krylov": bilevel.Krylov(), "lu": lx.LU()}[way]
    problem = BilevelProblem(Minimization(saddle, operator=operator), lambda x, y: jnp.sum(y))
    adjoint = ImplicitAdjoint(solver)
    found = bilevel.estimate(problem, jnp.array(1.0), jnp.array([1.1, -1.0]), adjoint)
    assert found.status == "not_a_minimum"
    assert jnp.isnan(found.gradient)


def flat(x, y):
    return 0.5 * (y[0] - x) ** 2 + 0 * y[1]


def test_failure_under_a_plain_grad_is_said_in_words():
    with pytest.raises(NotConverged, match="singular"):
        jax.grad(lambda x: bilevel.solve(flat, x, jnp.zeros(2)).y[0])(1.0)
    with pytest.raises(NotConverged, match="`x`: "):
        jax.grad(lambda x: bilevel.solve(flat, x, jnp.zeros(2)).y[0])(jnp.nan)
    with pytest.raises(NotConverged, match=r"bilevel\.solve"):  # closes over the traced value
        jax.grad(lambda x: bilevel.solve(lambda _, y: flat(x, y), x, jnp.zeros(2)).y[0])(1.0)


ONES, TILT = jnp.ones(4), jnp.array([1.0, -2.0, 0.5, 0.3])


def test_an_outer_function_that_slides_is_refused_from_every_start():
    inner = Minimization(lambda x, y: 0.5 * jnp.sum((y - jnp.mean(y) - jnp.sin(x) * TILT) ** 2), gauge=[ONES])
    problem = BilevelProblem(inner, lambda x, y: TILT @ (y - jnp.mean(y)) + x * jnp.sum(y) ** 2)
    for y0 in (jnp.zeros(4), ONES):
        found = bilevel.hypergradient(problem, jnp.array(0.4), y0, throw=False)
        assert found.status == "gauge_dependent"


def test_a_declared_operator_and_a_gauge_together():
    inner = Minimization(
        lambda x, y: 0.5 * jnp.sum((y - jnp.mean(y) - x * TILT) ** 2),
        operator=lambda x, y: lx.MatrixLinearOperator(jnp.eye(4) - 0.25, lx.symmetric_tag),
        gauge=[ONES],
    )
    off = TILT - jnp.mean(TILT)
    problem = BilevelProblem(inner, lambda x, y: jnp.sum((y - jnp.mean(y) - 1.0) ** 2 * TILT))
    found = bilevel.hypergradient(problem, jnp.array(0.4), jnp.zeros(4))
    np.testing.assert_allclose(found.gradient, jnp.sum(2 * (0.4 * off - 1) * TILT * off), rtol=1e-10)


def test_a_slope_is_no_noise_because_another_is_steep():
    wide = jnp.float32
    problem = BilevelProblem(
        lambda x, y: 0.5 * (y[0] - 1) ** 2 + 0.5 * (y[1] - x) ** 2,
        lambda x, y: 0.5 * wide(1e6) * (y[0] - 1) ** 2 + y[1] + wide(1e7),
    )
    found = bilevel.hypergradient(problem, wide(0.5), jnp.zeros(2, wide), rtol=1e-3)
    np.testing.assert_allclose(found.gradient, 1, rtol=1e-5)


def test_bounds_and_a_prox_are_two_problems():
    problem = BilevelProblem(lambda x, y: jnp.sum((y - x) ** 2), lambda x, y: jnp.sum((y - 1) ** 2))
    with pytest.raises(ValueError, match="`bounds` and a prox"):
        bilevel.minimize(problem, jnp.zeros(2), jnp.zeros(2), prox=lambda x, t: x, bounds=(-0.5, 0.5))
    found = bilevel.minimize(problem, jnp.zeros(2), jnp.zeros(2), prox=prox.l1(0.5))
    np.testing.assert_allclose(found.x, 0.75, rtol=1e-5)  # 2 (x - 1) + 0.5 = 0


def test_a_residual_in_integers():
    with pytest.raises(ValueError, match="floating dtype, found int"):
        bilevel.solve(bilevel.Root(lambda x, y: jnp.round(y - x).astype(int)), jnp.ones(2), jnp.zeros(2))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: prox.l1(-1.0), "l1: weight"),
        (lambda: prox.elastic_net(0.1, -5.0), "l2_weight"),
        (lambda: prox.group_lasso(jnp.nan), "group_lasso"),
        (lambda: prox.box(1.0, -1.0), "above upper"),
        (lambda: prox.simplex(0.0), "positive"),
        (lambda: prox.l2_ball(-1.0), "positive"),
    ],
)
def test_parameters_of_a_prox(make, match):
    with pytest.raises(ValueError, match=match):
        make()
