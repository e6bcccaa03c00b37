"""Outer methods on flat NumPy vectors: SciPy's L-BFGS-B and Newton-CG, optax, proximal gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ._oracle import Evaluation, Oracle


class Setting(NamedTuple):
    """What every outer method gets besides the oracle."""

    lower: np.ndarray
    upper: np.ndarray
    prox: Callable[[np.ndarray, float], np.ndarray] | None
    penalty: Callable[[np.ndarray], float] | None
    tol: float
    max_steps: int
    ftol: float = 0.0

    def project(self, x: np.ndarray) -> np.ndarray:
        return np.clip(x, self.lower, self.upper)

    def projected(self, found: Evaluation) -> np.ndarray:
        """The projected gradient (with a prox: the prox residual at step one)."""
        if self.prox is None:  # not x - project(x - gradient): beside a large x a gradient is round-off
            return np.clip(found.gradient, found.x - self.upper, found.x - self.lower)
        return found.x - self.prox(found.x - found.gradient, 1.0)

    def optimality(self, found: Evaluation) -> float:
        """The largest entry of the projected gradient."""
        return largest(self.projected(found))


class Ending(NamedTuple):
    """Why a method ended, for where neither the accuracy nor max_steps was reached: its part that did (`cause`) and its
    last word. `round_off`: where gradients are no better than their errors, that is the cause."""

    cause: str
    said: str
    round_off: bool = True


LINE_SEARCH, TRUST_REGION = "the line search", "the trust region"
DONE = Ending("on_step", "stopped")


def largest(v: np.ndarray) -> float:
    """The largest absolute entry, 0 if there is none."""
    return float(np.max(np.abs(v), initial=0.0))


def lbfgsb(oracle: Oracle, setting: Setting, on_step: Callable[[Evaluation], bool]) -> Ending:
    """SciPy's L-BFGS-B. `on_step` is told each accepted point and says whether to go on."""
    import scipy.optimize as so

    start = oracle(setting.project(oracle.x0))
    recent, accepted, lowest = [start], [start], [start.value]

    def function(x):
        found = oracle(x)
        kink = any(kink_between(other, found, setting, oracle.scale) for other in recent)
        recent[:] = [*recent[-_RECENT:], found]
        lowest.append(min(lowest[-1], found.value))
        if kink:
            raise _Ended(Ending(LINE_SEARCH, "a minimum at a kink, where the gradient jumps"))
        if len(lowest) > _WINDOW and lowest[-1 - _WINDOW] - lowest[-1] < setting.ftol * abs(lowest[-1]):
            raise _Ended(Ending("ftol", f"{_WINDOW} evaluations lowered the value by less than ftol", False))
        return found.value, found.gradient

    def callback(intermediate_result):
        accepted[0] = oracle(intermediate_result.x)
        if not on_step(accepted[0]):
            raise StopIteration

    if not on_step(start):
        return DONE
    bounds = so.Bounds(setting.lower, setting.upper)  # pyright: ignore[reportArgumentType]
    options = {"maxiter": setting.max_steps, "maxfun": 20 * setting.max_steps, "ftol": 0.0, "gtol": 0.0, "maxcor": 20}
    try:
        out = so.minimize(
            function, start.x, jac=True, method="L-BFGS-B", bounds=bounds, callback=callback, options=options
        )
    except _Ended as why:
        best = min(recent, key=lambda e: e.value)
        if best.value < accepted[0].value:
            on_step(best)
        return why.ending
    return Ending(LINE_SEARCH, str(out.message))


class _Ended(Exception):
    """A line search is not worth going on with."""

    def __init__(self, ending: Ending):
        super().__init__(ending.said)
        self.ending = ending


_WINDOW = 8  # evaluations, in line searches too, that `ftol` looks back on
_RECENT = 10  # evaluations that a new one is compared with
_CLOSE = 1e-7  # relative distance of two points that only a kink explains a change of the gradient between


def kink_between(one: Evaluation, other: Evaluation, setting: Setting, scale: float) -> bool:
    """Whether h has a minimum at a kink between two points next to each other: it falls steeply towards the gap from
    both sides, and some average of the two gradients vanishes to the tolerance (a subgradient between them). L-BFGS-B
    would close in on it to the last bit, over and over. The lower point is off by less than its slope times the gap.
    """
    gap = other.x - one.x
    size = largest(gap)
    if not 0 < size <= max(_CLOSE, 0.1 * setting.tol) * max(1.0, float(np.max(np.abs(one.x)))):
        return False
    first, second = (_free(found, setting) for found in (one, other))
    falls = first @ gap < -1e-3 * scale * size and second @ gap > 1e-3 * scale * size
    turn = second - first
    share = float(np.clip(second @ turn / max(float(turn @ turn), np.finfo(float).tiny), 0, 1))
    rest = share * first + (1 - share) * second  # the shortest average
    return bool(falls and np.max(np.abs(rest)) <= max(setting.tol * scale, 1e-12))


def _free(found: Evaluation, setting: Setting) -> np.ndarray:
    """The gradient without the entries that a bound holds."""
    held = ((found.x <= setting.lower) & (found.gradient > 0)) | ((found.x >= setting.upper) & (found.gradient < 0))
    return np.where(held, 0.0, found.gradient)


def newton_cg(
    oracle: Oracle, setting: Setting, on_step, product: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> Ending:
    """SciPy's truncated Newton method in a trust region, with products of the Hessian of h."""
    import scipy.optimize as so

    def function(x):
        found = oracle(x)
        return found.value, found.gradient

    def callback(intermediate_result):
        found = oracle(intermediate_result.x)
        if not np.array_equal(found.x, last[0]):  # a refused trial is no step
            last[0] = found.x
            if not on_step(found):
                raise StopIteration

    start = oracle(oracle.x0)
    last = [start.x]
    if not on_step(start):
        return DONE
    options = {"maxiter": 5 * setting.max_steps, "gtol": 0.0}
    out = so.minimize(
        function, oracle.x0, jac=True, hessp=product, method="trust-ncg", callback=callback, options=options
    )
    return Ending(TRUST_REGION, str(out.message))


def optax_steps(optimizer: Any, oracle: Oracle, setting: Setting, on_step, value_fn: Callable) -> Ending:
    """Any optax optimizer, its iterates projected on the bounds."""
    import optax

    unravel, dtype = oracle.unravel_x, oracle.dtype
    x = unravel(jnp.asarray(setting.project(oracle.x0), dtype))
    extra = isinstance(optimizer, optax.GradientTransformationExtraArgs)

    @jax.jit
    def update(gradient, state, x, value):
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
            more = {"value": value, "grad": gradient, "value_fn": value_fn} if extra else {}
            change, state = optimizer.update(gradient, state, x, **more)
            return optax.apply_updates(x, change), state

    state = optimizer.init(x)
    for _ in range(setting.max_steps + 1):
        found = oracle(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(x)]))
        if not on_step(found):
            return DONE
        gradient = unravel(jnp.asarray(found.gradient, dtype))
        x, state = update(gradient, state, x, jnp.asarray(found.value, dtype))
        flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(x)])
        x = unravel(jnp.asarray(setting.project(flat), dtype))
    return DONE


def proximal_gradient(oracle: Oracle, setting: Setting, on_step) -> Ending:
    """x <- prox(x - t g, t) with Barzilai-Borwein steps and a nonmonotone line search (SpaRSA, Wright et al. 2009)."""
    prox, penalty = setting.prox, setting.penalty
    assert prox is not None
    total = lambda e: e.value + (penalty(e.x) if penalty is not None else 0.0)
    found = oracle(prox(oracle.x0, 0.0) if penalty is None else oracle.x0)
    recent = [total(found)]
    t = 1.0 / max(1.0, float(np.linalg.norm(found.gradient)))
    if not on_step(found):
        return DONE
    for _ in range(setting.max_steps):
        for _ in range(40):
            new = oracle(prox(found.x - t * found.gradient, t))
            move = new.x - found.x
            size = float(move @ move)
            model = found.value + float(found.gradient @ move) + size / (2 * t)
            smooth = new.value <= model + 1e-12 * abs(found.value)
            if size == 0 or (smooth and total(new) <= max(recent) - 1e-4 * size / (2 * t) + 1e-14 * abs(recent[-1])):
                break
            t *= 0.4
        else:
            return Ending(LINE_SEARCH, "the line search found no decrease")
        bend = float(move @ (new.gradient - found.gradient))
        t = min(max(size / bend, 1e-10), 1e10) if bend > 0 else 2 * t
        found = new
        recent = [*recent[-4:], total(found)]
        if not on_step(found):
            return DONE
    return DONE
