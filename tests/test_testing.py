"""The checks pass on right problems and name what is wrong with wrong ones, problems and engines alike."""

import os
import re
import subprocess
import sys
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import pytest

import bilevel
from bilevel import BilevelProblem, FixedPoint, ImplicitAdjoint, Minimization, Reparametrization
from bilevel import testing as checks

X = jnp.array([0.3, -0.2])
Y0 = jnp.zeros(2)


def bowl(x, y):
    return 0.5 * jnp.sum(jnp.exp(x) * y**2) + 0.1 * jnp.sum(y**4) + 0.3 * y[0] * y[1] - jnp.dot(x, y) - jnp.sum(y)


def outer(x, y):
    return jnp.sum((y - 1.0) ** 2) * (1 + 0.1 * x[0]) + 0.1 * jnp.sum(x**2)


RIGHT = BilevelProblem(bowl, outer)


def message(check, *args, **kwargs) -> str:
    with pytest.raises(AssertionError) as caught:
        check(*args, **kwargs)
    text = str(caught.value)
    assert text.startswith("bilevel.testing.")
    return text


def numbers(text: str) -> int:
    return len(re.findall(r"\d\.\d+|\b\d+\b", text))


# ------------------------------------------------------------------------------------------------ right problems


def test_a_right_problem_passes():
    checks.check_problem(RIGHT, X, Y0)
    assert abs(checks.taylor_order(RIGHT, X, Y0) - 2) < 0.1
    assert abs(checks.efficiency_order(RIGHT, X, Y0, ImplicitAdjoint()) - 2) < 0.1
    assert abs(checks.efficiency_order(RIGHT, X, Y0, ImplicitAdjoint(correction=None)) - 1) < 0.1


@pytest.mark.long
def test_trees_a_quadratic_inner_problem_a_declared_operator_and_many_entries_of_x():
    """Newton is exact there: no order can be measured, and none is missed."""
    n = 16
    A = jnp.diag(jnp.linspace(1.0, 3.0, n)) + 0.1

    def inner(x, y):
        return (
            0.5 * y["a"] @ (A @ y["a"])
            + 0.5 * jnp.sum(jnp.exp(x["s"]) * y["a"] ** 2)
            - jnp.sum(jnp.sin(x["t"]) * y["a"])
        )

    def operator(x, y):
        matrix = A + jnp.diag(jnp.exp(x["s"]))
        shape = jax.eval_shape(lambda: y)
        return lx.FunctionLinearOperator(lambda v: {"a": matrix @ v["a"]}, shape, lx.positive_semidefinite_tag)

    problem = BilevelProblem(Minimization(inner, operator=operator), lambda x, y: jnp.sum((y["a"] - 1.0) ** 2))
    x = {"s": jnp.linspace(-1, 1, n), "t": jnp.asarray(0.7)}
    y0 = {"a": jnp.zeros(n)}
    checks.check_hypergradient(problem, x, y0)
    checks.check_operator(problem, x, y0)
    assert checks.efficiency_order(problem, x, y0, None) == float("inf")

    wrong = Minimization(inner, operator=lambda x, y: operator({**x, "s": 0.9 * x["s"]}, y))
    text = message(checks.check_operator, BilevelProblem(wrong, problem.outer), x, y0)
    assert "operator(x, y)" in text
    assert re.search(r"y\['a'\]\[\d+\]", text)


@pytest.mark.long
def test_float32_is_said_where_it_is_in_the_way():
    x, y0 = X.astype(jnp.float32), Y0.astype(jnp.float32)
    checks.check_hypergradient(RIGHT, x, y0)  # what float32 can do is enough
    checks.check_problem(RIGHT, x, y0)


@pytest.mark.long
def test_a_fixed_point():
    T = jnp.array([[0.3, 0.2], [-0.4, 0.1]])
    problem = BilevelProblem(FixedPoint(lambda x, y: jnp.tanh(T @ y + x)), outer)
    checks.check_problem(problem, X, Y0)


def test_reparametrizations():
    positive = BilevelProblem(lambda x, y: jnp.sum(y - jnp.exp(x) * jnp.log(y)) + 0.1 * jnp.sum(y) ** 2, outer)
    y0 = jnp.ones(2)
    right = Reparametrization(lambda x, z: jnp.exp(z), lambda x, y: jnp.log(y))
    checks.check_reparametrization(positive, X, y0, right)
    wrong = Reparametrization(lambda x, z: jnp.exp(z), lambda x, y: jnp.log(1.01 * y))
    text = message(checks.check_reparametrization, positive, X, y0, wrong)
    assert "forward(x, inverse(x, y)) should be y" in text
    assert "y[" in text


# ------------------------------------------------------------------------------------------------ wrong problems


@pytest.mark.long
def test_swapped_arguments_of_the_same_shape():
    def inner(first, second):  # meant as (y, x)
        return bowl(second, first)

    text = message(checks.check_problem, BilevelProblem(inner, outer), X, Y0)
    assert "swapped" in text


def test_swapped_arguments_by_name():
    text = message(checks.check_hypergradient, BilevelProblem(lambda y, x: bowl(x, y), outer), X, Y0)
    assert "swapped" in text
    assert "(y, x)" in text


def test_swapped_arguments_of_other_shapes():
    def inner(first, second):
        return jnp.sum((first - second[0] * jnp.arange(3.0)) ** 2)

    text = message(checks.check_hypergradient, BilevelProblem(inner, lambda x, y: y[0]), X, jnp.zeros(3))
    assert "swapped" in text
    assert "inner objective" in text


def test_a_stop_gradient_on_x():
    inner = lambda x, y: bowl(jax.lax.stop_gradient(x), y)
    text = message(checks.check_problem, BilevelProblem(inner, outer), X, Y0)
    assert "stop_gradient" in text
    assert re.search(r"x\[\d\]", text)
    assert numbers(text) >= 2


def test_a_stop_gradient_on_y():
    inner = lambda x, y: bowl(x, jax.lax.stop_gradient(y))
    text = message(checks.check_problem, BilevelProblem(inner, outer), X, Y0)
    assert "stop_gradient" in text
    assert re.search(r"y\[\d\]", text)


def test_a_stop_gradient_in_the_outer_function():
    wrong = lambda x, y: outer(x, jnp.stack([y[0], jax.lax.stop_gradient(y[1])]))
    text = message(checks.check_problem, BilevelProblem(bowl, wrong), X, Y0)
    assert "stop_gradient" in text
    assert "y[1]" in text
    assert "outer function" in text


def test_a_kink_at_the_solution():
    inner = lambda x, y: bowl(x, y) + 5.0 * jnp.abs(y[0])
    text = message(checks.check_problem, BilevelProblem(inner, outer), X, Y0 + 1.0)
    assert "not smooth" in text
    assert "y[0]" in text


def test_a_kink_of_second_order():
    """F is continuous but its derivative jumps, exactly at y*."""
    inner = lambda x, y: jnp.sum(0.5 * y**2 + 2 * jax.nn.relu(y) ** 2 - (x - X) * y)
    text = message(checks.check_problem, BilevelProblem(inner, lambda x, y: jnp.sum(y)), X, Y0)
    assert "not smooth" in text
    assert re.search(r"[xy]\[\d\]", text)


def test_two_minimisers():
    inner = lambda x, y: jnp.sum((y**2 - 1) ** 2) - 0.1 * jnp.dot(x, y)
    text = message(checks.check_problem, BilevelProblem(inner, outer), X, Y0 + 0.8)
    assert "two minimisers" in text
    assert re.search(r"y\[\d\]", text)
    checks.check_hypergradient(BilevelProblem(inner, outer), X, Y0 + 0.8, unique=False)


@pytest.mark.long
def test_an_unconverged_solver():
    far = lambda x: 5.0 + 0 * x
    inner = lambda x, y: jnp.sum(jnp.exp(jnp.sin(3 * y))) + bowl(x, y)
    text = message(checks.check_hypergradient, BilevelProblem(inner, outer), X, Y0, solver=far)
    assert "not converge" in text


def test_a_hypergradient_from_an_unconverged_solver(monkeypatch):
    def loose(problem, x, y0, **_):
        y = y0 + 0.3
        found = bilevel.estimate(problem, x, y, ImplicitAdjoint(correction=None))
        return eqx.tree_at(lambda f: f.converged, found, jnp.asarray(True))

    monkeypatch.setattr(bilevel, "hypergradient", loose)
    text = message(checks.check_hypergradient, RIGHT, X, Y0)
    assert "inner solver not converged" in text
    assert re.search(r"x\[\d\]", text)


@jax.custom_jvp
def square(a):
    return a**2


@square.defjvp
def _square_jvp(primals, tangents):
    return square(primals[0]), 2.02 * primals[0] * tangents[0]


@pytest.mark.parametrize("where", ["inner", "outer"])
def test_a_hand_written_derivative_rule_one_per_cent_off(where):
    if where == "inner":
        problem = BilevelProblem(lambda x, y: bowl(x, y) + jnp.sum(square(y)), outer)
    else:
        problem = BilevelProblem(bowl, lambda x, y: outer(x, y) + square(y[1]))
    text = message(checks.check_problem, problem, X, Y0)
    assert "hand-written derivative rule" in text
    assert "square" in text
    assert re.search(r"y\[\d\]", text)
    if where == "outer":
        assert "y[1]" in text


@pytest.mark.long
def test_x_missing_from_the_inner_problem_is_no_error_of_the_gradient():
    checks.check_hypergradient(BilevelProblem(lambda x, y: bowl(X, y), outer), X, Y0)


# ------------------------------------------------------------------------------------------------ wrong engines

SOLVE, ESTIMATE, HYPERGRADIENT = bilevel.solve, bilevel.estimate, bilevel.hypergradient


def _changed(function, change):
    return lambda *args, **kwargs: change(function(*args, **kwargs))


def _gradient(change):
    return lambda found: eqx.tree_at(lambda f: f.gradient, found, change(found.gradient))


def _error(factor):
    return lambda found: eqx.tree_at(lambda f: f.error, found, factor * found.error)


def _jacobian(factor):
    def change(found):
        fixed = jax.lax.stop_gradient(found.y)
        return eqx.tree_at(lambda f: f.y, found, jax.tree.map(lambda a, b: a + factor * (b - a), fixed, found.y))

    return change


def _never_corrects(function):
    plain = ImplicitAdjoint(correction=None)

    def estimate(problem, x, y, adjoint=None):
        return ESTIMATE(problem, x, y, plain)

    return {"estimate": estimate}[function]


ENGINES: dict[str, tuple[dict[str, Any], str]] = {
    "too long": ({"hypergradient": _changed(HYPERGRADIENT, _gradient(lambda g: 1.002 * g))}, "1.002"),
    "lacks a component": (
        {"hypergradient": _changed(HYPERGRADIENT, _gradient(lambda g: g.at[1].set(0)))},
        r"x\[1\].*missing",
    ),
    "wrong sign": ({"hypergradient": _changed(HYPERGRADIENT, _gradient(lambda g: -g))}, "wrong sign"),
    "Jacobian too long": ({"solve": _changed(SOLVE, _jacobian(1.02))}, r"Jacobian of bilevel.solve.*y\[\d\].*1.02"),
    "Jacobian zero": ({"solve": _changed(SOLVE, _jacobian(0.0))}, "Jacobian of solve is zero"),
    "error too small": (
        {"estimate": _changed(ESTIMATE, _error(0.01)), "hypergradient": _changed(HYPERGRADIENT, _error(0.01))},
        "error estimate is too small",
    ),
    "never corrects": ({"estimate": _never_corrects("estimate")}, "efficiency_order"),
}


@pytest.mark.long
@pytest.mark.parametrize("name", ENGINES)
def test_wrong_engines_fail(name, monkeypatch):
    patches, expected = ENGINES[name]
    for function, replacement in patches.items():
        monkeypatch.setattr(bilevel, function, replacement)
    text = message(checks.check_problem, RIGHT, X, Y0)
    assert re.search(expected, text), text


# ------------------------------------------------------------------------------------------------ imports


def test_hypothesis_is_imported_on_first_use_only():
    program = (
        "import sys, bilevel; assert 'bilevel.testing' not in sys.modules\n"
        "import bilevel.testing; assert 'hypothesis' not in sys.modules\n"
        "bilevel.testing.quadratic_problems(); assert 'hypothesis' in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
