"""`Composite`: hypergradients of penalized and constrained inner problems, right or refused."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from bilevel import BilevelProblem, linear, prox
from bilevel._support import SupportAware
from bilevel.composite import Composite


class Squares(eqx.Module):
    """Mean squared residual / 2; the data are leaves, so that one shape is compiled once."""

    A: Any
    b: Any

    def __call__(self, x, y):
        return 0.5 * jnp.mean((self.A @ y - self.b) ** 2)


def lasso(n, p, share, seed=0):
    rng = np.random.default_rng(seed)
    truth = np.zeros(p)
    truth[: min(10, p // 2)] = 2 * rng.normal(size=min(10, p // 2))
    A, outer_A = (jnp.asarray(rng.normal(size=(n, p))) for _ in range(2))
    b = A @ truth + 0.1 * rng.normal(size=n)
    x = jnp.log(share * jnp.max(jnp.abs(A.T @ b)) / n)
    return BilevelProblem(Composite(Squares(A, b), prox.l1(jnp.exp)), Squares(outer_A, outer_A @ truth)), x


def support_formula(problem, x, y):
    """The hypergradient in the log-penalty: -e^x sign(y_S)' H_SS^-1 G_y[S]."""
    A, outer = np.asarray(problem.inner.smooth.A), problem.outer
    on = np.asarray(y) != 0
    g = outer.A.T @ (outer.A @ y - outer.b) / outer.b.size
    H = A[:, on].T @ A[:, on] / A.shape[0]
    return -np.exp(x) * np.sign(y[on]) @ np.linalg.solve(H, g[on]), on


@pytest.mark.long
def test_lasso_with_more_unknowns_than_data():
    problem: Any
    problem, x = lasso(100, 1000, 0.1)
    y0 = jnp.zeros(1000)
    found = bilevel.hypergradient(problem, x, y0)
    expected, on = support_formula(problem, x, found.y)
    assert 3 <= on.sum() <= 30
    np.testing.assert_allclose(found.gradient, expected, rtol=1e-10)
    assert found.converged
    assert float(found.error) <= 1e-10 * abs(float(found.gradient))
    # the subgradient conditions, which no other point satisfies
    A, b = problem.inner.smooth.A, problem.inner.smooth.b
    slope = A.T @ (A @ found.y - b) / b.size
    np.testing.assert_allclose(slope[on], -jnp.exp(x) * jnp.sign(found.y[on]), rtol=1e-10)
    assert jnp.max(jnp.abs(slope[~on])) < jnp.exp(x)


# ------------------------------------------------------------------------------------------------ kinds of penalty


class Pick(eqx.Module):
    """One of several operators; which one is data, so that all share a compilation."""

    which: Any
    operators: tuple

    def __call__(self, x, v, t):
        branches = [lambda *args, f=f: f(*args) for f in self.operators]
        return jax.lax.switch(self.which, branches, x, v, t)


RNG = np.random.default_rng(1)
N, P = 30, 9
A = jnp.asarray(RNG.normal(size=(N, P)))
B = A @ np.where(np.arange(P) < 4, 2 * RNG.normal(size=P), 0) + 0.3 * RNG.normal(size=N)
OPERATORS = (
    prox.elastic_net(jnp.exp, lambda x: 2 * jnp.exp(x)),
    prox.group_lasso(jnp.exp, np.arange(P) // 3),
    prox.simplex(lambda x: 1 + jnp.exp(x)),
    prox.non_negative(),
)
KINDS = ("elastic-net", "group-lasso", "simplex", "non-negative")
X = jnp.asarray(-0.6)


class Tilted(eqx.Module):
    A: Any
    b: Any

    def __call__(self, x, y):
        return Squares(self.A, self.b)(x, y) + 0.1 * x * jnp.sum(y) + 0.05 * jnp.exp(x) * jnp.sum(y**2)


def outer(x, y):
    return jnp.sum((y - 0.3) ** 2) + 0.1 * x * jnp.sum(y) ** 2


def case(kind):
    pick = Pick(jnp.asarray(KINDS.index(kind)), OPERATORS)
    return BilevelProblem(Composite(Tilted(A, B), pick), outer)


@jax.jit
def reference(problem, x):
    """h by plain forward-backward steps to round-off."""
    q, p = problem.inner.smooth, problem.inner.prox
    t = 1 / (jnp.linalg.norm(A, 2) ** 2 / N + 0.1 * jnp.exp(x))
    y = jax.lax.fori_loop(0, 3000, lambda _, y: p(x, y - t * jax.grad(q, 1)(x, y), t), jnp.zeros(P))
    return outer(x, y), y


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_against_central_differences(kind):
    problem = case(kind)
    found = bilevel.hypergradient(problem, X, jnp.zeros(P), rtol=1e-8)
    expected = (reference(problem, X + 1e-5)[0] - reference(problem, X - 1e-5)[0]) / 2e-5
    value, y = reference(problem, X)
    assert jnp.any(y == 0)
    np.testing.assert_allclose(found.gradient, expected, rtol=2e-8)
    np.testing.assert_allclose(found.value, value, rtol=1e-8)
    np.testing.assert_allclose(found.y, y, atol=1e-8)


# ------------------------------------------------------------------------------------------------ trust


class Separable(eqx.Module):
    b: Any

    def __call__(self, x, y):
        return 0.5 * jnp.sum((y - self.b) ** 2)


def total(x, y):
    return jnp.sum(y)


def separable(b):
    """y* = soft(b, e^x); h = sum y*, h' = -e^x sum of the signs on the support."""
    return BilevelProblem(Composite(Separable(jnp.asarray(b)), prox.l1(jnp.exp)), total)


@eqx.filter_jit
def derivative_of_the_solution(inner, x):
    def of_solution(x):
        y = bilevel.solve(inner, x, jnp.ones(4)).y
        return y, y

    dy, y = jax.jacrev(of_solution, has_aux=True)(x)
    return y, dy


@pytest.mark.long
def test_closed_form_and_the_edge_between_two_supports():
    x = jnp.asarray(np.log(0.5))
    for b in ([2.0, -1.0, 0.1, 0.7], [2.0, 0.5 + 1e-5, 0.1, 0.7], [2.0, 0.5 - 1e-5, 0.1, 0.7]):
        found = bilevel.hypergradient(separable(b), x, jnp.ones(4))
        signs = np.where(np.abs(b) > 0.5, np.sign(b), 0)
        np.testing.assert_allclose(found.gradient, -0.5 * signs.sum(), rtol=1e-12)
        y, dy = derivative_of_the_solution(separable(b).inner, x)
        np.testing.assert_allclose(y, signs * (np.abs(b) - 0.5), rtol=1e-12)
        np.testing.assert_allclose(dy, -0.5 * signs, rtol=1e-12)
    edge = [2.0, 0.5, 0.1, 0.7]  # |grad| at the threshold and y_2 = 0
    found = bilevel.hypergradient(separable(edge), x, jnp.ones(4), throw=False)
    assert found.status == "degenerate_active_set"
    assert not found.converged
    assert jnp.isnan(found.gradient)
    assert jnp.isinf(found.error)
    with pytest.raises(bilevel.NotConverged, match="active with a multiplier of zero"):
        bilevel.hypergradient(separable(edge), x, jnp.ones(4))


@jax.jit
def forward_backward_steps(inner, x, y):
    t = 0.3
    return jax.lax.fori_loop(0, 5000, lambda _, y: inner.prox(x, y - t * jax.grad(inner.smooth, 1)(x, y), t), y)


def test_before_identification_the_estimate_is_not_trusted():
    problem, x = lasso(40, 9, 0.02)
    solution = forward_backward_steps(problem.inner, x, jnp.zeros(9))
    expected, _ = support_formula(problem, x, solution)
    rng = np.random.default_rng(0)
    said = {"right": 0, "untrusted": 0}
    for k in range(60):
        y = solution + 10.0 ** rng.uniform(-3, 1) * rng.normal(size=9)
        found = bilevel.estimate(problem, x, y)
        error = abs(float(found.gradient - expected))
        if found.converged:
            assert error <= 3 * float(found.error) + 1e-12, k
            said["right"] += 1
        else:
            assert not error > float(found.error)
            said["untrusted"] += int(found.status == "estimate_untrusted")
    assert said["right"] >= 10
    assert said["untrusted"] >= 10


# ------------------------------------------------------------------------------------------------ the linear solver


@pytest.mark.parametrize("kind", ["elastic-net", "group-lasso", "simplex"])
def test_conjugate_gradients_on_the_support(kind, monkeypatch):
    problem = case(kind)
    _, y = reference(problem, X)
    y = y + 1e-3 * jnp.sin(jnp.arange(1.0, P + 1))
    monkeypatch.setattr(linear, "DENSE_LIMIT", 4)
    matrix, b, found = on_the_support(problem, y)
    assert jnp.any(jnp.diagonal(matrix) == 1)
    for transpose in (False, True):
        exact = jnp.linalg.solve(matrix.T if transpose else matrix, b)
        tight, guessed, loose = found[transpose]
        for out in (tight, guessed):
            np.testing.assert_allclose(out.value, exact, rtol=1e-9, atol=1e-11)
            assert out.status == "converged"
        assert jnp.linalg.norm(loose.residual) <= 1.1e-2 * jnp.linalg.norm(b)


@eqx.filter_jit
def on_the_support(problem, y):
    _, system = linear.linear_system(problem.inner, X, y)
    b = jnp.cos(jnp.arange(1.0, P + 1))
    solver = SupportAware()
    assert solver.prepare(system) is None
    solve = lambda **options: solver.solve(None, system, b, **options)
    found = []
    for transpose in (False, True):
        tight = solve(transpose=transpose)
        guessed = solve(transpose=transpose, guess=tight.value + 0.1)
        found.append((tight, guessed, solve(transpose=transpose, rtol=1e-2)))
    return system.matrix(), b, found


def test_a_saddle_on_the_support_is_no_minimum():
    inner = Composite(lambda x, y: y[0] * y[1] + 0.25 * jnp.sum(y**4), prox.l1(0.01))
    y = jnp.asarray([0.3, 0.3])
    state = jax.jit(lambda y: SupportAware().prepare(linear.linear_system(inner, None, y)[1]))(y)
    assert state is not None
    assert state.status == "not_a_minimum"


@pytest.mark.long
def test_a_step_that_is_known_changes_nothing_but_the_work():
    problem, x = lasso(30, 8, 0.2)
    inner: Any = problem.inner
    smooth = inner.smooth
    known = 1 / jnp.linalg.eigvalsh(smooth.A.T @ smooth.A / 30)[-1]
    told = Composite(smooth, prox.l1(jnp.exp), step=known)
    other = BilevelProblem(told, problem.outer)
    found, same = (bilevel.hypergradient(p, x, jnp.zeros(8), rtol=1e-9) for p in (problem, other))
    np.testing.assert_allclose(same.y, found.y, atol=1e-9)
    np.testing.assert_allclose(same.gradient, found.gradient, rtol=1e-8)
    np.testing.assert_allclose(told.step_length(x, found.y), known, rtol=1e-12)
    with pytest.raises(ValueError, match="step"):
        Composite(smooth, prox.l1(jnp.exp), step=-1.0)


def test_refusals():
    with pytest.raises(TypeError, match="prox"):
        Composite(lambda x, y: jnp.sum(y), 1.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="one scalar"):
        bilevel.solve(Composite(lambda x, y: y, prox.l1(0.1)), jnp.ones(()), jnp.ones(3))
    with pytest.raises(ValueError, match="prox"):
        bilevel.solve(Composite(lambda x, y: jnp.sum(y**2), lambda x, v, t: v[:2]), jnp.ones(()), jnp.ones(3))


def pairs_prox(x, v, t):
    """Of exp(x) times the sum of the lengths of two pairs of entries."""
    w = v.reshape(2, 2)
    length = jnp.linalg.norm(w, axis=1, keepdims=True)
    return (w * jnp.where(length > t * jnp.exp(x), 1 - t * jnp.exp(x) / jnp.where(length > 0, length, 1), 0)).ravel()


def barrier_prox(x, v, t):
    """Of -exp(x) sum log y."""
    return (v + jnp.sqrt(v**2 + 4 * t * jnp.exp(x))) / 2


def huber_prox(x, v, t):
    """Of exp(x) times Huber's function."""
    size = t * jnp.exp(x)
    return jnp.where(jnp.abs(v) <= 1 + size, v / (1 + size), v - size * jnp.sign(v))


@pytest.mark.slow
@pytest.mark.parametrize(("own", "start"), [(pairs_prox, 0.0), (barrier_prox, 1.0), (huber_prox, 0.0)])
def test_proxes_of_users_and_second_derivatives(own, start):
    rng = np.random.default_rng(0)
    A, outer_A = jnp.asarray(rng.normal(size=(30, 4))), jnp.asarray(rng.normal(size=(30, 4)))
    truth = jnp.asarray([1.0, -2.0, 0.02, 0.0])
    inner, outer = Composite(Squares(A, A @ truth + 0.1), own), Squares(outer_A, outer_A @ truth)
    x, y0 = jnp.asarray(-2.0), jnp.full(4, start)
    value = lambda x: outer(x, bilevel.solve(inner, x, y0, rtol=1e-12).y)
    slope = bilevel.hypergradient(BilevelProblem(inner, outer), x, y0, rtol=1e-8).gradient
    h = 1e-4
    np.testing.assert_allclose(slope, (value(x + h) - value(x - h)) / (2 * h), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(value)(x), slope, rtol=1e-7)
    second = (jax.grad(value)(x + h) - jax.grad(value)(x - h)) / (2 * h)
    np.testing.assert_allclose(jax.hessian(value)(x), second, rtol=1e-6)
