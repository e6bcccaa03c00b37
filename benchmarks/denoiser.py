"""A learned denoiser against total variation: `python -m benchmarks.denoiser [--steps 40] [--every 2]`.

600 hyperparameters (`DenoisingTuning`), trained in float32 on patches from the left halves of two photographs that
scikit-learn ships, at several scales, turned and mirrored at random. The tests are the right halves and a photograph of
another kind, matplotlib's portrait, all of them at half their size or (`--every 1`) as they are. Total variation is
taken in its two forms, with a strength from a grid. Two comparisons, each like with like: the strength is chosen on the
training patches, or it is the best for the test picture, which nobody knows; what is learned then gets one factor for
all its weights from a grid too. PSNR in dB.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

import bilevel
from problems.tuning import DenoisingTuning

DELTA = 2.5e-3  # of total variation: what rounds its kink; larger ones were worse


class _Isotropic(bilevel.AbstractMinimization):
    """1/2 |u - b|^2 + strength * sum over pixels of sqrt(delta^2 + both differences squared)."""

    noisy: jnp.ndarray

    def objective_at(self, x, y):
        right = jnp.diff(y, axis=2, append=y[:, :, -1:])
        down = jnp.diff(y, axis=1, append=y[:, -1:, :])
        lengths = jnp.sqrt(DELTA**2 + jnp.square(right) + jnp.square(down))
        return 0.5 * jnp.sum(jnp.square(y - self.noisy)) + jnp.exp(x) * jnp.sum(lengths)


def isotropic(log_strength: float, noisy: np.ndarray) -> np.ndarray:
    """Total variation with the length of the gradient."""
    found = bilevel.solve(_Isotropic(jnp.asarray(noisy)), jnp.float32(log_strength), jnp.asarray(noisy), rtol=1e-4)
    return np.asarray(found.y)


def anisotropic(log_strength: float, noisy: np.ndarray) -> np.ndarray:
    """Total variation with the sum of both differences: two filters of the same problem."""
    problem = DenoisingTuning(noisy, noisy, size=2, filters=2, delta=DELTA)
    filters = np.array([[[-1.0, 1.0], [0.0, 0.0]], [[-1.0, 0.0], [1.0, 0.0]]])
    rows = np.einsum("kst,stm->km", filters, np.asarray(problem.basis))
    x = np.column_stack([np.full(2, log_strength), rows]).astype(np.float32)
    return np.asarray(problem.denoise(x, noisy))


def psnr(image: np.ndarray, clean: np.ndarray) -> float:
    """Of pixels between 0 and 1, in dB, over all images together."""
    return float(-10 * np.log10(np.mean((np.asarray(image, np.float64) - clean) ** 2)))


def photographs() -> tuple[list[np.ndarray], np.ndarray]:
    """Two to train on, and the portrait; gray, between 0 and 1."""
    from matplotlib.cbook import get_sample_data
    from matplotlib.image import imread
    from sklearn.datasets import load_sample_image

    both = [load_sample_image(f"{name}.jpg").mean(2) / 255 for name in ("china", "flower")]
    return both, imread(str(get_sample_data("grace_hopper.jpg", asfileobj=False))).mean(2) / 255


def training(
    images: list[np.ndarray], scales: list[int], count: int, size: int, rng: np.random.Generator
) -> np.ndarray:
    """`count` patches of each left half at each scale (1: every pixel, 2: every second, …)."""
    found = []
    for image in images:
        for scale in scales:
            half = image[:, : image.shape[1] // 2][::scale, ::scale]
            for i, j in rng.integers(0, np.array(half.shape) - size + 1, (count, 2)):
                patch = np.rot90(half[i : i + size, j : j + size], int(rng.integers(4)))
                found.append(patch[::-1] if rng.integers(2) else patch)
    return np.array(found)


def compare(denoisers: dict[str, tuple[Callable, np.ndarray]], noisy: dict, clean: dict) -> None:
    """Prints a table. `denoisers`: a function of (strength, images) and the grid of its strengths."""
    names = [name for name in clean if name != "training"]
    print(f"{'':34s}" + "".join(f"{name:>18s}" for name in names))
    print(f"{'noisy':34s}" + "".join(f"{psnr(noisy[name], clean[name]):18.2f}" for name in names))
    rows = {}
    for who, (denoise, grid) in denoisers.items():
        scores = {name: [psnr(denoise(s, noisy[name]), clean[name]) for s in grid] for name in clean}
        chosen = int(np.argmax(scores["training"]))
        rows[who] = [scores[name][chosen] for name in names], [max(scores[name]) for name in names]
    for k, how in enumerate(("strength of the training patches", "best strength for the test")):
        print(how)
        for who, row in rows.items():
            print(f"  {who:32s}" + "".join(f"{value:18.2f}" for value in row[k]))
        best = np.max([row[k] for who, row in rows.items() if who != "learned"], axis=0)
        gain = np.subtract(rows["learned"][k], best)
        print(f"  {'learned - best total variation':32s}" + "".join(f"{value:+18.2f}" for value in gain), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--patches", type=int, default=6, help="of each photograph at each scale")
    parser.add_argument("--size", type=int, default=36)
    parser.add_argument("--scales", type=int, nargs="+", default=[1, 2, 3], help="of the patches: every k-th pixel")
    parser.add_argument("--noise", type=float, default=0.1)
    parser.add_argument("--every", type=int, default=2, help="pixel of the test pictures; 1: at their full size")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    images, portrait = photographs()
    every = options.every
    halves = [image[::every, ::every][: 426 // every] for image in images]
    clean = {
        "held-out halves": np.array([half[:, half.shape[1] // 2 :] for half in halves]),
        "portrait": portrait[None, ::every, ::every],
        "training": training(images, options.scales, options.patches, options.size, rng),
    }
    noisy = {name: (a + options.noise * rng.normal(size=a.shape)).astype(np.float32) for name, a in clean.items()}
    problem = DenoisingTuning(noisy["training"], clean["training"])
    begin, busy = time.perf_counter(), time.process_time()

    def tell(state: bilevel.State) -> None:
        if state.step % 10 == 0:
            print(f"step {state.step}: PSNR {-10 * np.log10(2 * state.value):.3f} on the training patches", flush=True)

    found = bilevel.minimize(problem, *problem.initial(), max_steps=options.steps, tol=1e-7, rtol=0.2, callback=tell)
    print(
        f"{found.x.size} hyperparameters, {problem.clean.size} pixels, {found.hypergradients} hypergradients: "
        f"{time.perf_counter() - begin:.0f} s ({time.process_time() - busy:.0f} s of processor)"
    )
    level = 1.5 * np.log(options.noise / 0.1)  # of the best strengths, about
    learned = lambda s, images: np.asarray(problem.denoise(found.x.at[:, 0].add(s), images))
    denoisers = {
        "total variation, anisotropic": (anisotropic, level + np.linspace(-3.1, -2.7, 5)),
        "total variation, isotropic": (isotropic, level + np.linspace(-2.9, -2.5, 5)),
        "learned": (learned, np.linspace(-0.05, 0.15, 5)),
    }
    compare(denoisers, noisy, clean)


if __name__ == "__main__":
    main()
