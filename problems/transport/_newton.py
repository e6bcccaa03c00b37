"""The loop of Newton's method on (theta, g): line search, round-off, and the report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

import bilevel
from bilevel.minimize import Result, State

from . import _joint as joint


def newton_joint(
    setting: joint.Setting, swap: bool, theta: Array, penalty: Any, tol: float, max_steps: int, constant: float,
    mass: float, refuse_flat: Callable,
) -> Result:  # fmt: skip
    """Minimizes the loss plus the penalty from theta; `constant`: the loss minus J, `mass`: of the observation,
    `refuse_flat(local)`: raises where theta is not identified."""
    extra = lambda at: 0.0 if penalty is None else float(penalty.value(at))
    g = jnp.zeros_like(setting.b)
    local = joint.local_at(setting, theta, g)
    history: list[State] = []
    message, converged, evaluations = "", False, 1
    eps = float(jnp.finfo(theta.dtype).eps)
    for step in range(max_steps + 1):
        if step == 0:  # what is flat is flat everywhere, and here the coupling is spread out
            refuse_flat(local)
        size = float(joint.optimality_at(local.reduced, theta, penalty))
        inner = float(jnp.sum(jnp.abs(local.rest)))
        error = float(joint.error_floor(setting, local))
        y = (g, local.f) if swap else (local.f, g)
        value = float(local.value) + constant + extra(theta)
        history.append(State(step, theta, y, value, local.reduced, error))
        settled = inner <= 200 * eps * mass
        if size <= tol and settled:
            converged, message = True, f"the gradient fell to {size:.2e}, below {tol:.2e}"
            break
        if step == max_steps:
            message = f"max_steps = {max_steps} reached with a gradient of {size:.2e} (wanted {tol:.2e})"
            break
        dtheta, dg = joint.step_at(local, theta, penalty)
        if not bool(jnp.all(jnp.isfinite(dtheta)) & jnp.all(jnp.isfinite(dg))):
            raise bilevel.NotConverged(
                f"InverseOT.newton: the coefficients run away (the largest is {float(jnp.max(jnp.abs(theta))):.3g} "
                f"after {step} steps): no coupling with these marginals has the features of the observed one; pass "
                f"the observation's own marginals, a finite `tau`, or a penalty."
            )
        total = float(local.value) + extra(theta)
        slope = float(jnp.vdot(local.gradient, dtheta) + jnp.vdot(local.rest, dg)) + extra(theta + dtheta)
        slope = min(slope - extra(theta), 0.0)
        t, accepted = 1.0, False
        new = joint.local_at(setting, theta + dtheta, g + dg)
        evaluations += 1
        for _ in range(40):
            if t < 1:
                trial = float(joint.value_at(setting, theta + t * dtheta, g + t * dg))
            else:
                trial = float(new.value)
            trial += extra(theta + t * dtheta)
            if trial <= total + 1e-4 * t * slope:
                accepted = True
                break
            if t == 1 and _improves(local, new, theta, dtheta, penalty):
                accepted = True
                break
            t *= 0.5
        if not accepted:
            converged = size <= tol
            message = f"round-off ended it with a gradient of {size:.2e} (wanted {tol:.2e})"
            break
        theta, g = theta + t * dtheta, g + t * dg
        local = new if t == 1 else joint.local_at(setting, theta, g)
        evaluations += t < 1
    last = history[-1]
    return Result(
        last.x, last.y, last.value, last.gradient, last.error, history, converged, message, last.step,
        evaluations, evaluations, 0,
    )  # fmt: skip


def _improves(local, new, theta, dtheta, penalty) -> bool:
    """At round-off of the values: whether the full step halves the residuals."""
    before = float(joint.optimality_at(local.reduced, theta, penalty)) + float(jnp.sum(jnp.abs(local.rest)))
    after = float(joint.optimality_at(new.reduced, theta + dtheta, penalty)) + float(jnp.sum(jnp.abs(new.rest)))
    return after <= 0.5 * before
