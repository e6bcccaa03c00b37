"""Inverse JKO on the fifteen potentials of the JKOnet* study: `python -m benchmarks.flows`.

The study's settings: particles uniform in [-4, 4]^d, explicit Euler steps of 0.01, six snapshots, half the particles
held out, features the monomials up to degree four of each coordinate and Gaussians on a grid, ridge 0.01. Once as in
the study (tracked particles), once with independent snapshots of diffusing ones (temperature 0.1), and once on
calibrated data: the entropic step's own solution on a grid, sampled independently. Printed are the one-step-ahead
earth mover's distance on held-out particles, the error of grad V on the support relative to its size, and seconds;
wins and losses alike.

Options: `--particles 2000`, `--seeds 1`, `--dimension 2` (then 10, 30, 50 without the grid of Gaussians), `--settings
tracked,independent,calibrated`, `--potentials all`.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

import bilevel
from problems import flows

from ._potentials import POTENTIALS

DT, STEPS, TEMPERATURE, EPSILON, RIDGE = 0.01, 5, 0.1, 0.05, 0.01
CALIBRATED_STEP, CALIBRATED_EPSILON = 0.01, 0.3
RHOS = (0.0, 1.0, math.inf)


class Ridge:
    """weight |theta|^2 as a penalty of `InverseJKO`."""

    def __init__(self, weight: float):
        self.weight = weight

    def value(self, x):
        return self.weight * jnp.sum(x * x)

    def prox(self, x, t):
        return x / (1 + 2 * t * self.weight)


def features(dimension: int):
    """Monomials z_i^k, k <= 4, and in the plane 7 x 7 Gaussians."""
    axis = np.linspace(-4, 4, 7)
    centres = np.array(list(itertools.product(axis, repeat=2))) if dimension == 2 else None

    def phi(z):
        powers = jnp.concatenate([z, z**2 / 4, z**3 / 16, z**4 / 64])
        if centres is None:
            return powers
        return jnp.concatenate([powers, flows.RadialBasis(centres, 1.0)(z)])

    return phi


def snapshots(name: str, setting: str, n: int, dimension: int, seed: int):
    """Training and held-out snapshots, (steps + 1) arrays each."""
    potential = lambda x, z: POTENTIALS[name](z)
    rng = np.random.default_rng(seed)
    start = lambda: rng.uniform(-4, 4, size=(n, dimension))
    if setting == "tracked":
        path = np.asarray(flows.simulate(potential, None, start(), steps=STEPS, step_size=DT))
        return [p[: n // 2] for p in path], [p[n // 2 :] for p in path]
    if setting == "independent":
        sides = []
        for side in range(2):
            runs = [
                flows.simulate(
                    potential, None, start()[: n // 2], steps=t, step_size=DT, temperature=TEMPERATURE,
                    key=jax.random.key(100 * seed + 10 * side + t),
                )[-1]
                for t in range(STEPS + 1)
            ]  # fmt: skip
            sides.append([np.asarray(run) for run in runs])
        return sides[0], sides[1]
    axis = np.linspace(-5, 5, 21)
    grid = np.array(list(itertools.product(axis, repeat=2)))
    weights = np.exp(-np.sum(grid**2, 1) / 4)
    weights /= weights.sum()
    step = flows.JKOStep(
        grid, grid, potential, CALIBRATED_STEP, CALIBRATED_EPSILON, source_weights=weights,
        support_weights=np.full(len(grid), (axis[1] - axis[0]) ** 2), internal=0,
    )  # fmt: skip
    after = np.asarray(step.next_weights(None, bilevel.solve(step, None, step.initial()).y))
    draw = lambda p: grid[rng.choice(len(grid), size=n // 2, p=p / p.sum())]
    return [draw(weights), draw(after)], [draw(weights), draw(after)]


def force_error(name: str, x, phi, points) -> float:
    """|grad V - found| over the points, relative to |grad V| (to 1 for the flat potential)."""
    at = jnp.asarray(points)
    true = jax.vmap(jax.grad(POTENTIALS[name]))(at)
    mine = jax.vmap(jax.grad(lambda z: x @ phi(z)))(at)
    fine = jnp.all(jnp.isfinite(true), axis=1)
    true, mine = true[fine], mine[fine]
    size = jnp.sqrt(jnp.mean(jnp.sum(true**2, 1)))
    return float(jnp.sqrt(jnp.mean(jnp.sum((mine - true) ** 2, 1))) / jnp.where(size > 0, size, 1))


def run(name: str, setting: str, n: int, dimension: int, seed: int) -> dict[str, tuple[float, float, float]]:
    """(earth mover's distance, error of the force, seconds) of each estimator."""
    train, test = snapshots(name, setting, n, dimension, seed)
    size, epsilon = (DT, EPSILON) if setting != "calibrated" else (CALIBRATED_STEP, CALIBRATED_EPSILON)
    phi, found = features(dimension), {}
    makers: dict[str, Callable] = {
        f"entropic, rho {rho:g}": lambda rho=rho: flows.InverseJKO(
            train, phi, size, epsilon, sharpening=rho, penalty=Ridge(RIDGE * size**2)
        )
        for rho in RHOS
    }
    for at in ("new", "old"):
        makers[f"quadratic, {at}"] = lambda at=at: flows.QuadraticJKO(train, phi, size, at=at, ridge=RIDGE * size**2)
    for label, make in makers.items():
        begin = time.perf_counter()
        try:
            model = make()
            x = model.newton(tol=1e-8).x
        except (ValueError, bilevel.NotConverged) as error:
            tqdm.write(f"{name}, {label}: {error}")
            found[label] = (math.inf, math.inf, math.nan)
            continue
        seconds = time.perf_counter() - begin
        forecasts = [model.predict(x, z, 1, step_size=size)[-1] for z in test[:-1]]
        finite = all(bool(jnp.isfinite(f).all()) for f in forecasts)
        distance = (
            np.mean([flows.earth_mover(f, z) for f, z in zip(forecasts, test[1:], strict=True)]) if finite else np.inf
        )
        found[label] = (float(distance), force_error(name, x, phi, np.concatenate(train[1:])), seconds)
    return found


def main() -> None:
    """Prints the tables."""
    jax.config.update("jax_enable_x64", True)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--particles", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--dimension", type=int, default=2)
    parser.add_argument("--settings", default="tracked,independent,calibrated")
    parser.add_argument("--potentials", default="all")
    options = parser.parse_args()
    names = list(POTENTIALS) if options.potentials == "all" else options.potentials.split(",")
    for setting in options.settings.split(","):
        if setting == "calibrated" and options.dimension != 2:
            continue
        table = {}
        for name in tqdm(names, desc=setting):
            rows = [run(name, setting, options.particles, options.dimension, seed) for seed in range(options.seeds)]
            table[name] = {label: np.mean([row[label] for row in rows], axis=0) for label in rows[0]}
        labels = list(table[names[0]])
        print(f"\n{setting}, d = {options.dimension}, {options.particles // 2} particles for training in each snapshot")
        for column, what in enumerate(("one-step earth mover's distance", "relative error of grad V", "seconds")):
            print(f"{what}:")
            print(f"{'':<16}" + "".join(f"{label:>20}" for label in labels))
            for name, row in table.items():
                values = [row[label][column] for label in labels]
                best = np.nanmin(values)
                print(f"{name:<16}" + "".join(f"{v:>19.4g}{'*' if v == best and column < 2 else ' '}" for v in values))
            if column < 2:
                wins = [
                    sum(row[k][column] == min(r[column] for r in row.values()) for row in table.values())
                    for k in labels
                ]
                print(f"{'best on':<16}" + "".join(f"{w:>19d} " for w in wins))


if __name__ == "__main__":
    main()
