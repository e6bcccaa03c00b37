"""Inverse JKO on the fifteen potentials of the JKOnet* study: `python -m benchmarks.flows`.

Three settings. `tracked`: as in the study, particles uniform in [-4, 4]^d, explicit Euler steps of 0.01, six snapshots
of the same particles, features the monomials up to degree four of each coordinate and Gaussians on a grid, ridge 0.01.
`independent`: the same with diffusing particles (temperature 0.1), each snapshot with its own. Here `flows.compare`
chooses on held-out particles, and a third group of particles judges the choice: one-step-ahead earth mover's distance,
that of the choice over that of the best, error of grad V on the training points relative to its size.

`calibrated`: the entropic step's own solution (kappa = 0) on a grid, sampled independently, for several numbers of
particles and seeds: the error of grad V of each estimator, geometric means. Losses are printed like wins. `speed`, only
if asked for: how long a fit of 50 features to five snapshots takes.

Options: `--particles 2000` (half of them to train), `--sizes 100,400` and `--seeds 5` (calibrated), `--dimension 2`
(10, 30, 50 without the Gaussians), `--settings tracked,independent,calibrated`, `--potentials all`, `--network` (also a
network as potential, rho 0: slow).
"""

from __future__ import annotations

import argparse
import math
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

import bilevel
from problems import flows

from . import _flows as study

RIDGE = 0.01
RHOS = (0.0, 1.0, math.inf)


def show(title: str, labels: list[str], rows: dict[str, list[float]], *, mark: int = 0) -> None:
    """A table; the smallest of the first `mark` columns of each row gets a star."""
    print(f"\n{title}:\n{'':<16}" + "".join(f"{label:>15}" for label in labels))
    for name, row in rows.items():
        best = min(row[:mark]) if mark else None
        print(f"{name:<16}" + "".join(f"{v:>14.4g}{'*' if k < mark and v == best else ' '}" for k, v in enumerate(row)))


# ------------------------------------------------------------------------------------------------ the study's settings


def network(dimension: int, train, epsilon: float):
    """A network of two hidden layers as potential, fitted at rho = 0 by L-BFGS: `(problem, parameters, seconds)`."""
    begin = time.perf_counter()
    mlp = eqx.nn.MLP(dimension, "scalar", 32, 2, activation=jax.nn.softplus, key=jax.random.key(0), dtype=jnp.float64)
    model = flows.InverseJKO(train, flows.Neural(mlp), study.DT, epsilon)
    x = bilevel.minimize(model, *model.initial(), tol=1e-5, max_steps=200).x
    return model, x, time.perf_counter() - begin


def chosen(name: str, setting: str, n: int, dimension: int, with_network: bool):
    """For one potential: distances, errors of the force and seconds by estimator, and the name `compare` chose."""
    train, choose, judge = study.paths(name, setting, n, dimension, seed=0)
    phi, epsilon, ridge = study.features(dimension), study.EPSILON[setting], RIDGE * study.DT**2
    options = {"penalty": study.Ridge(jnp.asarray(ridge)), "ridge": ridge, "test": choose}
    begin = time.perf_counter()
    found = flows.compare(train, phi, study.DT, epsilon, sharpening=RHOS, **options)
    seconds = time.perf_counter() - begin
    for label, why in found.failures.items():
        tqdm.write(f"{name}, {label}: {why}")
    xs = {label: fit.x for label, fit in found.fits.items()}
    forecasts = {
        k: [flows.simulate(phi.potential, x, z, steps=1, step_size=study.DT)[-1] for z in judge[:-1]]
        for k, x in xs.items()
    }
    if with_network:
        model, x, more = network(dimension, train, epsilon)
        tqdm.write(f"{name}, network: {more:.1f} s")
        forecasts["network"] = [model.predict(x, z, 1)[-1] for z in judge[:-1]]
    distances = {}
    for label in (*found.scores, *(("network",) if with_network else ())):
        pairs = zip(forecasts.get(label, [None]), judge[1:], strict=False)
        bad = label not in forecasts or not all(bool(jnp.isfinite(f).all()) for f in forecasts[label])
        distances[label] = math.inf if bad else float(np.mean([flows.earth_mover(f, z) for f, z in pairs]))
    errors = study.force_errors(name, xs, phi, np.concatenate(train[1:]), RIDGE)
    return distances, errors, found.best, seconds


def forecasting(setting: str, names: list[str], n: int, dimension: int, with_network: bool) -> None:
    """The tables of one of the study's settings."""
    distances, errors, ratios, seconds = {}, {}, {}, []
    for name in tqdm(names, desc=setting):
        by, error, choice, took = chosen(name, setting, n, dimension, with_network)
        distances[name], errors[name] = list(by.values()), [error.get(k, math.inf) for k in (*by, "nearest")]
        best = min(v for k, v in by.items() if k != "network")
        ratio = 1.0 if by[choice] == best else by[choice] / max(best, 1e-300)  # the flat one is forecast exactly
        ratios[name] = ratio, choice, min(by, key=lambda k: by[k])
        seconds.append(took)
        labels = [short(k) for k in by]
    print(f"\n{setting}, d = {dimension}, {n} particles in each of {study.STEPS + 1} snapshots, one seed")
    show("earth mover's distance, one step ahead, third group", labels, distances, mark=len(labels))
    show("relative error of grad V on the training points", [*labels, "nearest"], errors, mark=len(labels))
    print("\nchosen by `compare` on the second group, its distance over the best one's on the third:")
    for name, (ratio, choice, best) in ratios.items():
        print(f"{name:<16}{ratio:>8.3f}  {choice}" + ("" if choice == best else f" (best: {best})"))
    within = sum(ratio <= 1.1 for ratio, *_ in ratios.values())
    print(f"within 10 % of the best: {within} of {len(ratios)}")
    print(f"seconds for the five fits, compared on the second group: {np.median(seconds):.1f} (median)")


def short(label: str) -> str:
    """For the head of a column."""
    return label.replace("entropic, sharpening", "rho").replace("quadratic", "quad").replace(" points", "")


# ------------------------------------------------------------------------------------------------ calibrated data


def recovery(names: list[str], sizes: list[int], seeds: int) -> None:
    """The tables of calibrated data."""
    phi, epsilon, ridge = study.features(2), study.EPSILON["calibrated"], RIDGE * study.DT**2
    labels = [*(f"rho {rho:g}" for rho in RHOS), "quad, new", "quad, old"]
    errors = np.full((len(sizes), len(names), seeds, len(labels) + 1), np.nan)
    for i, name in enumerate(tqdm(names, desc="calibrated")):
        grid, before, after = study.calibrated(name)
        for seed in range(seeds):
            rng = np.random.default_rng(seed)
            X, Y = (grid[rng.choice(len(grid), size=max(sizes), p=p)] for p in (before, after))
            for k, n in enumerate(sizes):
                pair = [X[:n], Y[:n]]
                penalty = study.Ridge(jnp.asarray(ridge))
                models = [
                    flows.InverseJKO(pair, phi, study.DT, epsilon, sharpening=rho, penalty=penalty) for rho in RHOS
                ]
                models += [flows.QuadraticJKO(pair, phi, study.DT, at=at, ridge=ridge) for at in ("new", "old")]
                xs = {label: model.newton(tol=1e-8).x for label, model in zip(labels, models, strict=True)}
                errors[k, i, seed] = list(study.force_errors(name, xs, phi, Y[:n], RIDGE).values())
    with np.errstate(divide="ignore"):  # the flat potential is reached
        mean = np.exp(np.log(errors).mean(2))  # over seeds
        overall = np.exp(np.log(mean).mean(1))
    for k, n in enumerate(sizes):
        rows = {name: list(mean[k, i]) for i, name in enumerate(names)}
        rows["all"] = list(overall[k])
        title = f"calibrated, {n} particles in both snapshots, {seeds} seeds: relative error of grad V, geometric means"
        show(title, [*labels, "nearest"], rows, mark=len(labels))
    for j, label in enumerate(labels):
        falls = int((mean[-1, :, j] < mean[0, :, j]).sum())
        over = [np.exp(np.log(mean[k, :, j] / mean[k, :, 3:5].min(1)).mean()) for k in range(len(sizes))]
        print(f"{label:<10} falls from {sizes[0]} to {sizes[-1]} particles for {falls} of {len(names)};")
        print(
            f"{'':<10} over the better quadratic of each potential, geometric mean: "
            + ", ".join(f"{v:.3f} (n = {n})" for v, n in zip(over, sizes, strict=True))
        )


def speed(particles: int) -> None:
    """Seconds of a fit of 50 features to five Gaussian snapshots, and of one Newton step of a fit like it."""
    print(f"\n5 snapshots of {particles} particles, 50 features: seconds")
    mean, spread = np.array([1.0, 0.0]), np.array([[3.0, 0.9], [0.9, 2.4]])
    Q, centre = np.array([[1.0, 0.2], [0.2, 0.5]]), np.array([0.5, -0.3])
    random, snapshots = np.random.default_rng(0), []
    for _ in range(5):
        snapshots.append(random.multivariate_normal(mean, spread, particles))
        mean, spread = flows.gaussian.entropic_jko_step(mean, spread, Q, centre, 0.2, 0.1, 0.0)
    axis = np.linspace(-4, 4, 7)
    bumps = flows.RadialBasis(np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2), 1.0)
    features = lambda z: jnp.concatenate([z[:1], bumps(z)])
    for rho in (0, 1.0):
        begin = time.perf_counter()
        model = flows.InverseJKO(snapshots, features, 0.2, 0.1, sharpening=rho)
        model.newton(tol=1e-8)
        first = time.perf_counter() - begin
        begin = time.perf_counter()
        found = model.newton(tol=1e-8)
        step = (time.perf_counter() - begin) / max(1, found.steps)
        words = f"first fit {first:.1f} with compilation, a Newton step {step:.2f} ({found.steps} steps)"
        print(f"  rho = {rho:g}: {words}")


def main() -> None:
    """Prints the tables."""
    jax.config.update("jax_enable_x64", True)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--particles", type=int, default=2000)
    parser.add_argument("--sizes", default="100,400")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--dimension", type=int, default=2)
    parser.add_argument("--settings", default="tracked,independent,calibrated")
    parser.add_argument("--potentials", default="all")
    parser.add_argument("--network", action="store_true")
    options = parser.parse_args()
    names = study.NAMES if options.potentials == "all" else options.potentials.split(",")
    for setting in options.settings.split(","):
        if setting == "speed":
            speed(options.particles)
        elif setting != "calibrated":
            forecasting(setting, names, options.particles // 2, options.dimension, options.network)
        elif options.dimension == 2:
            recovery(names, [int(n) for n in options.sizes.split(",")], options.seeds)


if __name__ == "__main__":
    main()
