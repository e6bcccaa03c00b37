"""
A learned denoiser
==================

Total variation removes noise from a photograph by penalizing two differences of neighbouring pixels, with one weight
that a grid finds. Here the filters themselves and their weights are hyperparameters: 24 filters of 5 x 5, 600 numbers,
tuned so that denoised patches come close to clean ones. Every pixel is data, so that they have a better chance to
generalize than hundreds of penalties of a small table. They are trained on patches from one half of two photographs (a
building, a flower) at three scales, and tested on the other halves and on a photograph of another kind (a portrait).

One digit of each hypergradient is enough, so everything is in float32, which is JAX's default. Both denoisers get the
best strength for each test: a weight for total variation, a factor for all the weights that were learned. Training is
short here, and what is learned falls short of total variation on the portrait; `python -m benchmarks.denoiser` trains
longer, and also compares at the strengths that the training patches choose.
"""

import time
from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.cbook import get_sample_data
from sklearn.datasets import load_sample_image

import bilevel
from problems.tuning import DenoisingTuning

NOISE, PATCHES, STEPS = 0.1, 3, 25
rng = np.random.default_rng(0)
building, flower = (load_sample_image(f"{name}.jpg").mean(2) / 255 for name in ("china", "flower"))
portrait = plt.imread(str(get_sample_data("grace_hopper.jpg", asfileobj=False))).mean(2) / 255


def noisy(image):
    return (image + NOISE * rng.normal(size=image.shape)).astype(np.float32)


def psnr(image, clean):
    return -10 * np.log10(np.mean((np.asarray(image) - clean) ** 2))


def patches(image, count, size=36):
    """Squares from the left half, of every pixel, every second and every third, turned at random."""
    found = []
    for scale in (1, 2, 3):
        half = image[:, : image.shape[1] // 2][::scale, ::scale]
        for i, j in rng.integers(0, np.array(half.shape) - size + 1, (count, 2)):
            found.append(np.rot90(half[i : i + size, j : j + size], int(rng.integers(4))))
    return np.array(found)


clean = np.concatenate([patches(image, PATCHES) for image in (building, flower)])
dirty = noisy(clean)

# %%
# Total variation
# ---------------
#
# It is the same problem with two filters, the differences of neighbours, and one weight.

halves = np.array([image[::2, ::2][10:202, -128:] for image in (building, flower)])
pieces = np.array([portrait[::2, ::2][20:212, k : k + 128] for k in (0, 128)])
tests = {"held-out halves": halves, "another photograph": pieces}
noised = {name: noisy(images) for name, images in tests.items()}
differences = DenoisingTuning(dirty, clean, size=2, filters=2, delta=2.5e-3)


def total_variation(log_weight):
    """Hyperparameters that make the two filters horizontal and vertical differences."""
    basis = np.asarray(differences.basis)
    filters = np.array([[[-1.0, 1.0], [0.0, 0.0]], [[-1.0, 0.0], [1.0, 0.0]]])
    coefficients = np.einsum("kst,stm->km", filters, basis)
    return jnp.asarray(np.column_stack([np.full(2, log_weight), coefficients]), jnp.float32)


def best(denoise, strengths, name):
    """The best for one test over a grid of strengths."""
    return max((denoise(s, noised[name]) for s in strengths), key=lambda found: psnr(found, tests[name]))


weights = (-3.0, -2.9, -2.8, -2.7)
tv = {name: best(lambda w, images: differences.denoise(total_variation(w), images), weights, name) for name in tests}

# %%
# Learning
# --------
#
# The filters start as products of cosines, all with the same weight.

problem = DenoisingTuning(dirty, clean)
x0, y0 = problem.initial()
begin = time.perf_counter()
found = bilevel.minimize(problem, x0, y0, max_steps=STEPS, rtol=0.2, progress=True)
seconds = time.perf_counter() - begin
print(f"{x0.size} hyperparameters, {found.hypergradients} hypergradients, {seconds:.0f} s: {found.message}")

print(f"{'':<24}{'noisy':>8}{'best TV':>9}{'learned':>9}   PSNR in dB")
stronger = lambda s, images: problem.denoise(found.x.at[:, 0].add(s), images)
learned = {name: best(stronger, (0.0, 0.05, 0.1), name) for name in tests}
for name, images in tests.items():
    row = [psnr(version[name], images) for version in (noised, tv, learned)]
    print(f"{name:<24}{row[0]:8.2f}{row[1]:9.2f}{row[2]:9.2f}   learned - TV: {row[2] - row[1]:+.2f}")

# %%
# The picture: a piece of each test, and the filters, those with the largest weights first.

figure, axes = plt.subplots(3, 4, figsize=(11, 8.4), layout="constrained")
for name, line in zip(tests, axes[:2], strict=True):
    shown = {"clean": tests, "noisy": noised, "best TV": tv, "learned": learned}
    for axis, (title, images) in zip(line, shown.items(), strict=True):
        image = images[name][0]
        axis.imshow(image, cmap="gray", vmin=0, vmax=1)
        axis.set_title(title if title == "clean" else f"{title}, {psnr(image, tests[name][0]):.1f} dB")
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
