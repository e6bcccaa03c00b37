"""
How many particles does a potential take?
=========================================

For Gaussians everything about a JKO step is known in closed form. Snapshots of an entropic step (the model of the
estimator) give the potential at the rate of one over the square root of the number of particles; snapshots of the
exact Wasserstein step do not: a bias remains, whatever the sharpening.
"""

from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np

from problems import flows

jax.config.update("jax_enable_x64", True)

STEP, EPSILON, SIZES, SEEDS = 0.4, 0.1, [100, 200, 400, 800], 8
Q, CENTRE = np.array([[1.0, 0.2], [0.2, 0.5]]), np.array([0.5, -0.3])
START = np.array([1.0, 0.0]), np.array([[1.0, 0.3], [0.3, 0.8]])
TRUTH = np.asarray(flows.Quadratic.coefficients(Q, CENTRE))

ENDS = {
    "entropic step (calibrated)": flows.gaussian.entropic_jko_step(*START, Q, CENTRE, STEP, EPSILON, 0.0),
    "exact step, temperature 0.1": flows.gaussian.jko_step(*START, Q, CENTRE, STEP, 0.1),
}

# %%
# The mean error of the coefficients, over seeds.

figure, ax = plt.subplots(figsize=(7, 5), layout="constrained")
for (name, end), color in zip(ENDS.items(), ("tab:blue", "tab:red"), strict=True):
    for rho, line in ((0, "o-"), (np.inf, "s--")):
        errors = np.zeros((len(SIZES), SEEDS))
        for seed in range(SEEDS):
            rng = np.random.default_rng(seed)
            clouds = [rng.multivariate_normal(np.asarray(m), np.asarray(S), SIZES[-1]) for m, S in (START, end)]
            for k, n in enumerate(SIZES):
                problem = flows.InverseJKO([z[:n] for z in clouds], flows.Quadratic(), STEP, EPSILON, sharpening=rho)
                errors[k, seed] = np.linalg.norm(np.asarray(problem.newton(tol=1e-8).x) - TRUTH)
        mean = errors.mean(1)
        slope = np.polyfit(np.log(SIZES), np.log(mean), 1)[0]
        print(f"{name}, sharpening {rho}: errors {mean.round(3)}, slope {slope:.2f}")
        ax.loglog(SIZES, mean, line, color=color, label=f"{name}, sharpening {rho}: slope {slope:.2f}")
ax.loglog(SIZES, mean[0] * np.sqrt(SIZES[0] / np.array(SIZES)), color="gray", lw=0.7, label="slope -1/2")
ax.set(xlabel="particles in each snapshot", ylabel="error of the coefficients (mean over seeds)")
ax.legend(fontsize=8)

path = Path("build", "flows_gaussian.png").absolute()
path.parent.mkdir(exist_ok=True)
figure.savefig(path, dpi=120)
print(f"The picture: {path}")
