"""The fifteen potentials of the JKOnet* study (Terpin et al. 2024), as its released code has them."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np


def _halves(v):
    d = len(v) // 2
    return jnp.mean(v[:d]), jnp.mean(v[d:])


def _double_exp(v):
    return 200 * (jnp.exp(-jnp.sum((v - 3) ** 2) / 20) + jnp.exp(-jnp.sum((v + 3) ** 2) / 20))


def _rotational(v):
    p, q = _halves(v)
    return -500 * jnp.maximum(jnp.arctan2(q + 5, p + 5) + np.pi, 0)


def _watershed(v):
    return jnp.sum(v[:-1] + v[:-1] ** 2 * (v[1:] + 4)) / 10


def _ishigami(v):
    p, q = _halves(v)
    return jnp.sin(p) + 7 * jnp.sin(q) ** 2 + 0.1 * ((p + q) / 2) ** 4 * jnp.sin(p)


def _friedman(v):
    p, q = _halves(v)
    P, R = 2 * (p - 7), q - 7
    terms = 10 * jnp.sin(np.pi * P * R) + 20 * (P * jnp.sin(R) - 0.5) ** 2 + 10 * (P * jnp.cos(R) - 1) ** 2
    return (terms + 0.1 * R * jnp.sin(P)) / 100


def _bohachevsky(v):
    p, q = _halves(v)
    return 10 * (p**2 + 2 * q**2 - 0.3 * jnp.cos(3 * np.pi * p) - 0.4 * jnp.cos(4 * np.pi * q))


def _holder_table(v):
    p, q = _halves(v)
    length = jnp.sqrt(jnp.sum(v * v) + 1e-30)
    return 10 * jnp.abs(jnp.sin(p) * jnp.cos(q) * jnp.exp(jnp.abs(1 - length / np.pi)))


def _zigzag_ridge(v):
    a, b = v[:-1], v[1:]
    return jnp.sum((a - b) ** 2 + jnp.cos(a) * (a + b) + a**2 * b)


def _flowers(v):
    return jnp.sum(v + 2 * jnp.sin((v * v + 1e-30) ** 0.6))


POTENTIALS: dict[str, Callable] = {
    "double_exp": _double_exp,
    "rotational": _rotational,
    "relu": lambda v: -50 * jnp.sum(jnp.maximum(v, 0)),
    "flat": lambda v: 0 * jnp.sum(v),
    "wavy_plateau": lambda v: jnp.sum(jnp.cos(np.pi * v) + v**4 / 2 - 3 * v**2 + 1),
    "watershed": _watershed,
    "ishigami": _ishigami,
    "friedman": _friedman,
    "bohachevsky": _bohachevsky,
    "holder_table": _holder_table,
    "zigzag_ridge": _zigzag_ridge,
    "oakley_ohagan": lambda v: 5 * jnp.sum(jnp.sin(v) + jnp.cos(v) + v**2 + v),
    "sphere": lambda v: -10 * jnp.sum(v * v),
    "styblinski_tang": lambda v: 0.5 * jnp.sum(v**4 - 16 * v**2 + 5 * v),
    "flowers": _flowers,
}
"""Each maps one point of shape (d,), d >= 2, to a number."""
