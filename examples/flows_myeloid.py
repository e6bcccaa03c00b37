"""
Where blood cells go
====================

A simulated time course of myeloid differentiation (Krumsiek et al. 2011: eleven genes, from one progenitor to four
fates) ships with scanpy. Five windows of time are taken as snapshots in two principal components, and the potential
that drives one to the next is looked for. What is found is rough: both landscapes have wells where branches end, but
one potential of two components does not keep trajectories on the branches, and the estimators disagree.

Needs the data file of scanpy, which is read from where scanpy is installed: pip install scanpy
"""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from problems import flows

jax.config.update("jax_enable_x64", True)

spec = importlib.util.find_spec("scanpy")
if spec is None or spec.origin is None:
    raise SystemExit("This example reads a data set that ships with scanpy: pip install scanpy, then run it again.")
table = np.loadtxt(Path(spec.origin).parent / "datasets" / "krumsiek11.txt")

# %%
# Four runs of 160 times; no noise in the observation. A window of time holds the four runs at each of its times.

times, genes = table[:, 0].astype(int), table[:, 1:]
genes = genes - genes.mean(0)
components = np.linalg.svd(genes, full_matrices=False)[2][:2]
cells = genes @ components.T
CENTRES, HALF, STEP, EPSILON = (10, 30, 50, 70, 90), 8, 1.0, 0.1
snapshots = [cells[abs(times - t) < HALF] for t in CENTRES]
print("cells in each snapshot:", [len(z) for z in snapshots])

# %%
# Both estimators, judged by snapshots that were left out of the fit.

low, high = cells.min(0), cells.max(0)
grid = np.stack(np.meshgrid(np.linspace(low[0], high[0], 5), np.linspace(low[1], high[1], 5)), -1).reshape(-1, 2)
near = [bool(min(np.linalg.norm(z - c, axis=1).min() for z in snapshots) < 0.4) for c in grid]
features = flows.RadialBasis(grid[near], 0.4)
found = flows.compare(snapshots, features, STEP, EPSILON, sharpening=(0,), penalty=flows.L1(1e-4), ridge=1e-4)
print(found, found.failures or "")

# %%
# The landscapes, seen where there are cells, with trajectories of early cells over them.

shown = list(dict.fromkeys([next(n for n in found.fits if n.startswith("entropic")), found.best]))
potential = lambda theta, z: theta @ features(z)
figure, axes = plt.subplots(1, len(shown) + 1, figsize=(5.5 * len(shown) + 5, 4.6), layout="constrained")
x, y = (np.linspace(a - 0.1, b + 0.1, 80) for a, b in zip(low, high, strict=True))
plane = jnp.asarray(np.stack(np.meshgrid(x, y), -1))
for ax, name in zip(axes, shown, strict=False):
    theta = found.fits[name].x
    ax.contourf(x, y, jax.vmap(jax.vmap(lambda z, theta=theta: potential(theta, z)))(plane), levels=20, cmap="viridis")
    path = flows.simulate(potential, theta, snapshots[0][::4], steps=200, step_size=0.02)
    ax.plot(path[:, :, 0], path[:, :, 1], color="white", lw=0.8)
    for t, z in zip(CENTRES, snapshots, strict=True):
        ax.plot(*z.T, ".", ms=4, color=plt.colormaps["autumn"](1 - t / CENTRES[-1]), label=f"time {t}")
    ax.set(title=name, xlabel="first component", ylabel="second component", xlim=x[[0, -1]], ylim=y[[0, -1]])
axes[0].legend(fontsize=7)
found.plot(axes[-1])

path = Path("build", "flows_myeloid.png").absolute()
path.parent.mkdir(exist_ok=True)
figure.savefig(path, dpi=120)
print(f"The picture: {path}")
