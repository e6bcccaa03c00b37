"""`solve`: an accurate y from whatever solver, and right derivatives of every mode and order."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import bilevel
from bilevel import BilevelProblem, ConjugateGradient, Direct, FixedPoint, ImplicitAdjoint, Minimization, Root, solvers
from bilevel.adjoint import _rule

from .helpers import KINDS, distance, glm, reference, relative, smooth

CASE = smooth()
TRUTH = reference(*CASE)
INNER, OUTER = CASE.problem.inner, CASE.problem.outer


def h(x):
    return OUTER(x, bilevel.solve(INNER, x, CASE.y0).y)


def true_h_derivatives(x):
    """Gradient and Hessian of h, from a closed expression differentiated through exact dense Newton steps.

    Three Newton steps from y* are exact to third order in dx.
    """

    def exact(x):
        y = jax.lax.stop_gradient(TRUTH.y)
        for _ in range(2):
            F = INNER.optimality(x, y)
            y = y - jnp.linalg.solve(jax.hessian(INNER.objective, 1)(x, y), F)
        return OUTER(x, y)

    return exact


# ------------------------------------------------------------------------------------------------ accuracy


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_rtol_bounds_the_error_of_y(kind):
    for cond in (10.0, 1e4):
        case = glm(kind, 11, 80, 20, cond)
        truth = reference(*case)
        for rtol in (1e-3, 1e-7, None):
            options: Any = {} if rtol is None else {"rtol": rtol}
            found = bilevel.solve(case.problem.inner, case.x, case.y0, **options)
            assert relative(found.y, truth.y) <= (rtol or 1e-9)
            residual = jnp.linalg.norm(case.problem.inner.optimality(case.x, found.y))
            np.testing.assert_allclose(found.residual, residual, rtol=1e-6, atol=1e-14)


def crude(x):
    """A y that is near: one digit or so."""
    return TRUTH.y + 0.05 * jnp.sin(jnp.arange(6.0)) + 0.0 * x[0]


def on_the_host(x, y0):
    rng = np.random.default_rng(0)
    return np.asarray(TRUTH.y) + 0.02 * rng.normal(size=y0.shape)


@pytest.mark.long
@pytest.mark.parametrize(
    "solver",
    [
        None,
        solvers.Jaxopt(),
        optx.BFGS(rtol=1e-4, atol=1e-4),
        solvers.Scipy(),
        solvers.Scipy("BFGS"),
        crude,
        solvers.Host(on_the_host),
    ],
    ids=["default", "jaxopt", "optimistix", "scipy", "scipy-bfgs", "closed-form", "host"],
)
def test_every_solver_gives_the_same(solver):
    """Loose ones are repaired by the correction; their derivatives are those of the solution."""
    found = bilevel.hypergradient(*CASE, solver=solver, rtol=1e-8)
    assert relative(found.gradient, TRUTH.gradient) <= 1e-8
    y, pull = jax.vjp(lambda x: bilevel.solve(INNER, x, CASE.y0, solver=solver).y, CASE.x)
    assert relative(y, TRUTH.y) <= 1e-9
    g_x, g_y = jax.grad(OUTER, argnums=(0, 1))(CASE.x, y)
    assert relative(g_x + pull(g_y)[0], TRUTH.gradient) <= 1e-8


@pytest.mark.long
def test_a_closed_form_needs_no_iterations_and_a_wrong_shape_is_refused():
    ridge = glm("ridge", 2)
    f = ridge.problem.inner.objective

    def closed(x):
        H = f.X.T @ f.X / f.X.shape[0] + jnp.diag(jnp.exp(x)) / x.shape[0]
        return jnp.linalg.solve(H, f.X.T @ f.b / f.X.shape[0])

    found = bilevel.hypergradient(*ridge, solver=closed, rtol=1e-10)
    assert int(found.steps) <= 1
    assert relative(found.gradient, reference(*ridge).gradient) <= 1e-10
    with pytest.raises(ValueError, match="shape"):
        bilevel.hypergradient(*ridge, solver=lambda x: jnp.zeros(2))


@pytest.mark.long
def test_a_hopeless_black_box_is_not_believed():
    far = solvers.Host(lambda x, y0: y0 + 1e6)
    found = bilevel.hypergradient(*CASE, solver=far, max_steps=3, throw=False)
    assert not found.converged or relative(found.gradient, TRUTH.gradient) <= 1e-6
    blank = solvers.Host(lambda x, y0: y0 * np.nan)
    assert not bilevel.hypergradient(*CASE, solver=blank, throw=False).converged
    assert np.all(np.isnan(bilevel.solve(INNER, CASE.x, CASE.y0, solver=blank, throw=False).y))


def test_without_a_correction_the_solver_alone_has_to_do_it():
    found = bilevel.solve(INNER, CASE.x, CASE.y0, adjoint=ImplicitAdjoint(correction=None), rtol=1e-6)
    assert relative(found.y, TRUTH.y) <= 1e-6
    stuck = bilevel.solve(INNER, CASE.x, CASE.y0, solver=crude, adjoint=ImplicitAdjoint(correction=None), throw=False)
    assert not stuck.converged


# ------------------------------------------------------------------------------------------------ derivatives


@pytest.mark.long
def test_first_derivatives_in_both_modes():
    assert relative(jax.grad(h)(CASE.x), TRUTH.gradient) < 1e-8
    w = jnp.arange(1.0, 5.0)
    u = jnp.cos(jnp.arange(6.0))
    y = lambda x: bilevel.solve(INNER, x, CASE.y0).y
    tangent, pull = jax.jvp(y, (CASE.x,), (w,))[1], jax.vjp(y, CASE.x)[1]
    np.testing.assert_allclose(jnp.dot(u, tangent), jnp.dot(pull(u)[0], w), rtol=1e-12)
    J = -jnp.linalg.solve(TRUTH.hessian, jax.jacfwd(INNER.optimality)(CASE.x, TRUTH.y))
    np.testing.assert_allclose(tangent, J @ w, rtol=1e-8)


@pytest.mark.long
@pytest.mark.parametrize("mode", ["hessian", "reverse_over_reverse", "reverse_over_forward", "forward_over_forward"])
def test_second_derivatives_in_every_mode(mode):
    outer, inner = {
        "hessian": (jax.jacfwd, jax.jacrev),
        "reverse_over_reverse": (jax.jacrev, jax.jacrev),
        "reverse_over_forward": (jax.jacrev, jax.jacfwd),
        "forward_over_forward": (jax.jacfwd, jax.jacfwd),
    }[mode]
    found = outer(inner(h))(CASE.x)
    truth = jax.hessian(true_h_derivatives(CASE.x))(CASE.x)
    np.testing.assert_allclose(found, truth, atol=float(1e-7 * np.linalg.norm(truth)))
    np.testing.assert_allclose(found, found.T, atol=1e-8)


@pytest.mark.long
def test_third_derivatives():
    w = jnp.arange(1.0, 5.0) / 5
    along = lambda f: lambda t: f(CASE.x + t * w)
    third = lambda f: jax.grad(jax.grad(jax.grad(along(f))))(0.0)
    np.testing.assert_allclose(third(h), third(true_h_derivatives(CASE.x)), rtol=1e-7)


@pytest.mark.parametrize("linear_solver", [Direct(), ConjugateGradient()])
def test_the_linear_solver_asked_for_is_used_in_derivatives(linear_solver):
    adjoint = ImplicitAdjoint(linear_solver)
    value = lambda x: OUTER(x, bilevel.solve(INNER, x, CASE.y0, adjoint=adjoint).y)
    assert relative(jax.jit(jax.grad(value))(CASE.x), TRUTH.gradient) < 1e-8


def test_more_unknowns_than_the_dense_limit(monkeypatch):
    monkeypatch.setattr(bilevel.linear, "DENSE_LIMIT", 4)
    # another max_steps: another compilation, which sees the limit
    value = lambda x: OUTER(x, bilevel.solve(INNER, x, CASE.y0, max_steps=1999).y)
    text = str(jax.make_jaxpr(jax.grad(value))(CASE.x))
    assert "cholesky" not in text
    assert relative(jax.grad(value)(CASE.x), TRUTH.gradient) < 1e-8


@pytest.mark.long
def test_jit_vmap_scan():
    eager = jax.grad(h)(CASE.x)
    np.testing.assert_allclose(jax.jit(jax.grad(h))(CASE.x), eager, rtol=1e-10)
    xs = jnp.stack([CASE.x, CASE.x + 0.2, -CASE.x])
    batch = jax.vmap(jax.grad(h))(xs)
    for x, row in zip(xs, batch, strict=True):
        assert relative(row, reference(CASE.problem, x, CASE.y0).gradient) < 1e-8
    over_y0 = jax.vmap(lambda y0: bilevel.solve(INNER, CASE.x, y0).y)(jnp.stack([CASE.y0, CASE.y0 + 0.5]))
    assert relative(over_y0, jnp.stack([TRUTH.y, TRUTH.y])) < 1e-9

    def descend(x):
        def step(carry, _):
            x, y = carry
            y = bilevel.solve(INNER, x, y).y
            return (x - 0.05 * jnp.sin(y[:4]), y), OUTER(x, y)

        return jnp.sum(jax.lax.scan(step, (x, CASE.y0), None, length=3)[1])

    def unrolled(x):
        y, total = CASE.y0, 0.0
        for _ in range(3):
            y = reference(CASE.problem, x, y).y
            total += float(OUTER(x, y))
            x = x - 0.05 * jnp.sin(y[:4])
        return total

    np.testing.assert_allclose(descend(CASE.x), unrolled(CASE.x), rtol=1e-9)
    e = jnp.array([1e-5, 0.0, 0.0, 0.0])
    slope = (unrolled(CASE.x + e) - unrolled(CASE.x - e)) / 2e-5
    _rule._warned_start = True  # y0 is carried, and so differentiated; the next test is about the warning
    found = jax.grad(descend)(CASE.x)[0]
    np.testing.assert_allclose(found, slope, rtol=1e-6)


def test_the_starting_point_has_no_derivative_and_one_is_told():
    _rule._warned_start = False
    with pytest.warns(UserWarning, match="starting point"):
        g = jax.grad(lambda y0: jnp.sum(bilevel.solve(INNER, CASE.x, y0).y))(CASE.y0)
    np.testing.assert_array_equal(g, 0)
    jax.grad(lambda y0: jnp.sum(bilevel.solve(INNER, CASE.x, y0).y))(CASE.y0)  # said once: a warning is an error here


@pytest.mark.long
def test_closures_over_traced_values():
    """What peers fail on: everything the objective closes over is differentiated, in every transformation."""
    f = INNER.objective

    def through(a):
        inner = lambda x, y: f(x, y) + 0.5 * a * jnp.sum(y**2)
        return OUTER(CASE.x, bilevel.solve(inner, CASE.x, CASE.y0).y)

    def slope(a):
        inner = lambda x, y: f(CASE.x, y) + 0.5 * x[0] * jnp.sum(y**2)
        problem = BilevelProblem(inner, lambda x, y: OUTER(CASE.x, y))
        return reference(problem, jnp.array([a]), CASE.y0).gradient[0]

    np.testing.assert_allclose(jax.grad(through)(0.7), slope(0.7), rtol=1e-8)
    np.testing.assert_allclose(jax.jit(jax.jacfwd(through))(0.7), slope(0.7), rtol=1e-8)
    batch = jax.vmap(jax.grad(through))(jnp.array([0.1, 0.7]))
    np.testing.assert_allclose(batch, [slope(0.1), slope(0.7)], rtol=1e-8)
    second = (slope(0.7 + 1e-5) - slope(0.7 - 1e-5)) / 2e-5
    np.testing.assert_allclose(jax.grad(jax.grad(through))(0.7), second, rtol=1e-6)


def test_derivatives_in_data_held_as_leaves():
    def loss(A):
        inner = Minimization(eqx.tree_at(lambda f: f.A, INNER.objective, A))
        return OUTER(CASE.x, bilevel.solve(inner, CASE.x, CASE.y0).y)

    A = INNER.objective.A
    E = jnp.zeros_like(A).at[1, 2].set(1e-5)
    value = lambda A: float(
        reference(BilevelProblem(eqx.tree_at(lambda f: f.A, INNER.objective, A), OUTER), CASE.x, TRUTH.y).value
    )
    np.testing.assert_allclose(jax.grad(loss)(A)[1, 2], (value(A + E) - value(A - E)) / 2e-5, rtol=1e-6)


def test_aux_and_its_derivatives():
    def objective(x, y):
        return INNER.objective(x, y), {"sum": jnp.sum(x) * jnp.sum(y), "flag": jnp.asarray(3)}

    inner = Minimization(objective, has_aux=True)
    found = bilevel.solve(inner, CASE.x, CASE.y0)
    np.testing.assert_allclose(found.aux["sum"], jnp.sum(CASE.x) * jnp.sum(TRUTH.y), rtol=1e-9)
    assert int(found.aux["flag"]) == 3
    g = jax.grad(lambda x: bilevel.solve(inner, x, CASE.y0).aux["sum"])(CASE.x)
    truth = reference(BilevelProblem(INNER, lambda x, y: jnp.sum(x) * jnp.sum(y)), CASE.x, CASE.y0).gradient
    assert relative(g, truth) < 1e-8


# ------------------------------------------------------------------------------------------------ kinds, dtypes


@pytest.mark.long
def test_roots_and_fixed_points_with_a_non_symmetric_jacobian():
    """The transposed solve is the adjoint's; a symmetric shortcut would be silently wrong here."""
    rng = np.random.default_rng(3)
    W = jnp.asarray(0.8 * rng.normal(size=(5, 5)) / np.sqrt(5))
    step = lambda x, y: jnp.tanh(W @ y + x)
    outer = lambda x, y: jnp.sum(jnp.sin(y) * jnp.arange(1.0, 6.0)) + jnp.dot(x, y) ** 2
    x, y0 = jnp.asarray(rng.normal(size=5)), jnp.zeros(5)
    for inner in (FixedPoint(step), Root(lambda x, y: 3.0 * (y - step(x, y)))):
        problem = BilevelProblem(inner, outer)
        truth = reference(problem, x, y0)
        assert relative(bilevel.hypergradient(problem, x, y0, rtol=1e-9).gradient, truth.gradient) < 1e-9
        value = lambda x, inner=inner: outer(x, bilevel.solve(inner, x, y0).y)
        assert relative(jax.grad(value)(x), truth.gradient) < 1e-8
        assert relative(jax.jacfwd(value)(x), truth.gradient) < 1e-8
    at = lambda x: np.asarray(reference(problem, x, truth.y).gradient)
    e = 1e-5 * np.eye(5)[0]
    row = (at(x + e) - at(x - e)) / 2e-5
    gradient = lambda x: bilevel.hypergradient(problem, x, y0, rtol=1e-9).gradient
    np.testing.assert_allclose(jax.jvp(gradient, (x,), (jnp.eye(5)[0],))[1], row, rtol=1e-5)
    np.testing.assert_allclose(jax.vjp(gradient, x)[1](jnp.eye(5)[0])[0], row, rtol=1e-5)


@pytest.mark.long
def test_float32_with_x64_enabled():
    case = smooth(dtype=np.float32)
    inner: Any = case.problem.inner
    for solver in (None, solvers.Jaxopt(), solvers.Scipy()):
        found = bilevel.solve(inner, case.x, case.y0, solver=solver)
        assert found.y.dtype == jnp.float32
        assert found.residual.dtype == jnp.float32
        assert distance(found.y, TRUTH.y) < 1e-4
    g = jax.grad(lambda x: case.problem.outer(x, bilevel.solve(inner, x, case.y0).y))(case.x)
    assert g.dtype == jnp.float32
    assert relative(g, TRUTH.gradient) < 1e-4


def test_one_unknown():
    root = bilevel.solve(Root(lambda x, y: y**3 - x), jnp.asarray(8.0), jnp.asarray(1.0))
    np.testing.assert_allclose(root.y, 2.0, rtol=1e-10)
    slope = jax.grad(lambda x: bilevel.solve(Root(lambda x, y: y**3 - x), x, jnp.asarray(1.0)).y)(8.0)
    np.testing.assert_allclose(slope, 1 / 12, rtol=1e-9)


@pytest.mark.parametrize("correction", [None, bilevel.Jacobi(), bilevel.Newton()])
def test_an_accuracy_near_round_off_that_can_be_had_is_had(correction):
    """What is left is within ten times what round-off may be, but less was asked for: the solver goes on."""
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    hessian = jnp.asarray(turn @ np.diag(np.geomspace(1 / 30, 1, 8)) @ turn.T, jnp.float32)
    b = jnp.asarray(rng.normal(size=8), jnp.float32)
    f = lambda x, y: 0.5 * y @ (hessian @ y) - x * (b @ y) + 0.1 * jnp.sum(jnp.logaddexp(y, -y))
    found = bilevel.solve(
        f, jnp.float32(0.7), jnp.zeros(8, jnp.float32), adjoint=ImplicitAdjoint(correction=correction)
    )
    assert found.converged
