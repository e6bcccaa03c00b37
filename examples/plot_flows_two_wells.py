"""
Two wells from five snapshots
=============================

Particles diffuse in a potential with two wells. They are never tracked: each of the five snapshots shows other
particles. Which potential do they follow?

The data come from a stochastic differential equation, not from an entropic JKO step, so the entropic loss has a bias
that more particles would not remove, and the quadratic loss has one of its own. Forecasts of snapshots that were left
out of the fit decide between them.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from problems import flows

jax.config.update("jax_enable_x64", True)

# %%
# The data
# --------
#
# Each snapshot is the end of its own Langevin run, in ten small steps from one snapshot to the next.

PARTICLES, SNAPSHOTS, STEP, FINE, TEMPERATURE = 300, 5, 0.1, 10, 0.1


def truth(x, z):
    """Wells at (1, 0) and (-1, 0), the second less deep."""
    return (z[0] ** 2 - 1) ** 2 + z[1] ** 2 + 0.3 * z[0]


snapshots = []
for t in range(SNAPSHOTS):
    rng = np.random.default_rng(t)
    start = np.array([0.0, 1.2]) + 0.35 * rng.normal(size=(PARTICLES, 2))
    path = flows.simulate(
        truth, None, start, steps=FINE * t, step_size=STEP / FINE, temperature=TEMPERATURE, key=jax.random.key(t)
    )
    snapshots.append(np.asarray(path[-1]))

# %%
# Both estimators, judged by what they have not seen
# --------------------------------------------------
#
# The potentials are polynomials of degree four. The temperature is known, and enters as an internal energy.

features, epsilon = flows.Polynomials(4), 0.03
found = flows.compare(snapshots, features, STEP, epsilon, internal=TEMPERATURE * STEP, ridge=1e-6)
print(found)

# %%
# The landscapes
# --------------


def error(theta):
    """The mean error of the force over the last four snapshots, relative to its size."""
    points = jnp.asarray(np.concatenate(snapshots[1:]))
    slope = lambda potential, x: jax.vmap(jax.grad(lambda z: potential(x, z)))(points)
    mine = slope(lambda x, z: x @ features(z), theta)
    true = slope(truth, None)
    return float(jnp.linalg.norm(mine - true) / jnp.linalg.norm(true))


for name, result in found.fits.items():
    print(f"{name:<26} relative error of the force on the particles: {error(result.x):.2f}")

axis_x, axis_y = np.linspace(-1.8, 1.8, 80), np.linspace(-1.2, 1.8, 70)
grid = jnp.asarray(np.stack(np.meshgrid(axis_x, axis_y), -1))
landscape = {"true": jax.vmap(jax.vmap(lambda z: truth(None, z)))(grid)}
shown = min((n for n in found.fits if n.startswith("entropic")), key=lambda n: found.scores[n].mean())
for name in dict.fromkeys([shown, found.best]):
    landscape[name] = jax.vmap(jax.vmap(lambda z, x=found.fits[name].x: x @ features(z)))(grid)

figure, axes = plt.subplots(1, len(landscape) + 1, figsize=(5 * len(landscape) + 5, 4.4), layout="constrained")
for ax, (name, values) in zip(axes, landscape.items(), strict=False):
    x, potential = (None, truth) if name == "true" else (found.fits[name].x, lambda x, z: x @ features(z))
    seen = jax.vmap(lambda z, x=x, potential=potential: potential(x, z))(jnp.concatenate(snapshots))
    values = np.asarray(values - jnp.min(seen))  # what the particles saw; the rest is extrapolated
    ax.contourf(axis_x, axis_y, values, levels=np.linspace(0, 4, 21), cmap="viridis", extend="both")
    path = flows.simulate(potential, x, snapshots[0][:25], steps=60, step_size=0.02)
    ax.plot(path[:, :, 0], path[:, :, 1], color="white", lw=0.7)
    ax.plot(*snapshots[-1].T, ".", color="tab:red", ms=2, alpha=0.5)
    ax.set(title=f"{name}: potential, trajectories, last snapshot", xlim=(-1.8, 1.8), ylim=(-1.2, 1.8))
    ax.title.set_fontsize(9)
found.plot(axes[-1])
axes[-1].legend(fontsize=7)

path = Path("build", "flows_two_wells.png").absolute()
path.parent.mkdir(exist_ok=True)
figure.savefig(path, dpi=120)
print(f"The picture: {path}")
