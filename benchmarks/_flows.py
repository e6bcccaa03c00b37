"""What `benchmarks.flows` fits: the potentials as one function, features, and data of three kinds."""

from __future__ import annotations

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from problems import flows

from ._potentials import POTENTIALS

DT, STEPS, TEMPERATURE = 0.01, 5, 0.1
EPSILON = {"tracked": 0.05, "independent": 0.05, "calibrated": 0.1}
NAMES = list(POTENTIALS)
LOW, HIGH, SIDE = -5.0, 5.0, 21


def potential(which, z):
    """V number `which` of the study at z: one function, so that one program serves all of them."""
    return jax.lax.switch(
        jnp.asarray(which, int), [lambda z, f=f: f(z).astype(z.dtype) for f in POTENTIALS.values()], z
    )


class Ridge(eqx.Module):
    """weight |theta|^2 as a penalty of `InverseJKO`."""

    weight: jax.Array

    def value(self, x):
        return self.weight * jnp.sum(x * x)

    def prox(self, x, t):
        return x / (1 + 2 * t * self.weight)


class Features:
    """Monomials z_i^k, k <= 4, scaled, and in the plane 7 x 7 Gaussians of width 1."""

    def __init__(self, dimension: int):
        axis = np.linspace(-4, 4, 7)
        self.centres = np.array(list(itertools.product(axis, repeat=2))) if dimension == 2 else None

    def __call__(self, z):
        powers = jnp.concatenate([z, z**2 / 4, z**3 / 16, z**4 / 64])
        if self.centres is None:
            return powers
        return jnp.concatenate([powers, jnp.exp(-jnp.sum(jnp.square(z - self.centres), axis=1) / 2)])

    def potential(self, x, z):
        """The potential with coefficients x."""
        return x @ self(z)


features = functools.cache(Features)  # the same object again, so that nothing is compiled again


def paths(name: str, setting: str, n: int, dimension: int, seed: int):
    """Three groups of n particles at all times (to train, to choose, to judge), each a list of arrays (n, d). In the
    study's setting they are tracked, else each snapshot has particles of its own, which diffuse."""
    rng, which = np.random.default_rng(seed), jnp.asarray(float(NAMES.index(name)))
    groups = []
    for group in range(3):
        start = lambda: rng.uniform(-4, 4, size=(n, dimension))
        if setting == "tracked":
            groups.append(list(np.asarray(flows.simulate(potential, which, start(), steps=STEPS, step_size=DT))))
            continue
        keys = jax.random.split(jax.random.key(1000 * seed + group), STEPS + 1)
        heat = {"steps": STEPS, "step_size": DT, "temperature": TEMPERATURE}
        runs = [flows.simulate(potential, which, start(), key=key, **heat) for key in keys]
        groups.append([np.asarray(run[t]) for t, run in enumerate(runs)])
    return groups


def _nearest(table, z):
    """The entry of a table over the grid at a point of the grid."""
    i, j = jnp.round((z - LOW) / (HIGH - LOW) * (SIDE - 1)).astype(int)
    return table[i * SIDE + j]


def calibrated(name: str):
    """`(grid, weights before, weights after)`: the entropic step's own solution, kappa = 0, on a grid in the plane."""
    axis = np.linspace(LOW, HIGH, SIDE)
    grid = np.array(list(itertools.product(axis, repeat=2)))
    before = np.exp(-np.sum(grid**2, 1) / 4)
    before /= before.sum()
    table = jax.vmap(POTENTIALS[name])(jnp.asarray(grid))
    step = flows.JKOStep(
        grid, grid, _nearest, DT, EPSILON["calibrated"], source_weights=before,
        support_weights=np.full(len(grid), (axis[1] - axis[0]) ** 2), internal=0,
    )  # fmt: skip
    after = np.asarray(step.next_weights(table, bilevel.solve(step, table, step.initial()).y))
    return grid, before, after / after.sum()


@eqx.filter_jit
def _forces(which, x, phi, points):
    true = jax.vmap(jax.grad(lambda z: potential(which, z)))(points)
    mine = jax.vmap(jax.grad(lambda z: x @ phi(z)))(points)
    slopes = jax.vmap(jax.jacobian(phi))(points)
    fine = jnp.all(jnp.isfinite(true), axis=1)
    return (
        jnp.where(fine[:, None], true, 0),
        jnp.where(fine[:, None], mine, 0),
        jnp.where(fine[:, None, None], slopes, 0),
    )


def force_errors(name: str, xs: dict, phi, points, ridge: float) -> dict[str, float]:
    """|grad V - found| over the points, relative to |grad V| (to 1 for the flat potential); and that of the nearest
    potential with these features, so far as the ridge lets it be reached."""
    which = jnp.asarray(float(NAMES.index(name)))
    found = {}
    for label, x in xs.items():
        true, mine, slopes = map(np.asarray, _forces(which, jnp.asarray(x), phi, jnp.asarray(points)))
        size = np.sqrt(np.mean(np.sum(true**2, 1))) or 1.0
        found[label] = float(np.sqrt(np.mean(np.sum((mine - true) ** 2, 1))) / size)
    flat = slopes.transpose(0, 2, 1).reshape(-1, slopes.shape[1]) / np.sqrt(len(points))
    best = np.linalg.solve(flat.T @ flat + ridge * np.eye(flat.shape[1]), flat.T @ true.ravel() / np.sqrt(len(points)))
    rest = flat @ best - true.ravel() / np.sqrt(len(points))
    return found | {"nearest": float(np.linalg.norm(rest) / size)}
