"""Approximate inverses: a preconditioner leaves the limit exact; the bound on the error holds."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from bilevel import (
    ConjugateGradient,
    ErrorBound,
    FrozenHessian,
    ImplicitAdjoint,
    Minimization,
    Nystrom,
    Preconditioner,
    ScaledIdentity,
    SecantInverse,
)
from bilevel.linear import linear_system

from .helpers import directions, distance, reference, relative, smooth

CASE = smooth(2)
TRUTH = reference(*CASE)


def spiked(n=120, spikes=10):
    """Some eigenvalues stand out from a flat rest."""
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.normal(size=(n, n)))[0]
    values = np.ones(n)
    values[:spikes] = np.logspace(2, 5, spikes)
    H = jnp.asarray(Q @ np.diag(values) @ Q.T)
    return Minimization(lambda x, y: 0.5 * y @ (H @ y) - jnp.vdot(x, y)), H


def test_nystrom_is_a_preconditioner_with_an_exact_limit():
    inner, H = spiked(120, 40)
    b = jnp.cos(jnp.arange(120.0))
    _, system = linear_system(inner, b, jnp.zeros(120))
    plain = ConjugateGradient(rtol=1e-10)
    better = ConjugateGradient(rtol=1e-10, preconditioner=Nystrom(45))
    counts = {}
    for name, solver in (("plain", plain), ("nystrom", better)):
        out = solver.solve(solver.prepare(system), system, b)
        np.testing.assert_allclose(H @ out.value, b, atol=1e-7)
        counts[name] = int(out.products)
    assert counts["nystrom"] < counts["plain"] / 2
    with pytest.raises(ValueError, match="rank"):
        Nystrom(0)


def test_nystrom_of_full_rank_is_the_inverse():
    """Nyström = the dense inverse of the same matrix."""
    inner, H = spiked(20, 5)
    _, system = linear_system(inner, jnp.zeros(20), jnp.zeros(20))
    solver = Nystrom(20)
    state = solver.prepare(system)
    v = jnp.sin(jnp.arange(20.0))
    applied = solver.apply(state, v) / state.last  # the preconditioner is scaled by its smallest eigenvalue
    np.testing.assert_allclose(applied, jnp.linalg.solve(H, v), rtol=1e-6, atol=1e-8)


def pairs(count=6):
    """Secant pairs around the solution."""
    F = CASE.problem.inner.optimality
    points = TRUTH.y + 1e-2 * jnp.concatenate([jnp.zeros((1, 6)), jnp.cumsum(directions(6, count), axis=0)])
    values = jax.vmap(lambda y: F(CASE.x, y))(points)
    return SecantInverse(jnp.diff(points, axis=0), jnp.diff(values, axis=0))


def test_the_secant_inverse_is_the_dense_recursion():
    """B <- (I - r s d') B (I - r d s') + r s s', from the newest pair's scaling."""
    secant = pairs()
    s, d = np.asarray(secant.s), np.asarray(secant.d)
    B = np.eye(6) * (s[-1] @ d[-1]) / (d[-1] @ d[-1])
    for a, b in zip(s, d, strict=True):
        r = 1 / (a @ b)
        B = (np.eye(6) - r * np.outer(a, b)) @ B @ (np.eye(6) - r * np.outer(b, a)) + r * np.outer(a, a)
    v = np.linspace(-1, 1, 6)
    np.testing.assert_allclose(secant.multiply(jnp.asarray(v)), B @ v, rtol=1e-10)
    np.testing.assert_allclose(secant.multiply(secant.d[-1]), secant.s[-1], rtol=1e-10)  # the secant equation


@pytest.mark.long
def test_secant_pairs_of_the_inner_solver_precondition_and_leave_the_limit_exact():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import jaxopt

    solver = jaxopt.LBFGS(lambda y: CASE.problem.inner.objective(CASE.x, y), maxiter=12, tol=1e-8)
    secant = SecantInverse.of_jaxopt(solver.run(CASE.y0).state)
    adjoint = ImplicitAdjoint(ConjugateGradient(preconditioner=secant))
    found = bilevel.hypergradient(*CASE, rtol=1e-8, adjoint=adjoint)
    assert relative(found.gradient, TRUTH.gradient) < 1e-8
    correction = ImplicitAdjoint(correction=Preconditioner(secant))
    near = TRUTH.y + 1e-3 * directions(6, 1)[0]
    moved = bilevel.estimate(CASE.problem, CASE.x, near, correction)
    assert distance(moved.y, TRUTH.y) < 0.5 * distance(near, TRUTH.y)
    with pytest.raises(ValueError, match="one shape"):
        SecantInverse(jnp.zeros((2, 3)), jnp.zeros((3, 3)))


def test_a_frozen_hessian_and_a_scaled_identity_as_corrections():
    near = TRUTH.y + 1e-3 * directions(6, 1)[0]
    frozen = Preconditioner(FrozenHessian(CASE.problem.inner, CASE.x, TRUTH.y))
    size = float(jnp.linalg.norm(TRUTH.hessian, 2))
    F = CASE.problem.inner.optimality(CASE.x, near)
    moved = bilevel.estimate(CASE.problem, CASE.x, near, ImplicitAdjoint(correction=frozen))
    np.testing.assert_allclose(moved.y, near - jnp.linalg.solve(TRUTH.hessian, F), rtol=1e-10)
    gradient_step = ImplicitAdjoint(correction=Preconditioner(ScaledIdentity(size)))
    np.testing.assert_allclose(
        bilevel.estimate(CASE.problem, CASE.x, near, gradient_step).y, near - F / size, rtol=1e-12
    )


@functools.cache
def constants() -> ErrorBound:
    """For the smooth problem, from its dense derivatives around the solution, with a margin."""
    inner, outer, x = CASE.problem.inner, CASE.problem.outer, CASE.x
    F = inner.optimality
    points = TRUTH.y + 0.05 * directions(6, 40, 3)
    ways = jnp.concatenate([directions(6, 12, 9), jnp.eye(6)])
    norm = lambda matrix: float(jnp.linalg.norm(matrix, 2))

    def third(f) -> float:
        size = lambda p, d: jnp.linalg.norm(jax.jvp(lambda y: f(x, y), (p,), (d,))[1], 2)
        return float(jnp.max(jax.jit(jax.vmap(jax.vmap(size, (None, 0)), (0, None)))(points[:4], ways)))

    hessians = jax.jit(jax.vmap(lambda p: jax.jacfwd(F, argnums=1)(x, p)))(points)
    g_x, g_y = jax.grad(outer, argnums=0), jax.grad(outer, argnums=1)
    return ErrorBound(
        0.9 * float(jnp.min(jnp.linalg.eigvalsh(hessians))),
        outer_x=1.1 * norm(jax.jacfwd(g_x, argnums=1)(x, TRUTH.y)),
        outer_y=1.1 * norm(jax.jacfwd(g_y, argnums=1)(x, TRUTH.y)),
        jacobian_x=1.5 * third(jax.jacfwd(F, argnums=0)),
        hessian=1.5 * third(jax.jacfwd(F, argnums=1)),
    )


def test_the_bound_holds_and_is_not_absurd():
    bound = constants()
    for correction in (None, bilevel.Newton()):
        adjoint = ImplicitAdjoint(correction=correction)
        for t in (1e-3, 1e-2):
            for d in directions(6, 3, 5):
                found: Any = bilevel.estimate(CASE.problem, CASE.x, TRUTH.y + t * d, adjoint, error_bound=bound)
                wrong = distance(found.gradient, TRUTH.gradient)
                assert wrong <= float(found.bound)
                if correction is None:
                    assert float(found.bound) <= 300 * wrong
    assert bilevel.estimate(CASE.problem, CASE.x, TRUTH.y).bound is None


def test_the_bound_follows_the_residual_of_the_adjoint():
    """At y* only |F_x| |rho| / mu is left, exactly."""
    bound = constants()
    adjoint = ImplicitAdjoint(ConjugateGradient(max_steps=2), correction=None)
    found: Any = bilevel.estimate(CASE.problem, CASE.x, TRUTH.y, adjoint, error_bound=bound)
    f_x = float(jnp.linalg.norm(jax.jacfwd(CASE.problem.inner.optimality)(CASE.x, TRUTH.y), 2))
    expected = f_x * float(found.adjoint_residual) / bound.strong_convexity
    np.testing.assert_allclose(found.bound, expected, rtol=0.03)
    assert float(found.bound) >= distance(found.gradient, TRUTH.gradient)


def test_bounds_that_cannot_be():
    for bad in ({"strong_convexity": 0.0}, {"strong_convexity": 1.0, "hessian": -1.0}):
        with pytest.raises(ValueError, match="ErrorBound"):
            ErrorBound(**bad)
    with pytest.raises(TypeError, match="error_bound"):
        bilevel.estimate(CASE.problem, CASE.x, TRUTH.y, error_bound=3.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="ImplicitAdjoint"):
        bilevel.estimate(CASE.problem, CASE.x, TRUTH.y, bilevel.OneStepAdjoint(), error_bound=ErrorBound(1.0))
