"""Bad input is refused by name; what has no answer gets an error that says which, never a number."""

import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from bilevel import BilevelProblem, Minimization, NotConverged

from .helpers import GLMInner, GLMOuter, counted, distance, glm, poly, reference, relative, rotated, smooth

X3, Y3 = jnp.array([0.3, -0.2, 0.5]), jnp.array([0.4, 0.1, -0.3])


# ------------------------------------------------------------------------------------------------ arguments

BAD_TREES = [
    ("y0", jnp.zeros(4), ValueError, "y0"),  # the objective cannot be evaluated there
    ("y0", jnp.zeros(3, int), ValueError, "dtype"),
    ("y0", jnp.zeros(3, complex), ValueError, "dtype"),
    ("y0", jnp.zeros(3, jnp.float16), ValueError, "float32 and float64"),
    ("y0", jnp.zeros(0), ValueError, "empty"),
    ("y0", {}, ValueError, "empty"),
    ("y0", "three", TypeError, "str"),
    ("x", jnp.zeros(3, int), ValueError, "dtype"),
    ("x", jnp.zeros(5), ValueError, "x"),
    ("x", [jnp.zeros(3), jnp.arange(3)], ValueError, "[1]"),
]


@pytest.mark.parametrize(("argument", "value", "kind", "says"), BAD_TREES)
@pytest.mark.parametrize("function", ["solve", "hypergradient", "estimate"])
def test_bad_trees_are_refused_by_name(function, argument, value, kind, says):
    problem = poly(np.eye(3))
    arguments: Any = {"x": X3, "y0": Y3, argument: value}
    first = problem.inner if function == "solve" else problem
    with pytest.raises(kind) as caught:
        getattr(bilevel, function)(first, arguments["x"], arguments["y0"])
    text = str(caught.value)
    assert text.startswith(f"bilevel.{function}:")
    assert says in text
    assert f"`{argument}`" in text or f"`{argument.rstrip('0')}`" in text or f"{argument} =" in text


@pytest.mark.parametrize("function", ["solve", "hypergradient"])
@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("rtol", 0.0, ValueError),
        ("rtol", -1e-3, ValueError),
        ("rtol", float("nan"), ValueError),
        ("rtol", "tight", TypeError),
        ("atol", -1.0, ValueError),
        ("atol", float("nan"), ValueError),
        ("max_steps", -1, ValueError),
        ("max_steps", 1.5, TypeError),
        ("solver", 3, TypeError),
        ("adjoint", "newton", TypeError),
    ],
)
def test_bad_options_are_refused_by_name(function, name, value, kind):
    problem = poly(np.eye(3))
    first: Any = problem.inner if function == "solve" else problem
    with pytest.raises(kind, match=name):
        getattr(bilevel, function)(first, X3, Y3, **{name: value})


def test_wrong_kinds_of_problem():
    plain: Any = lambda x, y: jnp.sum(y**2)
    problem: Any = poly(np.eye(3))
    with pytest.raises(TypeError, match="problem"):
        bilevel.hypergradient(plain, X3, Y3)
    with pytest.raises(TypeError, match="inner"):
        bilevel.solve(problem, X3, Y3)
    with pytest.raises(TypeError, match="objective"):
        Minimization(3)  # pyright: ignore[reportArgumentType]


def test_objectives_that_are_no_scalars_are_refused_and_nothing_is_computed():
    vector = lambda x, y: y * jnp.sum(x)
    with pytest.raises(ValueError, match=r"objective.*\(3,\)"):
        bilevel.solve(vector, X3, Y3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"outer.*\(3,\)"):
        bilevel.hypergradient(BilevelProblem(lambda x, y: jnp.sum(y**2), vector), X3, Y3)
    with pytest.raises(ValueError, match="int"):
        bilevel.solve(lambda x, y: jnp.asarray(1), X3, Y3)
    with pytest.raises(ValueError, match="aux"):
        bilevel.solve(Minimization(lambda x, y: jnp.sum(y**2), has_aux=True), X3, Y3)
    seen = []

    def watched(x, y):
        jax.debug.callback(seen.append, jnp.sum(y))
        return y

    with pytest.raises(ValueError, match="objective"):
        bilevel.solve(watched, X3, Y3)  # pyright: ignore[reportArgumentType]
    jax.effects_barrier()
    assert not seen


def test_roots_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match="shape"):
        bilevel.solve(bilevel.Root(lambda x, y: jnp.sum(y) * jnp.ones(2)), X3, Y3)
    with pytest.raises(ValueError, match="step"):
        bilevel.solve(bilevel.FixedPoint(lambda x, y: jnp.sum(y)), X3, Y3)


def test_an_error_of_the_users_own_function_keeps_its_cause():
    def broken(x, y):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        bilevel.solve(broken, X3, Y3)


@pytest.mark.long
@pytest.mark.parametrize(
    ("where", "bad"), [("data", np.nan), ("data", np.inf), ("x", np.inf), ("y0", np.nan), ("closure", np.nan)]
)
def test_nan_and_infinity_are_found_and_named(where, bad):
    A = np.eye(3)
    x, y0 = X3, Y3
    if where == "data":
        A = A.copy()
        A[1, 2] = bad
    x = x.at[1].set(bad) if where == "x" else x
    y0 = y0.at[1].set(bad) if where == "y0" else y0
    problem = poly(A)
    name = {"data": r"\.A", "x": "`x`", "y0": "`y0`", "closure": "`weights`"}[where]
    if where == "closure":
        weights = jnp.array([1.0, bad, 1.0])
        problem = BilevelProblem(lambda x, y: jnp.sum(weights * y**2) - jnp.dot(x, y), problem.outer)
    pairs: Any = ((bilevel.solve, problem.inner), (bilevel.hypergradient, problem))
    for function, first in pairs:
        with pytest.raises(NotConverged, match=f"{name}.*1 of"):
            function(first, x, y0)
        result = function(first, x, y0, throw=False)
        assert str(result.status) == "non_finite"
        assert not result.converged
        assert np.all(np.isnan(result.y if function is bilevel.solve else result.gradient))
    found = bilevel.estimate(problem, x, y0)
    assert not found.converged
    assert np.all(np.isnan(found.gradient))
    assert np.isinf(found.error)
    assert str(found.status) == "non_finite"


# ------------------------------------------------------------------------------------------------ words


@pytest.mark.long
def test_below_round_off_is_said():
    case = glm("logistic", 0)
    found = bilevel.hypergradient(*case, rtol=1e-20, throw=False)
    assert not found.converged
    assert str(found.status) == "round_off"
    assert relative(found.gradient, reference(*case).gradient) < 1e-12
    with pytest.raises(NotConverged, match="precision"):
        bilevel.hypergradient(*case, rtol=1e-20)


def test_stationary_points_of_the_outer_problem():
    """A relative accuracy of a zero gradient is out of reach, an absolute one is not."""
    case = smooth()
    slope = reference(*case).gradient
    problem = BilevelProblem(case.problem.inner, lambda x, y: case.problem.outer(x, y) - jnp.dot(slope, x))
    found = bilevel.hypergradient(problem, case.x, case.y0, throw=False)
    assert not found.converged
    assert str(found.status) == "round_off"
    assert distance(found.gradient, np.zeros(4)) <= 3 * float(found.error)
    assert bilevel.hypergradient(problem, case.x, case.y0, atol=1e-8).converged


@pytest.mark.long
def test_too_few_steps_are_said():
    case = glm("poisson", 1, d=8, cond=1e3)
    far = case.y0 + 8.0
    found = bilevel.hypergradient(case.problem, case.x, far, max_steps=1, rtol=1e-10, throw=False)
    if not found.converged:
        assert str(found.status) in ("max_steps", "correction_rejected", "estimate_untrusted")
    with pytest.raises(NotConverged, match="max_steps"):
        bilevel.hypergradient(case.problem, case.x, far, max_steps=1, solver=bilevel.solvers.Jaxopt(), rtol=1e-10)


def test_a_rejected_correction_is_said():
    """Newton from 3 for log cosh jumps to -97: the point stays, plain, its error unknown."""
    problem = BilevelProblem(lambda x, y: jnp.sum(jnp.log(jnp.cosh(y - x))), lambda x, y: jnp.sum(jnp.sin(y)))
    found = bilevel.estimate(problem, jnp.zeros(2), jnp.full(2, 3.0))
    assert str(found.status) == "correction_rejected"
    assert not found.converged
    assert np.isinf(found.error)
    np.testing.assert_array_equal(found.y, jnp.full(2, 3.0))
    assert bool(bilevel.hypergradient(problem, jnp.zeros(2), jnp.full(2, 3.0)).converged)


def test_an_x_that_does_not_enter_is_warned_of_by_hypergradient_only():
    inner = lambda x, y: jnp.sum((y - 1.0) ** 2)
    with pytest.warns(UserWarning, match="does not enter"):
        found = bilevel.hypergradient(BilevelProblem(inner, lambda x, y: jnp.sum(x**2) + jnp.sum(y)), X3, Y3)
    np.testing.assert_allclose(found.gradient, 2 * X3, rtol=1e-15)
    np.testing.assert_allclose(bilevel.solve(inner, X3, Y3).y, jnp.ones(3), rtol=1e-9)


def test_a_gradient_that_is_zero_by_chance_is_not_warned_of():
    problem = BilevelProblem(
        lambda x, y: jnp.sum(jnp.cosh(y - x)) + jnp.sum(y**2), lambda x, y: jnp.sum(x) + 0.0 * jnp.sum(y)
    )
    np.testing.assert_allclose(bilevel.hypergradient(problem, X3, Y3).gradient, jnp.ones(3), rtol=1e-15)


# ------------------------------------------------------------------------------------------------ batches


@pytest.mark.long
def test_one_singular_element_does_not_kill_the_batch():
    A = np.stack([rotated(1, 2, 3), rotated(1, 2, 0), rotated(2, 3, 4), np.full((3, 3), np.nan), rotated(1, 2, -1)])
    good = np.array([True, False, True, False, False])
    quartic = jnp.zeros(5).at[3:].set(0.1)  # mends a singular element, not one with NaN; shapes are those below
    mended = np.stack([A[0], A[1], A[2], A[1], A[3]])
    one = jax.jit(jax.vmap(lambda A, c: bilevel.hypergradient(poly(A, c), X3, Y3, rtol=1e-8, throw=False)))
    np.testing.assert_array_equal(one(mended, quartic).converged, [True, False, True, True, False])
    found = one(A, jnp.zeros(5))
    solved = jax.vmap(lambda A: bilevel.solve(poly(A).inner, X3, Y3, throw=False))(jnp.asarray(A))
    for result, tree in ((found, found.gradient), (solved, solved.y)):
        np.testing.assert_array_equal(result.converged, good)
        assert np.all(np.isnan(np.asarray(tree)[~good]))
    for i in np.flatnonzero(good):
        truth = reference(poly(A[i]), X3, Y3)
        assert relative(found.gradient[i], truth.gradient) < 1e-8
        assert relative(solved.y[i], truth.y) < 1e-9
    assert str(found.status) == "[converged, singular, converged, non_finite, not_a_minimum]"


def test_a_traced_failure_raises_at_run_time_with_the_same_text():
    problem = poly(rotated(1, 2, 0))
    with pytest.raises(Exception, match="singular"):
        jax.block_until_ready(jax.jit(lambda x: bilevel.hypergradient(problem, x, Y3).gradient)(X3))
    with pytest.raises(Exception, match="singular"):
        jax.block_until_ready(jax.jit(lambda x: bilevel.solve(problem.inner, x, Y3).y)(X3))


def test_reports_have_no_silent_derivatives():
    inner = poly(np.eye(3), 1.0).inner
    tangent = jax.jvp(lambda x: bilevel.solve(inner, x, Y3).residual, (X3,), (X3,))[1]
    assert np.isnan(tangent)
    with pytest.raises(Exception, match="no derivative"):
        jax.block_until_ready(jax.grad(lambda x: bilevel.solve(inner, x, Y3).residual)(X3))


def test_importing_changes_nothing():
    program = (
        "import jax; before = dict(jax.config.values)\n"
        "import sys, bilevel\n"
        "assert dict(jax.config.values) == before\n"
        "assert not {'jaxopt', 'problems', 'hypothesis'} & set(sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# ------------------------------------------------------------------------------------------------ dtypes


@pytest.mark.long
@pytest.mark.parametrize(("x_dtype", "y_dtype"), [("float32", "float64"), ("float64", "float32")])
def test_x_and_y_of_different_dtypes(x_dtype, y_dtype):
    """The accuracy is that of the coarser one, and is not claimed beyond it."""
    inner = lambda x, y: jnp.sum(jnp.cosh(y)) - jnp.sum(x.astype(y.dtype) * y)
    problem = BilevelProblem(inner, lambda x, y: jnp.sum(jnp.sin(y)))
    x = jnp.array([0.3, 0.7], x_dtype)
    truth = reference(problem, x, jnp.zeros(2)).gradient
    found = bilevel.hypergradient(problem, x, jnp.zeros(2, y_dtype), rtol=1e-5)
    assert found.gradient.dtype == x_dtype
    assert relative(found.gradient, truth) < 1e-5
    fine = bilevel.hypergradient(problem, x, jnp.zeros(2, y_dtype), rtol=1e-10, throw=False)
    assert not fine.converged
    assert distance(fine.gradient, truth) <= 3 * float(fine.error)
    y = bilevel.solve(inner, x, jnp.zeros(2, y_dtype), rtol=1e-5).y
    assert y.dtype == y_dtype
    jax.grad(lambda x: jnp.sum(bilevel.solve(inner, x, jnp.zeros(2, y_dtype), rtol=1e-5).y))(x)


def test_leaves_of_different_dtypes_do_not_claim_the_finer_one():
    wide = lambda a: a.astype(jnp.float64)

    def inner(x, y):
        coupled = 0.1 * jnp.sum(wide(y["a"])) * jnp.sum(y["b"])
        return wide(jnp.sum(jnp.cosh(y["a"]))) + jnp.sum(jnp.cosh(y["b"])) - jnp.sum(x * wide(y["a"])) + coupled

    outer = lambda x, y: jnp.sum(jnp.sin(wide(y["a"]))) + jnp.sum(y["b"] ** 2)
    split = lambda f: lambda x, y: f(x, {"a": y[:2], "b": y[2:]})
    x, y0 = jnp.array([0.3, 0.7]), {"a": jnp.zeros(2, jnp.float32), "b": jnp.zeros(2)}
    truth = reference(BilevelProblem(split(inner), split(outer)), x, jnp.zeros(4))
    found = bilevel.hypergradient(BilevelProblem(inner, outer), x, y0, rtol=1e-9, throw=False)
    assert found.y["a"].dtype == jnp.float32
    assert not found.converged
    assert str(found.status) == "round_off"
    assert distance(found.gradient, truth.gradient) <= 3 * float(found.error)


def test_python_and_numpy_numbers_are_taken():
    problem = BilevelProblem(lambda x, y: jnp.cosh(y) - x * y, lambda x, y: jnp.sin(y))
    truth = np.cos(np.arcsinh(0.3)) / np.sqrt(1 + 0.3**2)
    for x, y0 in ((0.3, 0.1), (np.float64(0.3), np.asarray(0.1)), (jnp.asarray(0.3), 0.1)):
        assert abs(float(bilevel.hypergradient(problem, x, y0, rtol=1e-10).gradient) - truth) < 1e-10


def test_counting_traces_counts():  # the tool of the tests of compilation
    f, calls = counted(lambda a: a + 1.0)
    jitted = jax.jit(f)
    jitted(1.0)
    jitted(2.0)
    assert len(calls) == 1


@pytest.mark.long
def test_integer_and_boolean_data_are_fine():
    case = glm("ridge", 3)
    inner = GLMInner(case.problem.inner.objective.X, case.problem.inner.objective.b, jnp.asarray(0, jnp.int32))
    problem = BilevelProblem(Minimization(inner), GLMOuter(inner.X, inner.b, jnp.asarray(0, jnp.int32)))
    g = jax.grad(lambda x: problem.outer(x, bilevel.solve(problem.inner, x, case.y0).y))(case.x)
    assert relative(g, reference(problem, case.x, case.y0).gradient) < 1e-9


class _Knowing(bilevel.AbstractInner):
    """A root without a solution that can say why."""

    def optimality(self, x, y):
        return x + y**2

    def trouble_at(self, x, y):
        return f"x is {float(x):g}, and no square is negative."


def test_an_inner_problem_may_say_itself_what_is_wrong():
    with pytest.raises(NotConverged, match="bilevel.solve: x is 1, and no square is negative"):
        bilevel.solve(_Knowing(), jnp.asarray(1.0), jnp.asarray(0.5))


class _AtZero(bilevel.AbstractInner):
    """A quadratic inner problem whose solution at x = 0 is y = 0, written with round-off that |y| knows nothing of."""

    unit: float

    def optimality(self, x, y):
        return (y + 1e3) - 1e3 - x

    def unit_at(self, x, y):
        return self.unit


def test_an_inner_problem_may_say_what_its_unit_is():
    """Where y is zero, its norm is no measure of round-off."""
    x, y0 = jnp.zeros(3), jnp.asarray([1e-14, -2e-14, 1e-14])
    outer = lambda x, y: jnp.sum(jnp.sin(y + 1))
    found = bilevel.estimate(BilevelProblem(_AtZero(1e3), outer), x, y0)
    assert found.converged
    assert relative(found.gradient, np.cos(1) * np.ones(3)) < 1e-9


def test_a_problem_may_refuse_to_be_minimized():
    class Refusing(bilevel.AbstractBilevelProblem):
        inner: bilevel.AbstractInner

        def outer(self, x, y):
            return jnp.sum(y)

        def before_minimizing(self, x, y):
            raise ValueError("every x is a minimizer")

    problem = Refusing(_AtZero(1e3))
    assert bilevel.estimate(problem, X3, X3).converged
    with pytest.raises(ValueError, match="every x is a minimizer"):
        bilevel.minimize(problem, X3, X3)
