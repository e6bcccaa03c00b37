"""Hypergradients of small problems in fifty digits (mpmath), from formulas written by hand: no autodiff, no engine.

Each is  G_x - F_x' v,  F_y' v = G_y  at the y where F vanishes to all digits (theory, section 1, equation 1).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

DIGITS = 50


def quadratic(A, B, b, outer, x) -> np.ndarray:
    """F = (A + diag e^x) y - b - B x."""

    def at(mp, x):
        scale = [mp.exp(v) for v in x]
        H = _matrix(mp, A) + mp.diag(scale)
        y = mp.lu_solve(H, _matrix(mp, b) + _matrix(mp, B) * x)
        F_x = mp.diag([s * v for s, v in zip(scale, y, strict=True)]) - _matrix(mp, B)
        return y, H, F_x

    return _hypergradient(at, outer, x)


def glm(X, b, kind: int, outer, x) -> np.ndarray:
    """F = X' l'(X y) / N + e^x y / d."""

    def at(mp, x):
        data, target = _matrix(mp, X), _matrix(mp, b)
        count, d = data.rows, data.cols
        scale = mp.diag([mp.exp(v) / d for v in x])

        def F(y):
            slopes = [slope(mp, kind, z, t)[0] / count for z, t in zip(data * y, target, strict=True)]
            return data.T * mp.matrix(slopes) + scale * y

        def F_y(y):
            curvatures = [slope(mp, kind, z, t)[1] / count for z, t in zip(data * y, target, strict=True)]
            return data.T * mp.diag(curvatures) * data + scale

        y = _root(mp, F, F_y, mp.zeros(d, 1))
        return y, F_y(y), mp.diag([scale[j, j] * y[j] for j in range(d)])

    return _hypergradient(at, outer, x)


def slope(mp, kind: int, z, b):
    """l' and l'' of the logistic, Poisson and pseudo-Huber losses."""
    if kind == 0:
        probability = 1 / (1 + mp.exp(b * z))
        return -b * probability, b * b * probability * (1 - probability)
    if kind == 1:
        return mp.exp(z) - b, mp.exp(z)
    length = mp.sqrt(1 + (z - b) ** 2)
    return (z - b) / length, length**-3


def fixed_point(W, outer, x) -> np.ndarray:
    """F = y - tanh(W y + x)."""

    def at(mp, x):
        weights = _matrix(mp, W)
        image = lambda y: mp.matrix([mp.tanh(v) for v in weights * y + x])
        slopes = lambda y: mp.diag([1 - v * v for v in image(y)])
        F_y = lambda y: mp.eye(len(x)) - slopes(y) * weights
        y = _root(mp, lambda y: y - image(y), F_y, mp.zeros(len(x), 1))
        return y, F_y(y), -slopes(y)

    return _hypergradient(at, outer, x)


def lasso(A, B, b, outer, x) -> tuple[np.ndarray, float]:
    """0 in A y - b - B x + e^x * sign(y): `(hypergradient, margin)`. The signs are found by trying all of them; the
    margin says how far the solution is from another set of signs."""
    import mpmath as mp

    with mp.workdps(DIGITS):
        H, shift, x = _matrix(mp, A), _matrix(mp, b) + _matrix(mp, B) * _matrix(mp, x), _matrix(mp, x)
        n = len(x)
        weights = [mp.exp(v) for v in x]
        for signs in itertools.product((0, 1, -1), repeat=n):
            on = [j for j in range(n) if signs[j]]
            y = mp.zeros(n, 1)
            if on:
                part = mp.matrix([[H[i, j] for j in on] for i in on])
                right = mp.matrix([shift[j] - weights[j] * signs[j] for j in on])
                for j, value in zip(on, mp.lu_solve(part, right), strict=True):
                    y[j] = value
            slope = shift - H * y
            gaps = [y[j] * signs[j] if signs[j] else weights[j] - abs(slope[j]) for j in range(n)]
            if min(gaps) < 0:
                continue
            g_x, g_y = outer(mp, x, y)
            if on:
                v = mp.lu_solve(part.T, mp.matrix([g_y[j] for j in on]))
                for k, j in enumerate(on):
                    for i in range(n):  # - F_x' v on the support, F_x = diag(e^x sign) - B
                        g_x[i] += mp.mpf(float(np.asarray(B)[j, i])) * v[k]
                    g_x[j] -= weights[j] * signs[j] * v[k]
            return np.array([float(value) for value in g_x]), float(min(gaps))
    raise RuntimeError("bilevel.testing: the reference solution was not found")


def least_squares(C, c, d, rho) -> Callable:
    """G_x, G_y of G = |C y - c|^2 / 2 + <d * x, y> + rho |x|^2 / 2."""

    def gradients(mp, x, y):
        C_, c_, d_ = (_matrix(mp, a) for a in (C, c, d))
        r = mp.mpf(float(rho))
        g_x = mp.matrix([d_[i] * y[i] + r * x[i] for i in range(len(x))])
        g_y = C_.T * (C_ * y - c_) + mp.matrix([d_[i] * x[i] for i in range(len(x))])
        return g_x, g_y

    return gradients


def validation(X, b, kind: int) -> Callable:
    """G_x, G_y of the mean loss on other data."""

    def gradients(mp, x, y):
        data, target = _matrix(mp, X), _matrix(mp, b)
        slopes = [slope(mp, kind, z, t)[0] / data.rows for z, t in zip(data * y, target, strict=True)]
        return mp.zeros(len(x), 1), data.T * mp.matrix(slopes)

    return gradients


def _hypergradient(at, outer, x) -> np.ndarray:
    import mpmath as mp

    with mp.workdps(DIGITS):
        x = _matrix(mp, x)
        y, F_y, F_x = at(mp, x)
        g_x, g_y = outer(mp, x, y)
        v = mp.lu_solve(F_y.T, g_y)
        return np.array([float(value) for value in g_x - F_x.T * v])


def _root(mp, F, F_y, y):
    """Newton, the step halved until |F| falls."""
    size = mp.norm(F(y))
    for _ in range(200):
        if size < mp.mpf(10) ** (5 - DIGITS):
            return y
        step = mp.lu_solve(F_y(y), F(y))
        t = mp.mpf(1)
        while mp.norm(F(y - t * step)) >= size and t > mp.mpf(10) ** -12:
            t /= 2
        y = y - t * step
        size = mp.norm(F(y))
    raise RuntimeError("bilevel.testing: the reference solution was not found")


def _matrix(mp, a: Any):
    a = np.asarray(a, np.float64)
    return mp.matrix(a.tolist())
