"""Solvers of inner problems: each for its kind, and Anderson acceleration against what it should beat."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from bilevel import FixedPoint, Minimization, Root, solvers

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import jaxopt

A = 0.95 * jnp.asarray(np.linalg.qr(np.random.default_rng(0).normal(size=(12, 12)))[0])
A = (A + A.T) / 2
X = jnp.linspace(-1, 1, 12)
CONTRACTION = FixedPoint(lambda x, y: jnp.tanh(A.astype(y.dtype) @ y + x))


def run(solver, dtype=jnp.float64, tol=1e-8):
    y0 = jnp.zeros(12, dtype)
    find = jax.jit(lambda x: solver.find(CONTRACTION, x, y0, tol=jnp.asarray(tol, dtype), max_steps=2000))
    found = find(X.astype(dtype))
    return found, float(jnp.linalg.norm(CONTRACTION.optimality(X.astype(dtype), found.y)))


def test_anderson_reaches_its_tolerance_in_fewer_steps_than_plain_iteration():
    accelerated, size = run(solvers.Anderson())
    plain, plain_size = run(solvers.Anderson(depth=0))
    assert size <= 1e-8
    assert plain_size <= 1e-8
    assert int(accelerated.steps) < int(plain.steps) / 2


def test_anderson_solves_a_linear_map_in_about_as_many_steps_as_unknowns():
    inner = FixedPoint(lambda x, y: A[:4, :4] @ y + x)
    found = solvers.Anderson(depth=4).find(inner, X[:4], jnp.zeros(4), tol=jnp.asarray(1e-9), max_steps=50)
    np.testing.assert_allclose(found.y, jnp.linalg.solve(jnp.eye(4) - A[:4, :4], X[:4]), rtol=1e-8)
    assert int(found.steps) <= 8


def test_anderson_survives_a_map_that_does_not_contract():
    inner = FixedPoint(lambda x, y: 3 * y + jnp.sin(5 * y) + x)
    found = solvers.Anderson().find(inner, X, jnp.ones(12), tol=jnp.asarray(1e-10), max_steps=30)
    assert int(found.steps) <= 30
    result = bilevel.solve(inner, X, jnp.ones(12), solver=solvers.Anderson(), throw=False)
    assert not result.converged or float(result.residual) < 1e-8


@pytest.mark.parametrize("solver", [solvers.Anderson(), solvers.Jaxopt(jaxopt.FixedPointIteration)])
def test_float32_with_x64_enabled(solver):
    found, size = run(solver, jnp.float32, 1e-5)
    assert found.y.dtype == jnp.float32
    assert size <= 1e-5


def test_jaxopts_fixed_point_solvers_and_what_they_cannot_do():
    truth = bilevel.solve(CONTRACTION, X, jnp.zeros(12)).y
    for make in (jaxopt.AndersonAcceleration, jaxopt.FixedPointIteration):
        np.testing.assert_allclose(bilevel.solve(CONTRACTION, X, jnp.zeros(12), solver=make).y, truth, rtol=1e-8)
    low = X.astype(jnp.float32)
    with pytest.raises(ValueError, match=r"AndersonAcceleration cannot be traced in float32"):
        bilevel.solve(CONTRACTION, low, jnp.zeros(12, jnp.float32), solver=jaxopt.AndersonAcceleration)
    square = Minimization(lambda x, y: jnp.sum((y - x) ** 2))
    hager = solvers.Jaxopt(jaxopt.LBFGS, linesearch="hager-zhang")
    with pytest.raises(ValueError, match=r"Hager-Zhang line search cannot be traced"):
        bilevel.solve(square, low, jnp.zeros(12, jnp.float32), solver=hager)


def test_solvers_of_another_kind_are_refused_in_a_sentence():
    import optimistix

    root = Root(lambda x, y: y**3 - x)
    square = Minimization(lambda x, y: jnp.sum((y - x) ** 2))
    for inner, solver, says in (
        (root, jaxopt.LBFGS, r"jaxopt\.LBFGS minimizes an objective, and Root has none"),
        (root, optimistix.BFGS(1e-8, 1e-8), r"optimistix\.BFGS minimizes an objective, and Root has none"),
        (square, jaxopt.AndersonAcceleration, r"AndersonAcceleration iterates a fixed-point map, and Minimization"),
        (square, optimistix.FixedPointIteration(1e-8, 1e-8), r"FixedPointIteration iterates a fixed-point map"),
        (square, solvers.Anderson(), r"Anderson: Minimization has no step"),
    ):
        with pytest.raises(ValueError, match=says):
            bilevel.solve(inner, X, jnp.ones(12), solver=solver)
    with pytest.raises(ValueError, match="depth"):
        solvers.Anderson(depth=-1)
