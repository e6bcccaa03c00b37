"""What is asked: inner problems (each defines its optimality F(x, y) = 0) and the bilevel problem over them.

An inner problem says what its solution is and how dF/dy is structured; it says nothing about derivatives in x.
The engine asks the questions of `AbstractInner` and never tests for a class.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree, Scalar

from ._functions import as_given, as_node, callable_node, check_scalar, same_function
from ._trees import check_like, shapes_of
from .errors import Status

__all__ = [
    "AbstractBilevelProblem",
    "AbstractInner",
    "AbstractMinimization",
    "BilevelProblem",
    "FixedPoint",
    "Minimization",
    "Root",
    "as_given",
    "as_node",
]


class AbstractInner(eqx.Module):
    """An inner problem: `optimality(x, y)` is F, of y's structure, and zero at the solution y*(x).

    What the engine asks besides, each with a default:

    - `minimizes`: F is the gradient of `objective_at`, which a minimizer may be given;
    - `is_step`: y - F(x, y) is a step that contracts (a fixed-point map, a forward-backward step);
    - `symmetric`: dF/dy is symmetric; `definite`: it must be positive definite (a strict minimum);
    - `operator_at(x, y)`: dF/dy as a lineax operator on y's structure, or None: autodiff;
    - `linear_solver`: who solves with that operator (a `bilevel` or lineax solver), or None: chosen by size;
    - `active_part(x, y)`: w -> D w for a forward-backward residual, D the derivative of its prox, or None;
    - `smooth_between(x, y, z)`: whether F is smooth from y to z (else no error estimate can rest on dF/dy);
    - `status_at(x, y)`: another status than converged where F has no derivative at (x, y);
    - `gauge_part(x, v)`: the part of v along which the solution may slide, or None: the solution is unique;
    - `default_solver`: who finds y when the user names nobody, or None: the library's default for the kind;
    - `objective_at(x, y)`: the scalar being minimized, or None;
    - `is_objective(function)`: whether that scalar is this very function;
    - `aux_at(x, y)`: what the user's function returns besides, or None;
    - `multipliers_at(x, y)`: of the constraints, at a solution, or None;
    - `size_of_error(x, y, F, step)`: (error, scale) by which `solve` judges its rtol, or None: the norm of the
      Newton step against the norm of y;
    - `residual_wanted(x, rtol, atol)`: the |F(x, y)|_2 with which that measure is met, where no step is needed to know;
      `solve` then asks the solver for as much, and corrects y only where it falls short; or None;
    - `unit_at(x, y)`: a size of y against which round-off counts where y itself is near zero, or 0: y's own norm;
    - `length_scale(x, y)`: where `size_of_error` does not look at y itself, the length in y within which dF/dy changes:
      `solve` then tries to bring the Newton step below a small part of it, and a derivative of y is refused where
      that step is longer than a thousandth; or None;
    - `trouble_at(x, y)`: after a failure, outside tracing: a sentence about the data that makes it one, or None;
    - `initial()`: a y to start from (plugins).
    """

    @abc.abstractmethod
    def optimality(self, x: PyTree, y: PyTree) -> PyTree:
        """F(x, y), of y's structure."""

    @property
    def symmetric(self) -> bool:
        return False

    @property
    def definite(self) -> bool:
        return False

    @property
    def minimizes(self) -> bool:
        return False

    @property
    def is_step(self) -> bool:
        return False

    @property
    def linear_solver(self) -> Any:
        return None

    @property
    def compiles_quickly(self) -> bool:
        """Whether outer loops compile their programs with little optimization: where what these compute is in products
        of matrices and calls of other libraries, and compiling takes longer than that."""
        return False

    @property
    def default_solver(self) -> Any:
        return None

    def operator_at(self, x: PyTree, y: PyTree) -> Any:
        return None

    def active_part(self, x: PyTree, y: PyTree) -> Callable[[PyTree], PyTree] | None:
        return None

    def smooth_between(self, x: PyTree, y: PyTree, z: PyTree) -> Bool[Array, ""]:
        return jnp.asarray(True)

    def status_at(self, x: PyTree, y: PyTree) -> Status:
        return Status()

    def gauge_part(self, x: PyTree, v: PyTree) -> PyTree | None:
        return None

    def objective_at(self, x: PyTree, y: PyTree) -> Scalar | None:
        return None

    def aux_at(self, x: PyTree, y: PyTree) -> PyTree:
        return None

    def multipliers_at(self, x: PyTree, y: PyTree) -> PyTree:
        return None

    def size_of_error(self, x: PyTree, y: PyTree, residual: PyTree, step: PyTree) -> Any:
        return None

    def residual_wanted(self, x: PyTree, rtol: Scalar, atol: Scalar) -> Scalar | None:
        return None

    def is_objective(self, function: Any) -> bool:
        """Whether `function` is the objective that y*(x) minimizes without constraints, equal data included."""
        return False

    def unit_at(self, x: PyTree, y: PyTree) -> Scalar | float:
        return 0.0

    def length_scale(self, x: PyTree, y: PyTree) -> Scalar | None:
        return None

    def trouble_at(self, x: PyTree, y: PyTree) -> str | None:
        return None

    def check(self, x: PyTree, y: PyTree) -> None:
        """Raises ValueError unless F can be evaluated at (x, y) and has y's structure and shapes (shapes only)."""
        name = type(self).__name__
        check_like(shapes_of(self.optimality, x, y), y, name, "the optimality F(x, y)", "y")

    def initial(self) -> PyTree:
        """A y to start from; not every inner problem knows one."""
        raise ValueError(f"bilevel.{type(self).__name__}: this inner problem knows no starting point; pass y0.")


class AbstractMinimization(AbstractInner):
    """Interface: y*(x) minimizes `objective_at(x, y)`, strictly; F is its gradient in y."""

    @abc.abstractmethod
    def objective_at(self, x: PyTree, y: PyTree) -> Scalar:
        """The objective, a floating scalar."""

    def optimality(self, x: PyTree, y: PyTree) -> PyTree:
        """The gradient of the objective in y."""
        return jax.grad(self.objective_at, argnums=1)(x, y)

    @property
    def minimizes(self) -> bool:
        return True

    @property
    def symmetric(self) -> bool:
        return True

    @property
    def definite(self) -> bool:
        return True

    def check(self, x, y):
        check_scalar(shapes_of(self.objective_at, x, y), type(self).__name__, "objective_at")


def project_on_gauge(gauge: Any, v: PyTree) -> PyTree | None:
    """The part of v along the declared gauge (a projector, or a list of directions like y), or None."""
    if gauge is None:
        return None
    if callable(gauge):
        return gauge(v)
    directions = []
    for u in gauge:  # Gram-Schmidt: a handful of directions, any y
        for w in directions:
            overlap = _inner(w, u)
            u = jax.tree.map(lambda a, b, c=overlap: a - c.astype(a.dtype) * b, u, w)
        length = jnp.sqrt(_inner(u, u))
        directions.append(jax.tree.map(lambda a, s=length: a / s.astype(a.dtype), u))
    part = jax.tree.map(jnp.zeros_like, v)
    for u in directions:
        overlap = _inner(u, v)
        part = jax.tree.map(lambda p, a, c=overlap: p + c.astype(p.dtype) * a.astype(p.dtype), part, u)
    return part


def _inner(a: PyTree, b: PyTree) -> jax.Array:
    with jax.numpy_dtype_promotion("standard"):
        return sum(jnp.vdot(p, q) for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))  # type: ignore


def _structure(operator: Any, gauge: Any) -> tuple[Any, Any]:
    if operator is not None and not callable(operator):
        raise TypeError("bilevel: `operator` must be a function (x, y) -> lineax operator.")
    return as_node(operator), as_node(gauge) if callable(gauge) else gauge


class _Structured(AbstractInner):
    """What `Minimization`, `Root` and `FixedPoint` share: a declared operator and a declared gauge."""

    _operator: Any
    _gauge: Any

    @property
    def operator(self) -> Any:
        return as_given(self._operator)

    @property
    def gauge(self) -> Any:
        return as_given(self._gauge)

    def operator_at(self, x, y):
        return None if self._operator is None else self._operator(x, y)

    def gauge_part(self, x, v):
        return project_on_gauge(self._gauge, v)


class Minimization(_Structured, AbstractMinimization):
    """y*(x) minimizes `objective(x, y)`, a floating scalar; F is its gradient in y.

    **Arguments:** `objective(x, y) -> scalar` (with `has_aux=True`: `(scalar, aux)`). A plain function, a
    `jax.tree_util.Partial` or an `equinox.Module`; arrays held by the latter two are leaves of the problem, so
    that new data of the same shape do not recompile. `operator(x, y)`: the Hessian in y as a lineax operator on
    y's structure, symmetric. `gauge`: a projector `v -> part of v`, or a list of directions like y, along which
    the minimizer may slide.

    **Raises:** TypeError if `objective` is not callable; ValueError when used with an objective that does not
    return one floating scalar.
    """

    _objective: Any
    has_aux: bool = eqx.field(static=True)

    def __init__(self, objective: Callable, *, operator=None, gauge=None, has_aux: bool = False):
        self._objective = callable_node(objective, "Minimization", "objective")
        self._operator, self._gauge = _structure(operator, gauge)
        self.has_aux = has_aux

    @property
    def objective(self) -> Callable:
        return as_given(self._objective)

    def objective_at(self, x, y):
        value = self._objective(x, y)
        return value[0] if self.has_aux else value

    def aux_at(self, x, y):
        return self._objective(x, y)[1] if self.has_aux else None

    def is_objective(self, function):
        return not self.has_aux and same_function(self._objective, as_node(function))

    def check(self, x, y):
        value = shapes_of(self._objective, x, y)
        if self.has_aux:
            if not (isinstance(value, tuple) and len(value) == 2):
                raise ValueError("bilevel.Minimization: with has_aux=True `objective` must return (scalar, aux).")
            value = value[0]
        check_scalar(value, "Minimization", "objective")


class Root(_Structured):
    """y*(x) is a root of `residual(x, y)`, of y's structure; dF/dy may be non-symmetric.

    Arguments `operator` and `gauge` as for `Minimization` (the operator need not be symmetric). Where the residual
    has a kink exactly at the root there is no gradient, and autodiff's one-sided one is used; `testing.check_problem`
    tells.
    """

    _residual: Any

    def __init__(self, residual: Callable, *, operator=None, gauge=None):
        self._residual = callable_node(residual, "Root", "residual")
        self._operator, self._gauge = _structure(operator, gauge)

    @property
    def residual(self) -> Callable:
        return as_given(self._residual)

    def optimality(self, x, y):
        return self._residual(x, y)


class FixedPoint(_Structured):
    """y*(x) is a fixed point of `step(x, y)`, of y's structure; F = y - step(x, y).

    Arguments `operator` (of F) and `gauge` as for `Minimization`. Where the map has a kink exactly at its fixed point
    (a relu with argument zero) there is no gradient, and autodiff's one-sided one is used; `testing.check_problem`
    tells.
    """

    _step: Any

    def __init__(self, step: Callable, *, operator=None, gauge=None):
        self._step = callable_node(step, "FixedPoint", "step")
        self._operator, self._gauge = _structure(operator, gauge)

    @property
    def step(self) -> Callable:
        return as_given(self._step)

    @property
    def is_step(self) -> bool:
        return True

    def optimality(self, x, y):
        return jax.tree.map(lambda a, b: a - b, y, self._step(x, y))

    def check(self, x, y):
        check_like(shapes_of(self._step, x, y), y, "FixedPoint", "step(x, y)", "y")


class AbstractBilevelProblem(eqx.Module):
    """An inner problem and an outer function: minimize `outer(x, y*(x))`.

    Implementations have the attribute (or property) `inner` and the method `outer`.
    """

    inner: eqx.AbstractVar[AbstractInner]

    @abc.abstractmethod
    def outer(self, x: PyTree, y: PyTree) -> Scalar:
        """G(x, y), a floating scalar."""

    @property
    def value_only(self) -> bool:
        """Whether G_y(x, y*(x)) = 0 at every x (inner and outer objective coincide): then no adjoint is solved for."""
        return False

    def error_constants(self, x: PyTree) -> Any:
        """The `ErrorBound` that holds at x, from which every hypergradient gets a guaranteed bound, or None."""
        return None

    @property
    def prox(self) -> Callable | None:
        """`prox(x, t)` of t times a penalty that `minimize` adds to the outer function, or None."""
        return None

    def penalty(self, x: PyTree) -> Scalar | None:
        """The value of that penalty, or None where there is none."""
        return None

    def before_minimizing(self, x: PyTree, y: PyTree) -> None:
        """Asked once by `minimize`, outside tracing: raises ValueError where there is no single minimizer to find."""

    def initial(self) -> tuple[PyTree, PyTree]:
        """`(x0, y0)` to start from; plugins know one."""
        raise ValueError(f"bilevel.{type(self).__name__}: this problem knows no starting point; pass x0 and y0.")

    def check(self, x: PyTree, y: PyTree) -> None:
        """Raises ValueError unless inner and outer functions fit (x, y). Looks at shapes only."""
        self.inner.check(x, y)
        check_scalar(shapes_of(self.outer, x, y), type(self).__name__, "outer")


class BilevelProblem(AbstractBilevelProblem):
    """minimize over x of `outer(x, y*(x))`, where y*(x) solves `inner`.

    **Arguments:** `inner`: an inner problem, or a plain function `(x, y) -> scalar`, which is then a
    `Minimization`. `outer(x, y) -> scalar`: plain function, Partial or Module.

    Where `outer` is the inner objective itself (the same function with equal data), h is the optimal value, its
    gradient f_x(x, y*), and no adjoint system is solved.
    """

    inner: AbstractInner
    _outer: Any  # None: the inner objective itself, held once, so that new data cannot part the two

    def __init__(self, inner, outer: Callable):
        self.inner = inner if isinstance(inner, AbstractInner) else Minimization(inner)
        node = callable_node(outer, "BilevelProblem", "outer")
        self._outer = None if self.inner.is_objective(outer) else node

    @property
    def outer(self) -> Callable:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self._outer is None:
            return self.inner.objective  # pyright: ignore[reportAttributeAccessIssue]
        return as_given(self._outer)

    @property
    def value_only(self) -> bool:
        return self._outer is None

    def __repr__(self):
        return f"BilevelProblem(inner={type(self.inner).__name__}(…), outer=…)"
