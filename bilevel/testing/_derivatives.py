"""The derivative of the map x -> y: declared operators, forward and reverse mode, transforms, second derivatives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel

from .. import _trees as trees
from ._differences import difference
from ._session import Session, name_of, stay


def check_operator(problem: Any, x: Any, y0: Any) -> None:
    """Checks the declared `operator` (products and transposed products) and the declared `gauge` against autodiff, at
    y* and at y0. Does nothing where none is declared.

    **Raises:** AssertionError: which product, leaf and index, both numbers.
    """
    operator_agrees(Session(problem, x, y0, check="check_operator"))


def operator_agrees(session: Session) -> None:
    inner, x = session.problem.inner, session.x
    declared = inner.operator_at(x, session.y0) is not None
    if not declared and inner.gauge_part(x, session.y0) is None:
        return
    n = session.flat_y0.size
    tolerance = 1e-3 if session.single else 1e-8
    for where, y in (("y*", session.y), ("y0", session.y0)):
        for direction in session.directions(n, 2):
            v = session.unravel_y(jnp.asarray(direction, session.flat_y0.dtype))
            optimality = lambda y: inner.optimality(x, y)
            ahead = session.numbers(jax.jvp(optimality, (y,), (v,))[1])
            if declared:
                operator = inner.operator_at(x, y)
                back = session.numbers(jax.vjp(optimality, y)[1](v)[0])
                _same(
                    session, "operator(x, y) times a vector", session.numbers(operator.mv(v)), ahead, where, tolerance
                )
                transposed = session.numbers(operator.transpose().mv(v))
                _same(session, "the transposed operator(x, y) times a vector", transposed, back, where, tolerance)
            part = inner.gauge_part(x, v)
            if part is None:
                continue
            twice = session.numbers(inner.gauge_part(x, part))
            _same(session, "the gauge, applied twice, as a projector", twice, session.numbers(part), where, tolerance)
            if where == "y*":
                slide = session.numbers(jax.jvp(optimality, (y,), (part,))[1])
                size = float(np.linalg.norm(ahead)) + 1e-30
                if np.linalg.norm(slide) > 1e3 * tolerance * size:
                    i = int(np.argmax(np.abs(slide)))
                    session.fail(
                        f"dF/dy along the declared gauge should vanish at y*, but in {name_of(y, 'F', i)} it is "
                        f"{slide[i]:.6g} (along a random direction |dF/dy v| = {size:.4g}).",
                        ["the gauge is no direction along which the solution slides"],
                    )


def _same(session: Session, what: str, got: np.ndarray, want: np.ndarray, where: str, tolerance: float) -> None:
    scale = float(np.linalg.norm(want)) + 1e-30
    gap = np.abs(got - want)
    gap = np.where(np.isfinite(gap), gap, np.inf)
    if np.max(gap) > tolerance * scale:
        i = int(np.argmax(gap))
        causes = ["the declared structure is not dF/dy"]
        if np.allclose(got, -want):
            causes = ["wrong sign"]
        session.fail(
            f"{what} at {where} gives {got[i]:.10g} in {name_of(session.y0, 'y', i)}, autodiff of F gives "
            f"{want[i]:.10g}.",
            causes,
        )


# ------------------------------------------------------------------------------------------------ x -> y


def _jacobian(session: Session) -> dict[str, np.ndarray]:
    """J w for two directions w, forward mode, and J'g for one g, reverse mode; one compilation."""
    if "jacobian" in session.cache:
        return session.cache["jacobian"]
    inner, start, dtype = session.problem.inner, session.y, session.flat_x.dtype
    m, n = session.flat_x.size, session.flat_y0.size
    w = session.directions(m, 2)
    g = session.directions(n, 1)[0]

    def y_of(flat):
        y = bilevel.solve(inner, session.unravel_x(flat), start, solver=stay, throw=False).y
        return trees.ravel(y)[0]

    def both(flat, w, g):
        forward = jax.vmap(lambda w: jax.jvp(y_of, (flat,), (w,))[1])(w)
        return forward, jax.vjp(y_of, flat)[1](g)[0]

    arguments = (session.flat_x, jnp.asarray(w, dtype), jnp.asarray(g, session.flat_y0.dtype))
    forward, reverse = jax.jit(both)(*arguments)
    found = {
        "w": w, "g": g,
        "forward": np.asarray(forward, np.float64), "reverse": np.asarray(reverse, np.float64),
    }  # fmt: skip
    session.cache["jacobian"] = found
    return found


def check_adjoint_identity(problem: Any, x: Any, y0: Any) -> None:
    """Checks <J w, g> = <w, J'g> for the Jacobian J of `bilevel.solve`: forward against reverse mode.

    **Raises:** AssertionError with both numbers.
    """
    adjoint_identity_holds(Session(problem, x, y0, check="check_adjoint_identity"))


def adjoint_identity_holds(session: Session) -> None:
    if session.flat_x.size == 0:
        return
    found = _jacobian(session)
    tolerance = 1e-3 if session.single else 1e-7
    for w, forward in zip(found["w"], found["forward"], strict=True):
        left, right = float(forward @ found["g"]), float(found["reverse"] @ w)
        size = float(np.linalg.norm(forward)) + float(np.linalg.norm(found["reverse"]))
        if not abs(left - right) <= tolerance * size + session.atol * tolerance:
            session.fail(
                f"forward and reverse mode of bilevel.solve disagree: <Jw, g> = {left:.10g} but <w, J'g> = "
                f"{right:.10g}, |Jw| = {np.linalg.norm(forward):.4g}, |J'g| = {np.linalg.norm(found['reverse']):.4g}.",
                [
                    "the adjoint solve is not with the transpose of dF/dy (an inner problem that is a Minimization "
                    "but whose F is no gradient, a hand-written derivative rule that is not linear, …)"
                ],
            )


def check_transforms(problem: Any, x: Any, y0: Any) -> None:
    """Checks that transformations of the engine agree with it: forward mode of `solve` with reverse mode, and both
    with differences of re-solves; `jit` and `vmap` of `hypergradient` with a loop of plain calls; the Hessian of h
    (the derivative of `hypergradient`) is symmetric and agrees with differences of hypergradients.

    **Raises:** AssertionError: which transformation, leaf and index, both numbers, the steps tried.
    """
    transforms_agree(Session(problem, x, y0, check="check_transforms"))


def transforms_agree(session: Session) -> None:
    if session.flat_x.size == 0:
        return
    adjoint_identity_holds(session)
    _jacobian_agrees(session)
    _batches_agree(session)


def _jacobian_agrees(session: Session) -> None:
    found = _jacobian(session)
    off_gauge = _off_gauge(session)
    tolerance = 1e-2 if session.single else 1e-5
    for w, forward in zip(found["w"], found["forward"], strict=True):
        size = float(np.linalg.norm(forward))
        target = 0.1 * tolerance * size
        slope = difference(
            lambda t, w=w: session.y_at(session.move_x(w, t)), target=target, scale=session.x_scale(w), eps=session.eps
        )
        measured = off_gauge(slope.value)
        gap = np.abs(off_gauge(forward) - measured)
        scale = max(size, float(np.linalg.norm(measured)), session.eps)
        if slope.kink:
            i = int(np.argmax(np.abs(slope.left - slope.right)))
            session.fail(
                f"y* is not smooth in x: the one-sided slopes of {name_of(session.y, 'y', i)} along a random "
                f"direction of x are {slope.left[i]:.8g} and {slope.right[i]:.8g} ({slope.tried}).",
                ["the objective is not smooth here: y* sits on a kink, or jumps to another minimiser"],
            )
        gap = np.where(np.isfinite(gap), gap, np.inf) if np.isfinite(slope.error) else np.zeros_like(gap)
        if np.max(gap) > tolerance * scale + 3 * slope.error:
            i = int(np.argmax(gap))
            ratio = float(forward @ slope.value) / max(float(slope.value @ slope.value), 1e-300)
            causes = [f"the Jacobian of solve is {ratio:.6g} times what re-solves give"]
            if not np.any(forward):
                causes = ["the Jacobian of solve is zero: a stop_gradient, or a solve that does not depend on x"]
            session.fail(
                f"the Jacobian of bilevel.solve differs from differences of re-solves: d{name_of(session.y, 'y', i)} "
                f"along a random direction of x is {forward[i]:.10g}, differences give {slope.value[i]:.10g} (error "
                f"of the differences {slope.error:.1e}, {slope.tried}).",
                causes,
            )


def _off_gauge(session: Session):
    inner = session.problem.inner

    def project(flat):
        v = session.unravel_y(jnp.asarray(flat, session.flat_y0.dtype))
        part = inner.gauge_part(session.x, v)
        return flat if part is None else flat - session.numbers(part)

    return project


def _batches_agree(session: Session) -> None:
    """One compilation: jit(vmap(derivative of hypergradient along w)) over (x, w1), (x, w2), (x', w1)."""
    problem, start, dtype = session.problem, session.y, session.flat_x.dtype
    m = session.flat_x.size
    w1, w2 = session.directions(m, 2)
    rtol = 1e-4 if session.single else 1e-9
    beside = session.flat_x + jnp.asarray(1e-2 * session.x_scale(w2) * w2, dtype)

    def gradient_of(flat):
        found = bilevel.hypergradient(
            problem, session.unravel_x(flat), start, rtol=rtol, atol=session.atol, solver=stay, throw=False
        )
        return trees.ravel(found.gradient)[0], found.value

    def along(flat, w):
        (gradient, value), (turned, slope) = jax.jvp(gradient_of, (flat,), (w,))
        return gradient, value, turned, slope

    points = jnp.stack([session.flat_x, session.flat_x, beside])
    ways = jnp.asarray(np.stack([w1, w2, w1]), dtype)
    gradients, values, turned, slopes = (np.asarray(a, np.float64) for a in jax.jit(jax.vmap(along))(points, ways))
    tolerance = 1e-2 if session.single else 1e-6
    for k in (0, 2):
        plain = session.hypergradient(session.unravel_x(points[k]), start, rtol=rtol, throw=False)
        want = session.numbers(plain.gradient)
        scale = float(np.linalg.norm(want)) + session.atol + 3 * float(np.nan_to_num(plain.error, posinf=0.0))
        gap = np.abs(gradients[k] - want)
        gap = np.where(np.isfinite(gap), gap, np.inf)
        if np.max(gap) > tolerance * scale:
            i = int(np.argmax(gap))
            session.fail(
                f"jit(vmap(hypergradient)) differs from a loop of plain calls: in {name_of(session.x, 'x', i)} it is "
                f"{gradients[k][i]:.10g}, the plain call gives {want[i]:.10g}."
            )
        value = float(plain.value)
        if not abs(values[k] - value) <= tolerance * (abs(value) + session.atol):
            session.fail(f"jit(vmap(hypergradient)).value is {values[k]:.10g}, the plain call gives {value:.10g}.")
        along_w = float(want @ np.asarray(ways[k], np.float64))
        if not abs(slopes[k] - along_w) <= 10 * tolerance * scale:
            session.fail(
                f"the derivative of hypergradient(…).value along a random direction of x is {slopes[k]:.10g}, its own "
                f"gradient says {along_w:.10g}."
            )
    left, right = float(w2 @ turned[0]), float(w1 @ turned[1])
    scale = float(np.linalg.norm(turned[0])) + float(np.linalg.norm(turned[1])) + session.atol
    if not abs(left - right) <= 100 * tolerance * scale:
        session.fail(
            f"the Hessian of h is not symmetric: <w2, H w1> = {left:.10g} but <w1, H w2> = {right:.10g}.",
            ["the objective is not twice differentiable here, or a hand-written derivative rule is wrong"],
        )

    def plain_gradient(t):
        x = session.move_x(w1, t)
        found = session.hypergradient(x, start, rtol=rtol, throw=False)
        return session.numbers(found.gradient) if bool(found.converged) or session.single else np.full(m, np.nan)

    slope = difference(plain_gradient, target=1e-6 * scale, scale=session.x_scale(w1), eps=max(session.eps, 1e-13))
    gap = np.abs(turned[0] - slope.value)
    gap = np.where(np.isfinite(gap), gap, np.inf) if np.isfinite(slope.error) else np.zeros_like(gap)
    if not slope.kink and np.max(gap) > 100 * tolerance * scale + 3 * slope.error:
        i = int(np.argmax(gap))
        session.fail(
            f"the Hessian of h differs from differences of hypergradients: in {name_of(session.x, 'x', i)}, along a "
            f"random direction, it is {turned[0][i]:.10g}, differences give {slope.value[i]:.10g} (error of the "
            f"differences {slope.error:.1e}, {slope.tried}).",
            ["the objective is not twice differentiable here, or a hand-written derivative rule is wrong"],
        )
