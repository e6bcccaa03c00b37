"""Balanced and unbalanced transport: values, couplings and all gradients against a solver and differences made here."""

import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from problems import transport
from problems.transport import EntropicOT, UnbalancedOT
from tests.problems._transport import derivative, kl, reference

RNG = np.random.default_rng(11)
N, M, EPSILON = 5, 4, 0.15
C0, C1 = RNG.uniform(size=(N, M)), RNG.uniform(size=(N, M))
A, B = RNG.uniform(0.5, 1.5, size=N), RNG.uniform(0.5, 1.5, size=M)
A, B = A / A.sum(), B / B.sum()
W = RNG.normal(size=(N, M))
X = 0.7
TAUS = {"balanced": (np.inf, np.inf), "both": (0.4, 1.5), "first kept": (np.inf, 0.5), "second kept": (0.8, np.inf)}


class Affine(eqx.Module):
    """x -> C0 + x C1."""

    fixed: jax.Array
    slope: jax.Array

    def __call__(self, x):
        return self.fixed + x * self.slope


def build(p):
    """The problem at parameters p: costs, weights, epsilon and the finite tau are leaves."""
    cost = Affine(p["C0"], p["C1"])
    if "tau" not in p:
        return EntropicOT(cost, p["a"], p["b"], p["epsilon"])
    return UnbalancedOT(cost, p["a"], p["b"], p["epsilon"], tuple(np.inf if t is None else t for t in p["tau"]))


def parameters(kind):
    p = {"C0": C0, "C1": C1, "a": A, "b": B if kind == "balanced" else 1.7 * B, "epsilon": EPSILON, "x": X}
    if kind != "balanced":
        p["tau"] = tuple(None if t == np.inf else t for t in TAUS[kind])
    return jax.tree.map(jnp.asarray, p)


def both_outer(p):
    """The value, and a function of the coupling, at the solution."""
    ot = build(p)
    y = bilevel.solve(ot, p["x"], ot.initial()).y
    return ot.value(p["x"], y), jnp.sum(W * ot.coupling(p["x"], y) ** 2)


def both_reference(p):
    p = jax.tree.map(np.asarray, p)
    taus = [np.inf if t is None else float(t) for t in p.get("tau", (None, None))]
    pi, value, *_ = reference(p["C0"] + p["x"] * p["C1"], p["a"], p["b"], float(p["epsilon"]), *taus)
    return value, np.sum(W * pi**2)


def direction(p, key, balanced):
    """A random direction in one parameter (for the weights of balanced problems: one that keeps the masses)."""
    d = jax.tree.map(jnp.zeros_like, p)
    size = jax.tree.map(lambda leaf: jnp.asarray(RNG.normal(size=jnp.shape(leaf))), p[key])
    if balanced and key in "ab":
        size = size - size.mean()
    if key in "ab":
        size = 0.3 * size * p[key].min()
    return d | {key: size}


@functools.cache
def gradients(kind):
    return jax.jit(jax.jacrev(both_outer))(parameters(kind))


@pytest.mark.parametrize("kind", TAUS)
def test_values_couplings_and_marginals(kind):
    p = parameters(kind)
    ot = build(p)
    solution = bilevel.solve(ot, p["x"], ot.initial())
    assert solution.converged
    pi, value, *_ = reference(C0 + X * C1, p["a"], p["b"], EPSILON, *TAUS[kind])
    y = solution.y
    np.testing.assert_allclose(ot.coupling(X, y), pi, rtol=1e-9)
    np.testing.assert_allclose(ot.value(X, y), value, rtol=1e-10)  # primal = dual
    rows, columns = ot.marginals(X, y)
    np.testing.assert_allclose(rows, pi.sum(1), rtol=1e-9)
    np.testing.assert_allclose(columns, pi.sum(0), rtol=1e-9)
    V = RNG.normal(size=(M, 2))
    np.testing.assert_allclose(ot.apply(X, y, V), pi @ V, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(ot.apply(X, y, V[:, 0]), pi @ V[:, 0], rtol=1e-8, atol=1e-12)
    # the conditions (2.3) of the marginals, and the value identity
    f, g = y
    t1, t2 = TAUS[kind]
    a, b = np.asarray(p["a"]), np.asarray(p["b"])
    np.testing.assert_allclose(rows, a * np.exp(-f / t1), rtol=1e-9)
    np.testing.assert_allclose(columns, b * np.exp(-g / t2), rtol=1e-9)
    if kind == "both":
        mass = pi.sum()
        identity = EPSILON * a.sum() * b.sum() + t1 * a.sum() + t2 * b.sum() - (EPSILON + t1 + t2) * mass
        np.testing.assert_allclose(value, identity, rtol=1e-10)


@pytest.mark.parametrize("kind", TAUS)
@pytest.mark.parametrize("key", ["C0", "x", "a", "b", "epsilon", "tau"])
def test_gradients_of_value_and_coupling_in_everything(kind, key):
    p = parameters(kind)
    if key not in p:
        pytest.skip("no such parameter")
    d = direction(p, key, kind == "balanced")
    if key == "tau":
        d["tau"] = tuple(None if t is None else 0.1 * u for t, u in zip(p["tau"], d["tau"], strict=True))
    moved = lambda s: both_reference(jax.tree.map(lambda u, v: np.asarray(u) + s * np.asarray(v), p, d))
    expected = derivative(lambda s: np.array(moved(s)), 0.005)
    for k in range(2):
        pairing = sum(
            float(jnp.vdot(u, v)) for u, v in zip(jax.tree.leaves(gradients(kind)[k]), jax.tree.leaves(d), strict=True)
        )
        np.testing.assert_allclose(pairing, expected[k], rtol=1e-8, atol=1e-9)


def test_derivatives_of_the_value_are_the_envelopes():
    p = parameters("both")
    ot = build(p)
    pi = np.asarray(ot.coupling(X, bilevel.solve(ot, p["x"], ot.initial()).y))
    g, _ = gradients("both")
    t1, t2 = TAUS["both"]
    a, b = A, 1.7 * B
    np.testing.assert_allclose(g["C0"], pi, rtol=1e-8)
    np.testing.assert_allclose(g["epsilon"], kl(pi, np.outer(a, b)), rtol=1e-8)
    np.testing.assert_allclose(g["tau"], [kl(pi.sum(1), a), kl(pi.sum(0), b)], rtol=1e-8)
    f = -t1 * np.log(pi.sum(1) / a)
    np.testing.assert_allclose(g["a"], -t1 * np.expm1(-f / t1) - EPSILON * (np.exp(-f / t1) - b.sum()), rtol=1e-8)
