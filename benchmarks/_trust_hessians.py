"""Hard cases: Hessians that are ill-conditioned, indefinite or singular."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

import bilevel

from ._trust_case import Case, case, minimizers


def _diagonal(exponent: int, dtype) -> Case:
    """y* = x / d, h = |y* - 1|^2 / 2, so grad h = (y* - 1) / d in closed form."""
    d = 10.0 ** (-np.linspace(0, exponent, 6))
    x = np.cos(np.arange(6.0)) + 1.5
    truth = (x / d - 1) / d
    diagonal, point, y0 = jnp.asarray(d, dtype), jnp.asarray(x, dtype), jnp.zeros(6, dtype)
    f = lambda x, y: 0.5 * jnp.sum(diagonal * y**2) - jnp.sum(x * y)
    g = lambda x, y: 0.5 * jnp.sum((y - 1) ** 2)
    rtol = 1e-6 if dtype == np.float64 else 1e-3
    ours = lambda: bilevel.hypergradient(bilevel.BilevelProblem(f, g), point, y0, rtol=rtol).gradient
    refusals = ("round_off", "singular", "max_steps", "estimate_untrusted", "correction_rejected", "non_finite")
    hard = exponent > (7 if dtype == np.float64 else 4)  # there a refusal is an answer too
    may = ("right", *refusals) if hard else ("right",)
    return Case(truth, ours, may, rtol, minimizers(f, g, point, y0))


for _exponent in (1, 4, 7, 10):
    for _dtype in (np.float64, np.float32):
        case(f"diagonal Hessian, cond 1e{_exponent}, {_dtype.__name__}")(
            lambda e=_exponent, t=_dtype: _diagonal(e, t)  # type: ignore[misc]
        )


def _flat(last: float, gauge=None, depends: bool = False) -> Case:
    """Hessian diag(1, 2, 3, last); the fourth direction does not enter x."""
    d = jnp.asarray([1.0, 2.0, 3.0, last])
    x = jnp.asarray([0.4, -0.3, 0.9])
    f = lambda x, y: 0.5 * jnp.sum(d * y**2) - jnp.sum(x * y[:3])
    g = lambda x, y: 0.5 * jnp.sum((y[:3] - 1) ** 2) + (y[3] if depends else 0.0)
    truth = (np.asarray(x) / np.asarray(d[:3]) - 1) / np.asarray(d[:3])
    y0 = jnp.asarray([0.1, 0.2, 0.3, 0.4])
    inner = bilevel.Minimization(f, gauge=gauge)
    ours = lambda: bilevel.hypergradient(bilevel.BilevelProblem(inner, g), x, y0).gradient
    return Case(truth, ours, peers=minimizers(f, g, x, y0))


@case("indefinite Hessian")
def _indefinite():
    found = _flat(-1.0)
    return Case(np.nan, found.ours, ("not_a_minimum", "unbounded"), peers=found.peers)


@case("singular Hessian")
def _singular():
    found = _flat(0.0)
    return Case(np.nan, found.ours, ("singular",), peers=found.peers)


@case("singular Hessian, gauge declared")
def _gauge():
    return _flat(0.0, gauge=[jnp.asarray([0.0, 0.0, 0.0, 1.0])])


@case("gauge declared, outer function depends on it")
def _gauge_dependent():
    found = _flat(0.0, gauge=[jnp.asarray([0.0, 0.0, 0.0, 1.0])], depends=True)
    return Case(np.nan, found.ours, ("gauge_dependent",), peers=found.peers)
