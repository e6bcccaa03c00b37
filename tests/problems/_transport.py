"""Entropic transport solved here in NumPy, to round-off: what the tests of problems.transport compare with; an affine
cost, and the costs between two clouds of 40 points."""

import equinox as eqx
import jax
import numpy as np
from scipy.special import logsumexp, xlogy

CLOUD = np.random.default_rng(5).normal(size=(2, 40, 2))
SQUARES = np.sum((CLOUD[0][:, None] - CLOUD[1][None, :] - 1) ** 2, axis=-1)


class Affine(eqx.Module):
    """x -> C0 + x C1."""

    fixed: jax.Array
    slope: jax.Array

    def __call__(self, x):
        return self.fixed + x * self.slope


def kl(p, q):
    return float(np.sum(xlogy(p, p) - xlogy(p, np.where(q > 0, q, 1)) - p + q))


def reference(C, a, b, epsilon, tau_1=np.inf, tau_2=np.inf, sweeps=20000):
    """(pi, value of the primal, f, g) by log-domain sweeps with the best translation after each."""
    C, a, b = (np.asarray(v, float) for v in (C, a, b))
    eta_1, eta_2 = (1 / (1 + epsilon / t) for t in (tau_1, tau_2))
    with np.errstate(divide="ignore"):
        la, lb = np.log(a), np.log(b)
    g, last = np.zeros_like(b), np.inf
    balanced = tau_1 == tau_2 == np.inf
    for _ in range(sweeps):
        f = -eta_1 * epsilon * logsumexp(lb + (g - C) / epsilon, axis=1)
        new = -eta_2 * epsilon * logsumexp(la[:, None] + (f[:, None] - C) / epsilon, axis=0)
        if not balanced:
            left = np.sum(a * np.exp(-f / tau_1))
            right = np.sum(b * np.exp(-new / tau_2))
            weight = 1 / (1 / tau_1 + 1 / tau_2)
            shift = weight * np.log(left / right)
            new, f = new - shift, f + shift
        change = np.max(np.abs(new - g))
        g = new
        if change < 1e-15 or (change < 1e-12 and change >= last):
            break
        last = change
    f = -eta_1 * epsilon * logsumexp(lb + (g - C) / epsilon, axis=1)
    pi = np.exp(la[:, None] + lb + (f[:, None] + g - C) / epsilon)
    value = float(np.sum(np.where(pi > 0, pi * np.where(np.isfinite(C), C, 0), 0))) + epsilon * kl(pi, np.outer(a, b))
    for t, p, w in ((tau_1, pi.sum(1), a), (tau_2, pi.sum(0), b)):
        value += t * kl(p, w) if t < np.inf else 0.0
    return pi, value, f, g


def derivative(function, h=1e-3):
    """d/ds function(s) at 0: central differences, Richardson twice (error of sixth order)."""
    slopes = [(np.asarray(function(s)) - np.asarray(function(-s))) / (2 * s) for s in (h, h / 2, h / 4)]
    first = [(4 * slopes[k + 1] - slopes[k]) / 3 for k in range(2)]
    return (16 * first[1] - first[0]) / 15
