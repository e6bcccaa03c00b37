"""
A learned denoiser
==================

Total variation removes noise from a photograph by penalizing two differences of neighbouring pixels, with one weight
that a grid finds. Here the filters themselves and their weights are hyperparameters: 24 filters of 5 x 5, 600 numbers,
tuned so that denoised patches come close to clean ones. Every pixel is data, so that they have a better chance to
generalize than hundreds of penalties of a small table: they are trained on patches from one half of two photographs and
tested on the other half. How far they do is printed at the end; more patches and more steps help.
"""

import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_sample_image

import bilevel
from problems.tuning import DenoisingTuning

jax.config.update("jax_enable_x64", True)

NOISE, SIZE, PATCHES, STEPS = 0.1, 32, 6, 40
rng = np.random.default_rng(0)
photographs = {name: load_sample_image(f"{name}.jpg").mean(2)[::2, ::2] / 255 for name in ("china", "flower")}


def noisy(image):
    return image + NOISE * rng.normal(size=image.shape)


def psnr(image, clean):
    return -10 * np.log10(np.mean((np.asarray(image) - clean) ** 2))


def patches(half):
    """Squares from one half of each photograph, which noise is added to."""
    found = []
    for image in photographs.values():
        width = image.shape[1] // 2
        for _ in range(PATCHES):
            i = rng.integers(0, image.shape[0] - SIZE)
            j = rng.integers(0, width - SIZE) + half * width
            found.append(image[i : i + SIZE, j : j + SIZE])
    return np.array(found)


clean = patches(0)
dirty = noisy(clean)

# %%
# Total variation
# ---------------
#
# It is the same problem with two filters, the differences of neighbours, and one weight: the grid's best is chosen on
# the test patches themselves, which favours it.

test_clean = patches(1)
test_dirty = noisy(test_clean)
differences = DenoisingTuning(dirty, clean, size=2, filters=2, delta=1e-2)


def total_variation(log_weight):
    """Hyperparameters that make the two filters horizontal and vertical differences."""
    basis = np.asarray(differences.basis)
    filters = np.array([[[-1.0, 1.0], [0.0, 0.0]], [[-1.0, 0.0], [1.0, 0.0]]])
    coefficients = np.einsum("kst,stm->km", filters, basis)
    return jnp.asarray(np.column_stack([np.full(2, log_weight), coefficients]))


grid = np.linspace(-4.0, -1.5, 11)
scores = [psnr(differences.denoise(total_variation(w), test_dirty), test_clean) for w in grid]
best_tv = total_variation(grid[int(np.argmax(scores))])

# %%
# Learning
# --------

problem = DenoisingTuning(dirty, clean)
x0, y0 = problem.initial()
begin = time.perf_counter()
found = bilevel.minimize(problem, x0, y0, max_steps=STEPS, tol=1e-7, rtol=3e-2, progress=True)
seconds = time.perf_counter() - begin
print(f"{x0.size} hyperparameters, {found.hypergradients} hypergradients, {seconds:.0f} s: {found.message}")

print(f"{'':<24}{'noisy':>8}{'best TV':>9}{'learned':>9}   PSNR in dB")
learned = problem.denoise(found.x, dirty)
tv = differences.denoise(best_tv, dirty)
print(f"{'training patches':<24}{psnr(dirty, clean):8.2f}{psnr(tv, clean):9.2f}{psnr(learned, clean):9.2f}")
learned, tv = problem.denoise(found.x, test_dirty), differences.denoise(best_tv, test_dirty)
row = psnr(test_dirty, test_clean), psnr(tv, test_clean), psnr(learned, test_clean)
print(f"{'held-out halves':<24}{row[0]:8.2f}{row[1]:9.2f}{row[2]:9.2f}")
gain = row[2] - row[1]
print(f"On halves that it has not seen the learned denoiser is {abs(gain):.2f} dB {'better' if gain > 0 else 'worse'}.")

# %%
# The picture: a held-out piece of each photograph, and the filters, those with the largest weights first.

figure, axes = plt.subplots(3, 4, figsize=(11, 8.4), layout="constrained")
for k, line in zip((0, PATCHES), axes[:2], strict=True):
    shown = {"clean": test_clean[k], "noisy": test_dirty[k], "best TV": tv[k], "learned": learned[k]}
    for axis, (name, image) in zip(line, shown.items(), strict=True):
        axis.imshow(image, cmap="gray", vmin=0, vmax=1)
        axis.set_title(name if name == "clean" else f"{name}, {psnr(image, test_clean[k]):.1f} dB")
        axis.axis("off")
filters = np.einsum("km,stm->kst", found.x[:, 1:], problem.basis) * np.exp(np.asarray(found.x[:, :1]))[:, :, None]
order = np.argsort(-np.abs(filters).max((1, 2)))
for axis, f in zip(axes[2], filters[order], strict=False):
    axis.imshow(f, cmap="coolwarm", vmin=-np.abs(f).max(), vmax=np.abs(f).max())
    axis.set_title("filter")
    axis.axis("off")

picture = Path("build", "learned_denoiser.png").absolute()
picture.parent.mkdir(exist_ok=True)
figure.savefig(picture, dpi=120)
print(f"The picture: {picture}")
