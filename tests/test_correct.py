"""Corrections: the order of the error in the inner error, its first-order constant, and who refuses what."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from bilevel import (
    BilevelProblem,
    ConjugateGradient,
    Direct,
    ImplicitAdjoint,
    Jacobi,
    LinearizedAdjoint,
    Newton,
    Preconditioner,
)

from .helpers import directions, distance, omega, omega_y, reference, relative, slopes, smooth

DISTANCES = jnp.asarray(np.logspace(-4, -2, 7))
CASE = smooth()
TRUTH = reference(*CASE)
WAYS = directions(6, 5)


@eqx.filter_jit
def gradients(problem, x, points, adjoint):
    """The estimates at many points, shape (*points, m)."""
    one = lambda y: bilevel.estimate(problem, x, y, adjoint)
    found = jax.vmap(jax.vmap(one))(points)
    return found.gradient, found.error, found.converged


def errors(adjoint) -> tuple[Any, Any, Any]:
    """True errors and estimated ones along random directions, shape (directions, distances)."""
    points = TRUTH.y + DISTANCES[None, :, None] * WAYS[:, None, :]
    gradient, error, converged = gradients(CASE.problem, CASE.x, points, adjoint)
    return jnp.linalg.norm(gradient - TRUTH.gradient, axis=-1), error, converged


class Frozen(eqx.Module):
    """P^-1 F for a constant P."""

    matrix: Any

    def __call__(self, x, y, F):
        return jnp.linalg.solve(self.matrix, F)


def quasi() -> np.ndarray:
    """A definite matrix near the Hessian at the solution, not the Hessian."""
    noise = np.random.default_rng(5).normal(size=(6, 6))
    return np.asarray(TRUTH.hessian) + 0.3 * (noise + noise.T) / 2


ORDERS = {
    "plain": (ImplicitAdjoint(correction=None), 1),
    "plain_cg": (ImplicitAdjoint(ConjugateGradient(), correction=None), 1),
    "jacobi": (ImplicitAdjoint(correction=Jacobi(), guard=False), 1),
    "jacobi_twice": (ImplicitAdjoint(correction=Jacobi(steps=2), guard=False), 1),
    "frozen": (ImplicitAdjoint(correction=Preconditioner(Frozen(quasi())), guard=False), 1),
    "newton": (ImplicitAdjoint(), 2),
    "newton_dense": (ImplicitAdjoint(Direct()), 2),
    "newton_cg": (ImplicitAdjoint(ConjugateGradient()), 2),
}


@pytest.mark.parametrize("name", ORDERS)
def test_order_of_the_error_and_its_estimate(name):
    adjoint, order = ORDERS[name]
    true, estimated, converged = errors(adjoint)
    assert np.all(converged)
    np.testing.assert_allclose(slopes(true, DISTANCES), order, atol=0.05)
    ratio = np.asarray(estimated / true)
    # plain: the estimate's own error is of order e, with a constant of this problem; it must vanish
    assert np.all(np.abs(ratio[:, 0] - 1) < (0.005 if order == 1 else 0.02))
    assert np.all(np.abs(ratio[:, -1] - 1) < 0.1)
    if name.startswith("plain"):
        middle = int(np.argmin(np.abs(np.asarray(DISTANCES) - 1e-3)))
        assert np.all(np.abs(ratio[:, middle] - 1) < 0.02)


def test_two_newton_steps_have_order_four():
    """Distances large enough to stay above round-off."""
    t = jnp.asarray(np.logspace(-1.5, -0.8, 5))
    points = TRUTH.y + t[None, :, None] * WAYS[:, None, :]
    gradient, _, _ = gradients(CASE.problem, CASE.x, points, ImplicitAdjoint(correction=Newton(steps=2)))
    found = slopes(jnp.linalg.norm(gradient - TRUTH.gradient, axis=-1), t)
    np.testing.assert_allclose(found, 4, atol=0.6)
    assert np.all(found > 3.3)


H = np.asarray(TRUTH.hessian)
D = np.diag(np.diag(H))
ROOT = np.sqrt(np.diag(H))
EYE = np.eye(6)
CONSTANTS = {
    "plain": (None, EYE),
    "jacobi_1": (Jacobi(damping=1.0), EYE - np.linalg.solve(D, H)),
    "jacobi_3": (Jacobi(steps=3, damping=0.7), np.linalg.matrix_power(EYE - 0.7 * np.linalg.solve(D, H), 3)),
    "frozen_hessian": (Preconditioner(Frozen(quasi())), EYE - np.linalg.solve(quasi(), H)),
    "scaled_identity": (Preconditioner(lambda x, y, F: F / 7.0, steps=2), np.linalg.matrix_power(EYE - H / 7, 2)),
    "newton": (Newton(), np.zeros((6, 6))),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_first_order_constants_are_the_predicted_ones(name):
    """Equation (5) of the theory: the derivative of the estimate in y, by central differences, to four digits."""
    correction, factor = CONSTANTS[name]
    predicted = np.asarray(omega_y(CASE.problem, CASE.x, TRUTH.y)) @ factor @ np.asarray(WAYS).T
    adjoint = ImplicitAdjoint(correction=correction, guard=False)
    t = 1e-5
    points = TRUTH.y + t * jnp.stack([WAYS, -WAYS], axis=1)
    gradient, _, _ = gradients(CASE.problem, CASE.x, points, adjoint)
    measured = np.asarray(gradient[:, 0] - gradient[:, 1]).T / (2 * t)
    if name == "newton":
        assert np.linalg.norm(measured) < 1e-8
        return
    np.testing.assert_allclose(measured, predicted, atol=float(1e-5 * np.linalg.norm(predicted)))


@pytest.mark.long
def test_the_default_damping_of_jacobi_contracts_where_the_undamped_one_does_not():
    """Correlated features: the scaled Hessian's largest eigenvalue is far above 2."""
    a = np.full((6, 6), 0.9) + 0.1 * EYE
    inner = bilevel.Minimization(lambda x, y: 0.5 * jnp.dot(y, jnp.asarray(a) @ y) - jnp.sum(x) * jnp.sum(y))
    problem = BilevelProblem(inner, lambda x, y: 0.5 * jnp.sum(y**2) + y[0])
    x = jnp.ones(2)
    y = reference(problem, x, jnp.zeros(6)).y + 0.1 * WAYS[0] + 0.1
    undamped = bilevel.estimate(problem, x, y, ImplicitAdjoint(correction=Jacobi(damping=1.0)))
    assert str(undamped.status) == "correction_rejected"
    assert not undamped.converged
    np.testing.assert_array_equal(undamped.y, y)
    assert np.isinf(undamped.error)
    for steps in (1, 4):
        damped = bilevel.estimate(problem, x, y, ImplicitAdjoint(correction=Jacobi(steps=steps)))
        assert damped.converged
        assert float(damped.inner_residual) < float(jnp.linalg.norm(inner.optimality(x, y)))


def test_unguarded_corrections_are_taken():
    adjoint = ImplicitAdjoint(correction=Preconditioner(lambda x, y, F: -F / 10), guard=False)
    y = TRUTH.y + 0.1
    found = bilevel.estimate(CASE.problem, CASE.x, y, adjoint)
    F = CASE.problem.inner.optimality(CASE.x, y)
    np.testing.assert_allclose(found.y, y + F / 10, rtol=1e-14)
    np.testing.assert_allclose(found.gradient, omega(CASE.problem, CASE.x, found.y), rtol=1e-9)
    guarded = bilevel.estimate(CASE.problem, CASE.x, y, ImplicitAdjoint(correction=adjoint.correction))
    assert str(guarded.status) == "correction_rejected"
    np.testing.assert_array_equal(guarded.y, y)


@pytest.mark.parametrize("linear_solver", [Direct(), ConjugateGradient()])
def test_linearized_instead_of_moved(linear_solver):
    """Omega - Omega_y s, with Omega_y from autodiff; order two, and an error that bounds."""
    true, estimated, converged = errors(LinearizedAdjoint(linear_solver))
    assert np.all(converged)
    np.testing.assert_allclose(slopes(true, DISTANCES), 2, atol=0.05)
    assert np.all(true < estimated)
    y = TRUTH.y + 1e-2 * WAYS[0]
    step = jnp.linalg.solve(jnp.asarray(jax.hessian(CASE.problem.inner.objective, argnums=1)(CASE.x, y)),
                            CASE.problem.inner.optimality(CASE.x, y))  # fmt: skip
    wanted = omega(CASE.problem, CASE.x, y) - omega_y(CASE.problem, CASE.x, y) @ step
    found = bilevel.estimate(CASE.problem, CASE.x, y, LinearizedAdjoint(linear_solver))
    assert relative(found.gradient, wanted) < 1e-10
    np.testing.assert_array_equal(found.y, y)


def newton_step(x, y):
    F = CASE.problem.inner.optimality
    return y - jnp.linalg.solve(jax.jacobian(F, argnums=1)(x, y), F(x, y))


@pytest.mark.long
def test_the_chain_rule_through_one_newton_step():
    """The fixed point of Newton's step, and the outer function behind it: order two by plain differentiation."""
    outer = CASE.problem.outer
    behind = BilevelProblem(bilevel.FixedPoint(newton_step), lambda x, y: outer(x, newton_step(x, y)))
    points = TRUTH.y + DISTANCES[None, :, None] * WAYS[:2, None, :]
    gradient, _, _ = gradients(behind, CASE.x, points, ImplicitAdjoint(Direct(), correction=None))
    np.testing.assert_allclose(slopes(jnp.linalg.norm(gradient - TRUTH.gradient, axis=-1), DISTANCES), 2, atol=0.05)


@pytest.mark.long
@pytest.mark.parametrize("linear_solver", [Direct(), ConjugateGradient(rtol=1e-15), ConjugateGradient()])
def test_newton_on_a_quadratic_inner_problem_is_exact_from_any_distance(linear_solver):
    case = smooth(1, quadratic=True)
    truth = reference(*case)
    far = jnp.asarray([1e-3, 1.0, 1e3])[:, None, None] * WAYS[None]
    adjoint = ImplicitAdjoint(linear_solver)
    gradient, error, _ = gradients(case.problem, case.x, truth.y + far, adjoint)
    wrong = jnp.linalg.norm(gradient - truth.gradient, axis=-1) / jnp.linalg.norm(truth.gradient)
    # with a tolerance of its own choice CG may stop short of round-off, but has to say so
    assert np.all(np.asarray(wrong * jnp.linalg.norm(truth.gradient)) <= 3 * np.asarray(error))
    if isinstance(linear_solver, Direct) or linear_solver.rtol is not None:
        # eps times the distance moved: the point itself is known no better
        assert np.all(np.asarray(wrong) < 1e-12 * np.array([1.0, 1.0, 1e3])[:, None])
    # and not through a plain estimate, or the test says nothing
    plain, _, _ = gradients(case.problem, case.x, truth.y + far, ImplicitAdjoint(correction=None))
    assert np.min(jnp.linalg.norm(plain - truth.gradient, axis=-1)) > 1e-6


@pytest.mark.long
def test_consistency_every_correction_keeps_the_solution():
    for correction in (None, Newton(), Newton(3), Jacobi(), Preconditioner(Frozen(quasi()), steps=2)):
        found = bilevel.estimate(CASE.problem, CASE.x, TRUTH.y, ImplicitAdjoint(correction=correction))
        assert distance(found.y, TRUTH.y) < 1e-13
        assert relative(found.gradient, TRUTH.gradient) < 1e-8 if correction is None else 1e-12


@pytest.mark.parametrize("bad", [0, -1, 1.5, True])
def test_steps_are_positive_integers(bad):
    for make in (Newton, Jacobi, lambda steps: Preconditioner(lambda x, y, F: F, steps)):
        with pytest.raises((ValueError, TypeError), match="steps"):
            make(bad)


def test_other_bad_corrections():
    for damping in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="damping"):
            Jacobi(damping=damping)
    with pytest.raises(TypeError, match="solve"):
        Preconditioner(3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="correction"):
        ImplicitAdjoint(correction="newton")  # pyright: ignore[reportArgumentType]
    wrong = Preconditioner(lambda x, y, F: F[:3])
    with pytest.raises(ValueError, match="solve"):
        bilevel.estimate(CASE.problem, CASE.x, TRUTH.y, ImplicitAdjoint(correction=wrong))
