"""
A sparse potential in Fourier features
======================================

A potential made of three waves moves particles that nobody tracks. Among twenty-four waves, which three are they?
An l1 penalty on the coefficients decides, and its price shows: what it finds it also shrinks.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from problems import flows

jax.config.update("jax_enable_x64", True)

# %%
# Four snapshots of particles that diffuse a little, each snapshot from a run of its own.

PARTICLES, SNAPSHOTS, STEP, FINE, TEMPERATURE = 400, 4, 0.1, 10, 0.02
features = flows.Fourier(2)
waves = features.frequencies(2)
names = [f"{kind}{tuple(int(i) for i in w)}" for kind in ("cos", "sin") for w in waves]
truth = np.zeros(len(names))
for name, value in (("cos(1, 0)", 1.0), ("sin(0, 1)", -0.8), ("cos(1, 1)", 0.6)):
    truth[names.index(name)] = value
potential = lambda x, z: x @ features(z)

snapshots = []
for t in range(SNAPSHOTS):
    start = np.random.default_rng(t).uniform(-np.pi, np.pi, size=(PARTICLES, 2))
    path = flows.simulate(
        potential, jnp.asarray(truth), start, steps=FINE * t, step_size=STEP / FINE, temperature=TEMPERATURE,
        key=jax.random.key(t),
    )  # fmt: skip
    snapshots.append(np.asarray(path[-1]))

# %%
# The fit, with weaker and weaker penalties. The strongest one that keeps three coefficients is looked at closely: the
# three are the right ones, much too small. That there are three is taken as known here; without a penalty the data,
# which are not those of an entropic step, leave large coefficients on waves that are not there.

fits, found = {}, None
for weight in (2e-2, 1.5e-2, 1e-2, 7e-3, 5e-3, 0.0):
    penalty = flows.L1(weight) if weight else None
    fit = flows.InverseJKO(snapshots, features, STEP, 0.03, internal=TEMPERATURE * STEP, penalty=penalty).newton(
        tol=1e-8
    )
    fits[weight] = np.asarray(fit.x)
    kept = [n for n, v in zip(names, fit.x, strict=True) if v != 0]
    print(
        f"weight {weight:g}: {len(kept)} of {len(names)} coefficients"
        + (f": {', '.join(kept)}" if len(kept) < 9 else "")
    )
    if found is None and len(kept) >= 3:
        found = weight
assert found is not None

# %%
# True and found landscapes, and all coefficients.

axis = np.linspace(-np.pi, np.pi, 70)
grid = jnp.asarray(np.stack(np.meshgrid(axis, axis), -1))
figure, axes = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained", width_ratios=(1, 1, 1.4))
for ax, x, title in ((axes[0], truth, "true"), (axes[1], fits[found], f"found, weight {found:g}")):
    values = jax.vmap(jax.vmap(lambda z, x=x: potential(x, z)))(grid)
    ax.contourf(axis, axis, values, levels=np.linspace(-2.5, 2.5, 21), cmap="viridis", extend="both")
    ax.plot(*snapshots[-1].T, ".", color="white", ms=2)
    ax.set(title=f"{title}: potential, last snapshot", xlim=(-np.pi, np.pi), ylim=(-np.pi, np.pi))
place = np.arange(len(names))
axes[2].bar(place, truth, width=0.9, color="lightgray", label="true")
axes[2].plot(place, fits[found], "o", color="tab:red", label=f"found, weight {found:g}")
axes[2].plot(place, fits[0.0], "x", color="tab:blue", label="found without a penalty")
axes[2].set_xticks(place, names, rotation=90, fontsize=7)
axes[2].legend()

path = Path("build", "flows_sparse.png").absolute()
path.parent.mkdir(exist_ok=True)
figure.savefig(path, dpi=120)
print(f"The picture: {path}")
