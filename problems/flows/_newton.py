"""Newton's method for the loss of all steps, with a penalty or without.

Each step's Hessian comes with the derivative of its potential in theta, so that the next inner solve starts close.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax import lax
from jaxtyping import Array, Float

import bilevel

from . import _potentials as potentials
from ._penalties import L1
from ._snapshots import CLOSED, LIMIT, Steps


class Point(NamedTuple):
    """The loss, its gradient and the inner potentials at one theta; `columns`: of `new_weights`, for each step;
    `error`: about what is wrong in the gradient."""

    theta: np.ndarray
    y: Any
    columns: tuple
    value: float
    gradient: np.ndarray
    error: float
    sweeps: int


# ------------------------------------------------------------------------------------------------ one step


class Piece(eqx.Module):
    """One step as arrays: steps of the same shapes share a compiled program."""

    kernel: Any
    design: Array
    offset: Array | None
    tau: Array
    b: Array
    constant: Array
    balanced: Array
    mode: str = eqx.field(static=True)

    def work(self, theta):
        w = self.tau * (self.design @ theta)
        return w if self.offset is None else w + self.offset


def _piece(steps: Steps, t: int) -> Piece:
    assert steps.designs is not None
    offset = None if steps.offsets is None else steps.offsets[t]
    tau, b, balanced = steps.step_sizes[t], steps.weights[t], steps.balanced[t]
    return Piece(steps.kernel(t), steps.designs[t], offset, tau, b, steps.values[t], balanced, steps.mode)


def _value(piece: Piece, theta, y, tol) -> tuple:
    """For one step: potential, how many steps it took, loss, gradient, what round-off or tol leave wrong in that, and
    what `_curvature` wants to know of this point."""
    if piece.mode == LIMIT:
        return _least_squares(piece, theta)
    w = _work(piece, theta)
    if piece.mode == CLOSED:
        f, size, count = potentials.explicit(piece.kernel, w), jnp.zeros((), w.dtype), 1
    else:  # compiled apart, and shared with the balanced potentials
        f, size, count = potentials.find(piece.kernel, w, y, tol * piece.kernel.epsilon / piece.tau)
    return f, count, *_loss(piece, w, f, size)


@eqx.filter_jit
def _work(piece: Piece, theta):
    return piece.work(theta)


@eqx.filter_jit
def _least_squares(piece: Piece, theta) -> tuple:
    h, b = piece.balanced + piece.work(theta), piece.b
    mean = jnp.vdot(b, h)
    slope = piece.tau * ((b * (h - mean)) @ (piece.design - b @ piece.design))
    return mean, 0, 0.5 * jnp.vdot(b, jnp.square(h - mean)), slope, 0 * mean, None


@eqx.filter_jit
def _loss(piece: Piece, w, f, size) -> tuple:
    tau, b = piece.tau, piece.b
    centred = piece.design - b @ piece.design
    p, dual, columns = potentials.new_weights(piece.kernel, w, f)
    spread = jnp.sqrt(jnp.max(b @ centred**2))
    slope = tau * ((b - p / jnp.sum(p)) @ centred)
    return jnp.vdot(b, w) + piece.constant - dual, slope, size * tau * spread / piece.kernel.epsilon, columns


@eqx.filter_jit
def _curvature(piece: Piece, theta, y, columns, rtol, guess) -> tuple:
    """Hessian and the derivative of the potential, for one step."""
    tau, design, b = piece.tau, piece.design, piece.b
    if piece.mode == LIMIT:
        centred = jnp.sqrt(b)[:, None] * (design - b @ design)
        H = tau**2 * (centred.T @ centred)
        return (H + H.T) / 2, tau * (b @ design)
    closed = piece.mode == CLOSED
    return potentials.curvature(piece.kernel, piece.work(theta), y, columns, tau * design, rtol, guess, closed)


def gram(steps: Steps) -> np.ndarray:
    """The features' covariances under the snapshots, summed: singular where the data cannot tell features apart."""
    total = 0.0
    for design, b in zip(steps.designs or (), steps.weights, strict=True):
        design, b = np.asarray(design, np.float64), np.asarray(b, np.float64)
        centred = np.sqrt(b)[:, None] * (design - b @ design)
        total = total + centred.T @ centred
    return np.asarray(total)


def _parts(steps: Steps, y: Any) -> list:
    return [y[t] for t in range(steps.count)]


def _joined(steps: Steps, parts: list) -> Any:
    return jnp.stack(parts) if steps.mode == LIMIT else tuple(parts)


def evaluate(steps: Steps, theta: np.ndarray, y: Any, tol: float) -> Point:
    """The loss at theta, its potentials found from y on, its gradient right to about tol where round-off allows."""
    at, dtype = jnp.asarray(theta, steps.epsilon.dtype), steps.epsilon.dtype
    found, sums, value, gradient, error, sweeps = [], [], 0.0, 0.0, 0.0, 0
    for t, part in enumerate(_parts(steps, y)):
        f, count, loss, slope, wrong, columns = _value(_piece(steps, t), at, part, jnp.asarray(tol, dtype))
        found.append(f)
        sums.append(columns)
        value, gradient = value + float(loss), gradient + np.asarray(slope, np.float64)
        error, sweeps = error + float(wrong), sweeps + int(count)
    eps = float(jnp.finfo(dtype).eps)
    error += eps * float(np.linalg.norm(gradient))
    there, y = np.asarray(theta, np.float64), _joined(steps, found)
    return Point(there, y, tuple(sums), value, np.asarray(gradient), error, sweeps)


def hessian(steps: Steps, theta: Array) -> Float[Array, "K K"]:
    """The Hessian at theta, to round-off."""
    return _second(steps, evaluate(steps, np.asarray(theta), steps.initial(), 0.0), 1e-12)[0]


def _second(steps: Steps, point: Point, rtol: float, guess: list | None = None) -> tuple:
    """The Hessian, and the derivatives of the potentials; `guess`: those of a point nearby."""
    rtol = max(rtol, 4 * float(jnp.finfo(steps.epsilon.dtype).eps))
    at = jnp.asarray(point.theta, steps.epsilon.dtype)
    parts = [
        _curvature(
            _piece(steps, t), at, part, point.columns[t], jnp.asarray(rtol, at.dtype),
            jnp.zeros((len(steps.sources[t]), len(at)), at.dtype) if guess is None else guess[t],
        )
        for t, part in enumerate(_parts(steps, point.y))
    ]  # fmt: skip
    return sum(part[0] for part in parts), [part[1] for part in parts]


# ------------------------------------------------------------------------------------------------ all steps


def minimize(owner: str, steps: Steps, penalty: Any, theta: Array, tol: float, max_steps: int) -> bilevel.Result:
    """Newton's steps, the line search on the loss or, where round-off hides its fall, on the optimality residual."""
    if not float(tol) > 0:
        raise ValueError(f"{owner}: `tol` must be positive, found {tol!r}.")
    if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 0:
        raise ValueError(f"{owner}: `max_steps` must be an integer of at least 0, found {max_steps!r}.")
    dtype = steps.epsilon.dtype
    if penalty is None:
        check_identified(owner, gram(steps), float(jnp.finfo(dtype).eps))
    value_of = lambda p: p.value + (0.0 if penalty is None else float(penalty.value(jnp.asarray(p.theta, dtype))))
    size_of = lambda p: _optimality(p, penalty, dtype)
    here = evaluate(steps, np.asarray(theta), steps.initial(), 1e-2 * tol)
    history, evaluations, stuck, slopes = [_state(0, here, value_of(here), dtype)], here.sweeps, False, None
    while size_of(here) > tol and len(history) <= max_steps and not stuck:
        matrix, slopes = _second(steps, here, 1e-5, slopes)
        H = np.asarray(matrix, np.float64)
        goal = _newton_point(H, here.gradient, penalty) if penalty is None else _proximal_point(here, H, penalty)
        move = goal - (0.0 if penalty is None else here.theta)
        decrease = here.gradient @ move
        if penalty is not None:
            decrease += float(penalty.value(jnp.asarray(goal, dtype))) - (value_of(here) - here.value)
        t, old, new = 1.0, value_of(here), None
        while t > 1e-9:
            start = [f + t * (s @ jnp.asarray(move, dtype)) for f, s in zip(_parts(steps, here.y), slopes, strict=True)]
            new = evaluate(steps, here.theta + t * move, _joined(steps, start), 1e-2 * tol)
            evaluations += new.sweeps
            better = value_of(new) <= old + 1e-4 * t * decrease
            if np.isfinite(new.value) and (better or size_of(new) < 0.9 * size_of(here)):
                break
            t, new = t / 2, None
        stuck = new is None
        if new is not None:
            here = new
            history.append(_state(len(history), here, value_of(here), dtype))
    return _result(here, history, size_of(here), tol, max_steps, evaluations, steps)


def _newton_point(H: np.ndarray, gradient: np.ndarray, penalty: Any) -> np.ndarray:
    """-H^-1 gradient, in the scale in which H has a unit diagonal; a little damped where H is not definite."""
    scale = 1 / np.sqrt(np.maximum(np.diag(H), np.finfo(float).tiny))
    scaled = H * scale[:, None] * scale[None, :]
    for damping in (0.0, 1e-12, 1e-9, 1e-6, 1e-3, 1.0):
        try:
            factor = scipy.linalg.cho_factor(scaled + damping * np.eye(len(H)))
        except scipy.linalg.LinAlgError:
            continue
        return -scale * scipy.linalg.cho_solve(factor, scale * gradient)
    return -gradient * scale**2


def _proximal_point(here: Point, H: np.ndarray, penalty: Any) -> np.ndarray:
    """The minimizer of the quadratic model plus the penalty: accelerated proximal gradients, then, for l1, Newton on
    the support they find."""
    model = jnp.asarray(H), jnp.asarray(here.gradient), jnp.asarray(here.theta)
    z = np.asarray(_fista(*model, penalty), np.float64)
    if not isinstance(penalty, L1):
        return z
    weight = np.broadcast_to(np.asarray(penalty.weight, np.float64), z.shape)
    support = (z != 0) | (weight == 0)
    if support.any():
        S = np.flatnonzero(support)
        rhs = H[S] @ here.theta - here.gradient[S] - weight[S] * np.sign(z[S])
        polished = np.zeros_like(z)
        polished[S] = np.linalg.lstsq(H[np.ix_(S, S)], rhs, rcond=None)[0]
        if np.all(np.sign(polished[S]) * np.sign(z[S]) >= 0):
            return polished
    return z


@eqx.filter_jit
def _fista(H, gradient, theta, penalty):
    step = 1 / jnp.linalg.eigvalsh(H)[-1]
    forward = lambda v: penalty.prox(v - step * (gradient + H @ (v - theta)), step)

    def unfinished(carry):
        z, last, _, count = carry
        size = jnp.max(jnp.abs(z - last))
        return (count < 20000) & ((size > 1e-14 * (1 + jnp.max(jnp.abs(z)))) | (count < 2))

    def body(carry):
        z, last, momentum, count = carry
        larger = (1 + jnp.sqrt(1 + 4 * momentum**2)) / 2
        ahead = z + (momentum - 1) / larger * (z - last)
        new = forward(ahead)
        restart = jnp.vdot(ahead - new, new - z) > 0
        return new, z, jnp.where(restart, 1.0, larger).astype(z.dtype), count + 1

    return lax.while_loop(unfinished, body, (theta, theta, jnp.ones((), theta.dtype), 0))[0]


def _optimality(point: Point, penalty: Any, dtype: Any) -> float:
    if penalty is None:
        return float(np.abs(point.gradient).max())
    moved = np.asarray(penalty.prox(jnp.asarray(point.theta - point.gradient, dtype), 1.0), np.float64)
    return float(np.abs(point.theta - moved).max())


def check_identified(owner: str, H: np.ndarray, eps: float) -> None:
    """Raises ValueError where a Hessian or Gram matrix is numerically singular, with the flat direction of theta."""
    size = np.sqrt(np.maximum(np.diag(H), 0))
    dead = size <= 1e3 * eps * size.max() if size.max() > 0 else np.ones(len(size), bool)
    if dead.any():
        k = int(np.argmax(dead))
        raise ValueError(
            f"{owner}: the features are not identified by the data: number {k} is constant on the snapshots, so that "
            f"the flat direction is theta = e_{k}. Leave it out, or give a `penalty`."
        )
    values, vectors = np.linalg.eigh(H / size[:, None] / size[None, :])
    if values[0] <= 100 * len(H) * eps * values[-1]:
        flat = vectors[:, 0] / size
        flat = flat / flat[np.argmax(np.abs(flat))]
        order = [k for k in np.argsort(-np.abs(flat)) if abs(flat[k]) > 1e-6][:8]
        words = " ".join(f"{flat[k]:+.3g} e_{k}" for k in order)
        raise ValueError(
            f"{owner}: the features are not identified by the data, they are collinear on the snapshots: the loss does "
            f"not change along the flat direction theta = {words}. Leave one out, or give a `penalty`."
        )


def _state(step: int, point: Point, value: float, dtype: Any) -> bilevel.State:
    theta, gradient = jnp.asarray(point.theta, dtype), jnp.asarray(point.gradient, dtype)
    return bilevel.State(step, theta, point.y, value, gradient, point.error)


def _result(here, history, size, tol, max_steps, evaluations, steps) -> bilevel.Result:
    state, done = history[-1], size <= tol and not here.error > 10 * tol
    taken = len(history) - 1
    if done:
        message = f"the optimality residual fell to {size:.2e}, below {tol:.2e}"
    elif taken >= max_steps:
        message = f"max_steps = {max_steps} reached with an optimality residual of {size:.2e} (wanted {tol:.2e})"
    else:
        message = (
            f"the round-off floor ended it with an optimality residual of {size:.2e} (wanted {tol:.2e}) and a gradient "
            f"error of about {here.error:.1e}"
        )
    return bilevel.Result(
        state.x, state.y, state.value, state.gradient, state.error, history, bool(done), message, taken, len(history),
        evaluations, taken * len(here.theta) * steps.count,
    )  # fmt: skip
