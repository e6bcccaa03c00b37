"""The checks are not vacuous: an engine broken in any of these ways fails one of them.

A mutant is an edit of the source of one engine function, compiled in place for one test. If an edit no longer
applies, because that code has changed, its test fails and says so: write the edit anew.
"""

import importlib
import inspect
import sys
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

from bilevel import BilevelProblem, Composite, ConjugateGradient, FixedPoint, Minimization, Reparametrization, prox
from bilevel import testing as checks
from bilevel.problem import AbstractInner
from problems import transport

X, Y0 = jnp.array([0.3, -0.2]), jnp.zeros(2)


def stay(x, y0):
    """The engine's own Newton steps find y: half the compilation."""
    return y0


# New functions in every call: nothing compiled before a mutation is used after it.
def smooth(x, y):
    return 0.5 * jnp.sum(jnp.exp(x) * y**2) + 0.1 * jnp.sum(y**4) + 0.3 * y[0] * y[1] - jnp.dot(x, y) - jnp.sum(y)


def outer() -> Callable:
    return lambda x, y: jnp.sum((y - 1.0) ** 2) * (1 + 0.1 * x[0]) + 0.1 * jnp.sum(x**2)


def minimum() -> tuple:
    return BilevelProblem(lambda x, y: smooth(x, y), outer()), X, Y0


def fixed_point() -> tuple:
    T = jnp.array([[0.3, 1.6], [-1.4, 0.1]])  # far from symmetric: refinement repairs what is nearly right
    return BilevelProblem(FixedPoint(lambda x, y: jnp.tanh(T @ y + x)), outer()), X, Y0


def sliding(length: float = 2.0) -> tuple:
    """Invariant under adding a constant to y, declared with a direction that is no unit vector."""
    inner = lambda x, y: jnp.exp(x[0]) * jnp.cosh(y[0] - y[1]) - (x[1] + 1) * (y[0] - y[1])
    gauged = Minimization(inner, gauge=[length * jnp.ones(2)])
    return BilevelProblem(gauged, lambda x, y: jnp.sin(y[0] - y[1]) + x[0] ** 2), X, jnp.array([0.2, 0.0])


def sparse() -> tuple:
    """A lasso with one weight off, solved on its support by conjugate gradients (`few_dense` below)."""
    H = jnp.array([[2.0, 0.3, 0.1], [0.3, 1.5, -0.2], [0.1, -0.2, 1.0]])
    bowl = lambda x, y: 0.5 * y @ H @ y - jnp.dot(jnp.array([2.0, 0.3, -1.9]), y) - x[1] * y[2]
    inner = Composite(bowl, prox.l1(lambda x: jnp.exp(x[0])))
    return BilevelProblem(inner, outer()), X, jnp.array([0.4, 0.0, -0.3])


class Matrixfree(AbstractInner):
    """The smooth problem, solved by conjugate gradients."""

    tag: object = eqx.field(static=True)  # a new one in every case, so that the cases share no compiled programs

    def optimality(self, x, y):
        return jax.grad(smooth, argnums=1)(x, y)

    @property
    def symmetric(self):
        return True

    @property
    def definite(self):
        return True

    @property
    def linear_solver(self):
        return ConjugateGradient()


def matrixfree() -> tuple:
    return BilevelProblem(Matrixfree(tag=object()), outer()), X, Y0


def transported() -> tuple:
    """Entropic transport with concentrated weights and little entropy: from potentials that leave the weights out,
    Newton's steps do not get there."""
    costs = jnp.abs(jnp.arange(3.0)[:, None] - jnp.arange(3.0)) ** 1.5
    ot = transport.EntropicOT(
        lambda x: costs * jnp.exp(x[0]) + x[1] * jnp.sin(jnp.arange(9.0).reshape(3, 3)),
        jnp.array([0.9, 0.05, 0.05]), jnp.array([0.05, 0.05, 0.9]), 0.1,
    )  # fmt: skip
    return BilevelProblem(ot, lambda x, y: jnp.sum(jnp.sqrt(ot.coupling(x, y)))), X, ot.initial()


def hypergradient(case):
    problem, x, y0 = case
    checks.check_hypergradient(problem, x, y0, solver=stay, unique=False)


def by_log_sweeps(case):
    problem, x, y0 = case
    assert checks.taylor_order(problem, x, y0, solver=transport.Sinkhorn("log")) >= 1.9


def order_two(case):
    assert checks.efficiency_order(*case) >= 1.9


def error_estimate(case):
    problem, x, y0 = case
    checks.check_error_estimate(problem, x, y0, solver=stay)


def transforms(case):
    checks.check_transforms(*case)


def operator(case):
    checks.check_operator(*case)


def reparametrization(case):
    phi = Reparametrization(lambda x, z: jnp.exp(0.5 * x) * z, lambda x, y: jnp.exp(-0.5 * x) * y)
    problem, x, y0 = case
    checks.check_reparametrization(problem, x, y0, phi)


class Mutant(NamedTuple):
    name: str
    where: str  # module:function or module:Class.method
    old: str | tuple[str, ...]
    new: str | tuple[str, ...]
    check: Callable
    case: Callable = minimum


E = "bilevel.adjoint._evaluate:evaluate"
C = "bilevel.correct:correct"
MUTANTS = [
    Mutant("sign of the adjoint", E, "trees.subtract(g_x, coupling)", "trees.add(g_x, coupling)", hypergradient),
    Mutant("missing cross term", E, "gradient = trees.subtract(g_x, coupling)", "gradient = g_x", hypergradient),
    Mutant("outer gradient in x dropped", E, "subtract(g_x, coupling)", "subtract(0 * g_x, coupling)", hypergradient),
    Mutant("one per cent too long", E, "subtract(g_x, coupling)", "subtract(g_x, 1.01 * coupling)", hypergradient),
    Mutant(
        "adjoint lacks a component",
        E,
        "coupling = pull_x(v)[0]",
        "coupling = pull_x(v.at[1].set(0))[0]",
        hypergradient,
    ),
    Mutant(
        "value of the wrong function",
        "bilevel.hypergradient:_package",
        "mask(found.value)",
        "mask(found.value) + 1",
        hypergradient,
    ),
    Mutant("P's step applied twice", C, "point = point - move", "point = point - 2 * move", order_two),
    Mutant("half of P's step", C, "point = point - move", "point = point - 0.5 * move", order_two),
    Mutant("P's step in the wrong direction", C, "point = point - move", "point = point + move", order_two),
    Mutant("never corrects", C, "kept = jnp.where(used, point, flat)", "kept = flat", order_two),
    Mutant(
        "outer gradient at y instead of the corrected point",
        "bilevel.adjoint._implicit:_estimate",
        "problem, x, here, unravel, helper",
        "_Pair(inner, lambda x, y: problem.outer(x, jax.tree.map("
        "lambda a, b: a + jax.lax.stop_gradient(b - a), y, unravel(flat)))), x, here, unravel, helper",
        order_two,
    ),
    Mutant(
        "refinement dropped",
        "bilevel.linear._base:refine",
        ("v = apply(b) if guess is None else guess", "(count < 20)"),
        ("v = apply(b)", "(count < 1)"),
        order_two,
    ),
    Mutant(
        "error estimate of the wrong order",
        E,
        "trees.norm(vector) + floor",
        "trees.norm(vector) ** 2 + floor",
        error_estimate,
    ),
    Mutant(
        "error estimate 100 times too small",
        E,
        "trees.norm(vector) + floor",
        "0.01 * trees.norm(vector) + floor",
        error_estimate,
    ),
    Mutant(
        "error estimate 100 times too large",
        E,
        "trees.norm(vector) + floor",
        "100 * trees.norm(vector) + floor",
        error_estimate,
    ),
    Mutant(
        "error estimate without its adjoint part",
        E,
        "vector = trees.subtract(tangent[0], ",
        "vector = trees.subtract(0 * tangent[0], 0.0 * ",
        error_estimate,
    ),
    Mutant(
        "tangent of the Lagrangian without its scale",
        "bilevel.adjoint._evaluate:_lagrangian_tangent",
        "along_y * scale",
        "along_y",
        error_estimate,
    ),
    Mutant(
        "residual measured in the wrong norm",
        E,
        "inner_residual=jnp.linalg.norm(residual)",
        "inner_residual=jnp.sum(jnp.abs(residual))",
        error_estimate,
    ),
    Mutant(
        "adjoint solve not transposed",
        "bilevel._dense:Dense.solve",
        "self._bare(first * b, transpose)",
        "self._bare(first * b, False)",
        hypergradient,
        fixed_point,
    ),
    Mutant(
        "products not transposed",
        "bilevel._system:linear_system",
        "if inner.symmetric:",
        "if True:",
        hypergradient,
        fixed_point,
    ),
    Mutant(
        "preconditioner not transposed",
        "bilevel._dense:Dense._bare",
        "trans=1 if transpose else 0",
        "trans=0",
        hypergradient,
        fixed_point,
    ),
    Mutant(
        "support mask off by one",
        "bilevel._system:linear_system",
        "ravel_like(part(unravel(w)), flat.dtype)",
        "jnp.roll(ravel_like(part(unravel(w)), flat.dtype), 1)",
        hypergradient,
        sparse,
    ),
    Mutant(
        "sign of the Jacobian of solve",
        "bilevel.adjoint._rule:solve_linear",
        "(lambda _, b: solve(x, y, b))",
        "(lambda _, b: -solve(x, y, b))",
        transforms,
    ),
    Mutant(
        "Jacobian of solve two per cent off",
        "bilevel.adjoint._rule:_solve_at",
        "value = system.off_gauge(answer.value)",
        "value = 1.02 * system.off_gauge(answer.value)",
        transforms,
    ),
    Mutant(
        "reverse solve of solve not transposed",
        "bilevel.adjoint._rule:closed_solves",
        "closed(True)",
        "closed(False)",
        transforms,
        fixed_point,
    ),
    Mutant(
        "one CG coefficient wrong",
        "bilevel.krylov:conjugate_gradient",
        "s.x + alpha * s.p",
        "s.x + 1.01 * alpha * s.p",
        transforms,  # hypergradients are refined against the true residual, which repairs it
        matrixfree,
    ),
    Mutant(
        "CG directions not conjugate",
        "bilevel.krylov:conjugate_gradient",
        "beta = gamma / s.gamma",
        "beta = s.gamma / gamma",
        hypergradient,
        matrixfree,
    ),
    Mutant(
        "CG stops at once",
        "bilevel.krylov:conjugate_gradient",
        "(s.step < limit)",
        "(s.step < 1)",
        hypergradient,
        matrixfree,
    ),
    Mutant(
        "only the gauge is kept",  # not to project at all is no error: a part along the gauge has no effect
        "bilevel._system:LinearSystem.off_gauge",
        "v if self.gauge is None else v - self.gauge(v)",
        "v if self.gauge is None else self.gauge(v)",
        hypergradient,
        sliding,
    ),
    Mutant(
        "gauge not shifted away from zero",
        "bilevel._system:shifted",
        "mv(v) + size * gauge(v)",
        "mv(v)",
        hypergradient,
        sliding,
    ),
    Mutant(
        "gauge directions not normalized",
        "bilevel.problem:project_on_gauge",
        "a / s.astype(a.dtype)",
        "a",
        operator,
        sliding,
    ),
    Mutant(
        "outer function in coordinates that do not move with x",
        "bilevel.reparametrize:in_coordinates",
        "_Outer(as_node(outer), local)",
        "lambda _, z: outer(_, local.forward(jax.lax.stop_gradient(_), z))",
        reparametrization,
    ),
    Mutant(
        "log-domain update without its reference weights",
        "problems.transport._pairs:Matrix.soft_min_and_terms",
        "total = terms @ b",
        "total = jnp.sum(terms, axis=1)",
        by_log_sweeps,
        transported,
    ),
]

CAUGHT: dict[str, str] = {}


def mutate(monkeypatch, mutant: Mutant) -> None:
    """Puts the edited function wherever the engine holds the original."""
    module_name, _, path = mutant.where.partition(":")
    module = importlib.import_module(module_name)
    holder: Any = module
    *outside, name = path.split(".")
    for part in outside:
        holder = getattr(holder, part)
    original = holder.__dict__[name] if outside else getattr(holder, name)
    function = inspect.unwrap(getattr(original, "method", original))
    source = textwrap.dedent(inspect.getsource(function))
    olds, news = ((edit,) if isinstance(edit, str) else edit for edit in (mutant.old, mutant.new))
    edited = source
    for old, new in zip(olds, news, strict=True):
        assert old in edited, f"{mutant.name}: {mutant.where} no longer contains {old!r}"
        edited = edited.replace(old, new)
    while edited.startswith("@"):
        edited = edited.split("\n", 1)[1]
    scope: dict[str, Any] = {}
    exec(compile("from __future__ import annotations\n" + edited, f"<{mutant.name}>", "exec"), vars(module), scope)
    broken = scope[name]
    if outside:
        monkeypatch.setattr(holder, name, broken)
        return
    for other in [m for key, m in sys.modules.items() if key == "bilevel" or key.startswith("bilevel.")]:
        for key, value in list(vars(other).items()):
            if value is original:
                monkeypatch.setattr(other, key, broken)


def few_dense(monkeypatch, case) -> None:
    """The sparse case is small, and meant to be solved without its matrix."""
    if case is sparse:
        monkeypatch.setattr(importlib.import_module("bilevel.linear"), "DENSE_LIMIT", 0)


@pytest.mark.long
@pytest.mark.parametrize("mutant", MUTANTS, ids=[m.name for m in MUTANTS])
def test_mutants_are_caught(mutant, monkeypatch):
    few_dense(monkeypatch, mutant.case)
    mutate(monkeypatch, mutant)
    with pytest.raises(AssertionError):
        mutant.check(mutant.case())
    CAUGHT[mutant.name] = mutant.check.__name__


def test_the_table_of_mutants(capsys):
    """Which check caught which mutant (pytest -rP shows it)."""
    assert len(MUTANTS) >= 25
    with capsys.disabled():
        print(f"\n{'mutant':<55} caught by")
        for name, check in CAUGHT.items():
            print(f"{name:<55} {check}")


@pytest.mark.long
@pytest.mark.parametrize("case", [fixed_point, sliding, matrixfree, sparse, transported])
def test_the_right_engine_passes(case, monkeypatch):
    """What the mutants above are held against, where `test_testing.py` does not have it."""
    few_dense(monkeypatch, case)
    (by_log_sweeps if case is transported else hypergradient)(case())
    if case is matrixfree:
        transforms(case())
    if case is sliding:
        operator(case())
