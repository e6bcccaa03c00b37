"""Where there is no answer there is no number: no minimum, a flat one, false declarations."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import bilevel
from bilevel import BilevelProblem, Minimization, NotConverged

from .helpers import distance, poly, reference, relative, rotated, rotations

X3, Y3 = jnp.array([0.3, -0.2, 0.5]), jnp.array([0.4, 0.1, -0.3])


# ------------------------------------------------------------------------------------------------ no answer

HOPELESS = {
    "singular": (rotated(1, 2, 0), 0.0, {"singular"}, r"singular|unbounded"),
    "singular_on_an_axis": (np.diag([1.0, 2.0, 0.0]), 0.0, {"singular"}, r"singular|unbounded"),
    "zero": (np.zeros((3, 3)), 0.0, {"singular", "unbounded"}, r"singular|unbounded"),
    "saddle": (rotated(1, 2, -1), 0.0, {"not_a_minimum", "unbounded"}, r"saddle|unbounded"),
    "maximum": (-rotated(1, 2, 3), 0.0, {"not_a_minimum", "unbounded"}, r"saddle|unbounded"),
    "quartic_unbounded": (rotated(1, 2, -3), -1.0, {"not_a_minimum", "unbounded"}, r"unbounded"),
}


@pytest.mark.parametrize("case", HOPELESS)
def test_no_minimum_no_number(case):
    A, q, words, says = HOPELESS[case]
    problem = poly(A, q)
    found = bilevel.hypergradient(problem, X3, Y3, throw=False)
    assert str(found.status) in words
    assert not found.converged
    assert np.all(np.isnan(found.gradient))
    assert np.isnan(found.value)
    assert np.isinf(found.error)
    with pytest.raises(NotConverged, match=says) as caught:
        bilevel.hypergradient(problem, X3, Y3)
    assert str(caught.value).startswith("bilevel.hypergradient:")
    assert caught.value.result is not None
    solution = bilevel.solve(problem.inner, X3, Y3, throw=False)
    assert str(solution.status) in words
    assert not solution.converged
    assert np.all(np.isnan(solution.y))
    with pytest.raises(NotConverged, match=says):
        bilevel.solve(problem.inner, X3, Y3)
    if q == 0:
        assert np.all(np.isnan(bilevel.estimate(problem, X3, Y3).gradient))


def test_starting_at_a_stationary_point_that_is_no_minimum():
    for A in (rotated(1, 2, -1), -rotated(1, 2, 3)):
        found = bilevel.hypergradient(poly(A, 1.0), jnp.zeros(3), jnp.zeros(3), throw=False)
        assert not found.converged
        assert str(found.status) == "not_a_minimum"
        assert np.all(np.isnan(found.gradient))


def test_starting_near_a_maximum_still_finds_a_minimum():
    problem = poly(-rotated(1, 2, 3), 1.0)
    found = bilevel.hypergradient(problem, X3, jnp.array([0.01, 0.02, 0.03]))
    truth = reference(problem, X3, found.y)
    assert np.linalg.eigvalsh(truth.hessian)[0] > 0
    assert relative(found.gradient, truth.gradient) < 1e-6


@pytest.mark.parametrize("smallest", [0.0, 1e-17, 1e-16, -1e-16])
@pytest.mark.parametrize("consistent", [True, False])
def test_singular_in_any_direction_is_never_a_number(smallest, consistent):
    """A hundred random null directions: an unpivoted factorization sees some of them badly."""
    Q = rotations(100)
    A = Q @ np.diag([1.0, 2.0, smallest]) @ Q.transpose(0, 2, 1)
    x = Q[:, :, 0] if consistent else np.broadcast_to(np.asarray(X3), (100, 3))
    found = jax.vmap(lambda A, x: bilevel.estimate(poly(A), x, Y3))(jnp.asarray(A), jnp.asarray(x))
    assert not np.any(found.converged)
    assert not np.any(np.isfinite(found.gradient))


@pytest.mark.parametrize("seed", range(4))
def test_rank_deficient_least_squares_is_never_a_number(seed):
    """More features than samples and no penalty: the Hessian's rank is 20 of 40."""
    rng = np.random.default_rng(seed)
    A, b = jnp.asarray(rng.normal(size=(20, 40))), jnp.asarray(rng.normal(size=20))
    inner = RankDeficient(A, b)
    found = bilevel.hypergradient(BilevelProblem(inner, Norm()), jnp.asarray(0.1), jnp.zeros(40), throw=False)
    assert not found.converged
    assert str(found.status) == "singular"
    assert np.isnan(found.gradient)


class RankDeficient(eqx.Module):
    A: Any
    b: Any

    def __call__(self, x, y):
        return 0.5 * jnp.sum((self.A @ y - x * self.b) ** 2)


class Norm(eqx.Module):
    def __call__(self, x, y):
        return 0.5 * jnp.sum(y**2) + y[0]


class Flat(eqx.Module):
    """exp(x - y): its minimum is at infinity. (y - x)^4: its Hessian vanishes at the minimum."""

    tail: Any
    quartic: Any

    def __call__(self, x, y):
        return self.tail * jnp.exp(x - y) + self.quartic * (y - x) ** 4


class Itself(eqx.Module):
    def __call__(self, x, y):
        return y


@pytest.mark.parametrize(("tail", "quartic"), [(1.0, 0.0), (0.0, 1.0)])
def test_no_minimum_or_a_flat_one(tail, quartic):
    """Newton's residuals go to zero on both; the affine outer function hides it, and the gradient looks like one."""
    problem = BilevelProblem(Flat(jnp.asarray(tail), jnp.asarray(quartic)), Itself())
    found = bilevel.hypergradient(problem, jnp.asarray(0.3), jnp.asarray(0.1), throw=False)
    assert not found.converged
    # raising max_steps, which "max_steps" advises, cannot help here
    assert str(found.status) in ("singular", "unbounded", "estimate_untrusted")
    solution = bilevel.solve(problem.inner, jnp.asarray(0.3), jnp.asarray(0.1), throw=False)
    assert not solution.converged


# ------------------------------------------------------------------------------------------------ declarations


def tilted(x, y):
    """Strictly convex: no direction is a gauge."""
    return 0.5 * jnp.dot(y, jnp.array([1.0, 2.0, 3.0]) * y) * jnp.exp(x) - jnp.sum(y) - y[0]


def differences(x, y):
    return (y[0] - y[1]) ** 2 + (y[1] - y[2])


def test_a_false_gauge_is_refused():
    """Solving on the quotient by a direction along which y may not slide gives -1.22 for -2.59."""
    problem = BilevelProblem(Minimization(tilted, gauge=[jnp.ones(3)]), differences)
    found = bilevel.hypergradient(problem, jnp.asarray(0.3), Y3, throw=False)
    assert not found.converged
    with pytest.raises(NotConverged, match="gauge"):
        bilevel.hypergradient(problem, jnp.asarray(0.3), Y3)


def test_a_false_operator_is_refused():
    operator = lambda x, y: lx.DiagonalLinearOperator(jnp.array([1.0, 5.0, 3.0]))
    problem = BilevelProblem(Minimization(tilted, operator=operator), differences)
    found = bilevel.hypergradient(problem, jnp.asarray(0.3), Y3, throw=False)
    truth = reference(
        BilevelProblem(lambda x, y: tilted(x[0], y), lambda x, y: differences(x[0], y)), jnp.array([0.3]), Y3
    )
    wrong = distance(found.gradient, truth.gradient[0])
    assert not found.converged or wrong <= 1e-6 * abs(float(truth.gradient[0]))
    assert wrong <= 3 * float(found.error) + 1e-12


def softmax_inner(x, y):
    """Invariant along ones; the minimizer's softmax is that of x."""
    return jax.nn.logsumexp(y) - jnp.dot(jax.nn.softmax(x), y)


@pytest.mark.parametrize("adjoint", [None, bilevel.ImplicitAdjoint(bilevel.ConjugateGradient())])
@pytest.mark.parametrize("projector", [False, True])
def test_gauge_invariant_outer_functions_are_exact(adjoint, projector):
    gauge = (lambda v: jnp.full_like(v, jnp.mean(v))) if projector else [jnp.ones(3)]
    outer = lambda x, y: jnp.dot(jax.nn.softmax(y), jnp.array([1.0, 2.0, 5.0])) ** 2
    problem = BilevelProblem(Minimization(softmax_inner, gauge=gauge), outer)
    truth = jax.grad(lambda x: jnp.dot(jax.nn.softmax(x), jnp.array([1.0, 2.0, 5.0])) ** 2)(X3)
    for shift in (0.0, 3.0):
        found = bilevel.hypergradient(problem, X3, Y3 + shift, adjoint=adjoint, rtol=1e-9)
        assert relative(found.gradient, truth) < 1e-9


def test_gauge_dependent_outer_functions_are_refused():
    problem = BilevelProblem(Minimization(softmax_inner, gauge=[jnp.ones(3)]), lambda x, y: jnp.sum(y**2) + y[0])
    with pytest.raises(NotConverged, match="gauge"):
        bilevel.hypergradient(problem, X3, Y3)
    found = bilevel.hypergradient(problem, X3, Y3, throw=False)
    assert str(found.status) == "gauge_dependent"
    assert np.all(np.isnan(found.gradient))


def test_an_undeclared_gauge_is_singular():
    problem = BilevelProblem(softmax_inner, lambda x, y: jnp.dot(jax.nn.softmax(y), jnp.arange(3.0)))
    with pytest.raises(NotConverged, match="singular"):
        bilevel.hypergradient(problem, X3, Y3)


@pytest.mark.parametrize(("dtype", "far"), [(jnp.float64, 1e4), (jnp.float64, 1e8), (jnp.float32, 1e3)])
def test_a_start_far_along_the_gauge_gives_the_same_or_says_so(dtype, far):
    """The length of y along the gauge is none that an error may be compared with."""

    def inner(x, y):
        z = y - jnp.mean(y)
        return 0.5 * jnp.sum((z - x * jnp.arange(4, dtype=y.dtype)) ** 2) + jnp.sum(z**4)

    sliding = bilevel.Minimization(inner, gauge=[jnp.ones(4, dtype)])
    start = jnp.asarray([1.0, 2.0, 3.0, 5.0], dtype)

    def outer(x, y0):
        found = bilevel.solve(sliding, x, y0, throw=False)
        return found.y[3] - found.y[0], found

    (value, _), slope = jax.value_and_grad(outer, has_aux=True)(jnp.asarray(1.0, dtype), start)
    (there, found), steep = jax.value_and_grad(outer, has_aux=True)(jnp.asarray(1.0, dtype), start + dtype(far))
    lost = 10 * far * jnp.finfo(dtype).eps  # round-off of so long a y
    np.testing.assert_allclose([there, steep], [value, slope], rtol=lost)
    assert bool(found.converged) or found.status == "round_off"
