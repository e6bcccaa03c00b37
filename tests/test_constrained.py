"""`Constrained`: quadratic programs against the active-set closed form, multipliers, degenerate active sets."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq

import bilevel
from bilevel import BilevelProblem
from bilevel import _projection as projection
from bilevel.constrained import Constrained

N, M, E = 20, 10, 5
RNG = np.random.default_rng(3)
ROOT = RNG.normal(size=(N, N))
H, SLOPE, SLOPE_X = ROOT @ ROOT.T / N + np.eye(N), 3 * RNG.normal(size=N), RNG.normal(size=N)
IN, IN_0, IN_X = RNG.normal(size=(M, N)), RNG.normal(size=M), RNG.normal(size=M)
EQ, EQ_0, EQ_X = RNG.normal(size=(E, N)), RNG.normal(size=E), RNG.normal(size=E)


class Quadratic(eqx.Module):
    H: Any
    slope: Any

    def __call__(self, x, y):
        return 0.5 * y @ self.H @ y + (self.slope + x * SLOPE_X) @ y + 0.05 * x**2 * jnp.sum(y**2)


class Bent(eqx.Module):
    """C y - c - x d + bend |y|^2 / 2."""

    C: Any
    c: Any
    d: Any
    bend: Any

    def __call__(self, x, y):
        return self.C @ y - self.c - x * self.d + self.bend * jnp.sum(y**2) / 2


def outer(x, y):
    return jnp.sum((y - 1) ** 2) + x * y[0]


def program(limits, bend=0.0):
    """Bent inequalities where `bend` > 0 (all of one shape, so that one compilation serves)."""
    inner = Constrained(
        Quadratic(jnp.asarray(H), jnp.asarray(SLOPE)),
        equality=Bent(jnp.asarray(EQ), jnp.asarray(EQ_0), jnp.asarray(EQ_X), jnp.asarray(0.0)),
        inequality=Bent(jnp.asarray(IN), jnp.asarray(limits), jnp.asarray(IN_X), jnp.asarray(bend)),
    )
    return BilevelProblem(inner, outer)


def closed_form(x, limits, active, bend=0.0):
    """`(y, multipliers of the equalities, of the active inequalities)`: Newton on the KKT system of the active set."""
    rows, k = np.vstack([EQ, IN[active]]), E + int(active.sum())
    bends = np.append(np.zeros(E), np.full(k - E, bend))
    levels = np.append(EQ_0 + x * EQ_X, (limits + x * IN_X)[active])
    z = np.zeros(N + k)
    for _ in range(1 if bend == 0 else 12):  # without bends the system is linear
        y, u = z[:N], z[N:]
        J = rows + np.outer(bends, y)
        W = H + (0.1 * x**2 + bends @ u) * np.eye(N)
        gradient = (H + 0.1 * x**2 * np.eye(N)) @ y + SLOPE + x * SLOPE_X + J.T @ u
        residual = np.append(gradient, rows @ y - levels + bends * (y @ y) / 2)
        z = z - np.linalg.solve(np.block([[W, J.T], [J, np.zeros((k, k))]]), residual)
    return z[:N], z[N : N + E], z[N + E :]


@eqx.filter_jit
def derivatives_of_the_solution(inner, x):
    def of_solution(x):
        s = bilevel.solve(inner, x, jnp.zeros(N))
        return (outer(x, s.y), jnp.sum(s.multipliers.inequality**2)), s

    return jax.jacrev(of_solution, has_aux=True)(x)


@pytest.mark.long
def test_a_quadratic_program_and_its_multipliers():
    x = 0.4
    problem: Any = program(IN_0)
    found = bilevel.hypergradient(problem, jnp.asarray(x), jnp.zeros(N))
    (by_y, by_multipliers), solved = derivatives_of_the_solution(problem.inner, jnp.asarray(x))
    assert solved.converged
    active = np.asarray(solved.multipliers.inequality) > 0
    assert 2 <= active.sum() < M
    y, equality, inequality = closed_form(x, IN_0, active)
    assert np.all(inequality > 0)
    assert np.all((IN @ y - IN_0 - x * IN_X)[~active] < 0)
    for at in (found.y, solved.y):
        np.testing.assert_allclose(at, y, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(solved.multipliers.equality, equality, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(solved.multipliers.inequality[active], inequality, rtol=1e-9)
    h = lambda x: float(outer(x, closed_form(x, IN_0, active)[0]))
    np.testing.assert_allclose(found.gradient, (h(x + 1e-5) - h(x - 1e-5)) / 2e-5, rtol=1e-8)
    residual = problem.inner.optimality(jnp.asarray(x), solved.y, solved.multipliers)
    assert jnp.linalg.norm(residual) <= 1e-10

    # through y and through the multipliers
    np.testing.assert_allclose(by_y, found.gradient, rtol=1e-10)
    m = lambda x: np.sum(closed_form(x, IN_0, active)[2] ** 2)
    np.testing.assert_allclose(by_multipliers, (m(x + 1e-5) - m(x - 1e-5)) / 2e-5, rtol=1e-7)

    # one constraint moved so that it is touched with a multiplier of zero
    idle = int(np.flatnonzero(~active)[0])
    limits = IN_0.copy()
    limits[idle] = IN[idle] @ y - x * IN_X[idle]
    weak = bilevel.hypergradient(program(limits), jnp.asarray(x), jnp.zeros(N), throw=False)
    assert weak.status == "degenerate_active_set"
    assert not weak.converged
    with pytest.raises(bilevel.NotConverged, match="active with a multiplier of zero"):
        bilevel.hypergradient(program(limits), jnp.asarray(x), jnp.zeros(N))


@pytest.mark.long
def test_a_ball_as_the_constraint():
    """min y'Hy/2 + SLOPE'y on |y|^2 <= x: (H + 2 u) y = -SLOPE, |y|^2 = x. Momentum leaves the ball."""
    x = 0.5
    inner = Constrained(lambda x, y: 0.5 * y @ H @ y + SLOPE @ y, inequality=lambda x, y: jnp.sum(y**2)[None] - x)
    found = bilevel.hypergradient(BilevelProblem(inner, outer), jnp.asarray(x), jnp.full(N, 0.1))
    values, turn = np.linalg.eigh(H)
    length = lambda u: np.sum((turn.T @ SLOPE / (values + 2 * u)) ** 2)
    h = lambda x: outer(
        x, -turn @ (turn.T @ SLOPE / (values + 2 * brentq(lambda u: length(u) - x, 0, 1e3, xtol=1e-14)))
    )
    np.testing.assert_allclose(found.gradient, (h(x + 1e-5) - h(x - 1e-5)) / 2e-5, rtol=1e-7)


@pytest.mark.long
def test_curved_constraints():
    x, bend = 0.4, 0.3
    limits = IN_0 + 1.0
    found = bilevel.hypergradient(program(limits, bend), jnp.asarray(x), jnp.zeros(N))
    slack = limits + x * IN_X - IN @ found.y - bend * jnp.sum(found.y**2) / 2
    active = np.asarray(slack) < 1e-9
    assert 1 <= active.sum() < M
    y, _, inequality = closed_form(x, limits, active, bend)
    assert np.all(inequality > 0)
    np.testing.assert_allclose(found.y, y, rtol=1e-6, atol=1e-8)
    h = lambda x: float(outer(x, closed_form(x, limits, active, bend)[0]))
    np.testing.assert_allclose(found.gradient, (h(x + 1e-5) - h(x - 1e-5)) / 2e-5, rtol=1e-6)


def test_the_nearest_point_of_a_polyhedron():
    @jax.jit
    def step(J, c, d):
        rows = projection.polyhedron(J, c, 3)
        active = projection.active_rows(rows, d)
        return (active, *projection.nearest(rows, d, active))

    rng = np.random.default_rng(0)
    sizes = set()
    for _ in range(20):
        J, d = rng.normal(size=(13, 20)), 10.0 ** rng.uniform(-6, 3) * rng.normal(size=20)
        c = np.linalg.norm(d) * np.append(rng.normal(size=3), 0.5 * rng.normal(size=10) - 0.7)
        active, p, u = step(J, c, d)
        scale = 1e-11 * np.linalg.norm(d)
        rest = c + J @ p
        assert np.max(np.abs(rest[:3])) <= scale
        assert np.max(rest[3:]) <= scale
        assert np.min(u[3:]) >= -scale
        sizes.add(int(active.sum()))
    assert len(sizes) >= 4


def test_refusals():
    with pytest.raises(TypeError, match="inequality"):
        Constrained(lambda x, y: jnp.sum(y), inequality=1.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="one scalar"):
        bilevel.solve(Constrained(lambda x, y: y), jnp.ones(()), jnp.ones(3))
    with pytest.raises(ValueError, match="must return one array"):
        bilevel.solve(Constrained(lambda x, y: jnp.sum(y), equality=lambda x, y: (y, y)), jnp.ones(()), jnp.ones(3))


@pytest.mark.slow
def test_second_derivatives_and_other_active_sets_in_one_batch():
    def objective(x, y):
        return 0.5 * jnp.sum((y["p"] - x) ** 2) + 0.1 * jnp.sum(y["p"] ** 4) + jnp.sum((y["q"] - 1) ** 2)

    inner = Constrained(
        objective,
        equality=lambda x, y: jnp.sum(y["p"]) + y["q"] - 1.0,
        inequality=lambda x, y: -y["p"],
    )
    outer = lambda x, y: jnp.sum(y["p"] ** 3) + y["q"] ** 2 * x[0]
    y0 = {"p": jnp.ones(3) / 3, "q": jnp.asarray(0.0)}
    points = jnp.asarray([[1.0, 0.5, -2.0], [0.3, 0.3, 0.4], [5.0, -5.0, 0.0]])
    value = lambda x: outer(x, bilevel.solve(inner, x, y0, rtol=1e-12).y)
    problem = BilevelProblem(inner, outer)
    found = jax.vmap(lambda x: bilevel.hypergradient(problem, x, y0, rtol=1e-9, throw=False))(points)
    assert np.all(found.converged)
    slope, h = jax.jit(jax.grad(value)), 1e-4
    for x, gradient in zip(points, found.gradient, strict=True):
        np.testing.assert_allclose(slope(x), gradient, atol=1e-8)
        ways = h * jnp.eye(3)
        numbers = [(value(x + d) - value(x - d)) / (2 * h) for d in ways]
        np.testing.assert_allclose(gradient, jnp.stack(numbers), atol=1e-6)
        second = jnp.stack([(slope(x + d) - slope(x - d)) / (2 * h) for d in ways])
        np.testing.assert_allclose(jax.hessian(value)(x), second, atol=1e-5)
