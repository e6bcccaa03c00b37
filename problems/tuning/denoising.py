"""Learned regularization: a denoiser whose filters and weights are hyperparameters."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

import bilevel

from . import _data


class Denoiser(bilevel.AbstractMinimization):
    """Minimize over images u, given noisy ones b,

        1/2 |u - b|^2 + sum_k exp(w_k) sum over pixels of sqrt(delta^2 + (f_k * u)^2),

    f_k * u the correlation with filter k, as large as the image, which is reflected at its edges: without that the
    outermost pixels would be in fewer answers than the others and keep their noise. Strictly convex, Hessian >= I.
    """

    noisy: Float[Array, "b h w"]
    basis: Float[Array, "s s m"]
    delta: Float[Array, ""]

    def objective(self, x: Float[Array, "k c"], y: Float[Array, "b h w"]) -> Float[Array, ""]:
        """The objective, summed over images."""
        size, (_, height, width) = self.basis.shape[0], y.shape
        filters = jnp.einsum("km,stm->kst", x[:, 1:], self.basis).reshape(len(x), size * size)
        sides = ((size - 1) // 2, size // 2)
        around = jnp.pad(y, ((0, 0), sides, sides), mode="symmetric")
        # one product of matrices: XLA's convolutions of float64 on a CPU take three times as long and more
        near = [around[:, i : i + height, j : j + width].reshape(-1) for i in range(size) for j in range(size)]
        answers = filters @ jnp.stack(near)
        roughness = jnp.sum(jnp.sqrt(self.delta**2 + jnp.square(answers)), axis=1)
        return 0.5 * jnp.sum(jnp.square(y - self.noisy)) + jnp.vdot(jnp.exp(x[:, 0]), roughness)

    def objective_at(self, x, y):
        return self.objective(x, y)

    def check(self, x, y):
        columns = 1 + self.basis.shape[2]
        if jnp.ndim(x) != 2 or jnp.shape(x)[1] != columns:
            raise ValueError(f"the hyperparameters x must have shape (filters, {columns}), found {jnp.shape(x)}.")
        if jnp.shape(y) != self.noisy.shape:
            raise ValueError(f"the images y must have shape {self.noisy.shape}, found {jnp.shape(y)}.")
        super().check(x, y)

    def initial(self):
        """The noisy images."""
        return self.noisy


class DenoisingTuning(bilevel.AbstractBilevelProblem):
    """Filters and weights of a variational denoiser, learned from pairs of noisy and clean images.

    Inner: images y that minimize, given noisy images b,

        1/2 |y - b|^2 + sum_k exp(w_k) sum over pixels of sqrt(delta^2 + (f_k * y)^2),

    the image reflected at its edges. Outer: half the mean squared error to the clean images, over all pixels. Row k of
    x, shape (filters, size^2), holds w_k and the coefficients of f_k in the basis of discrete cosines of size x size
    without the constant one, so that filters ignore the brightness. With the defaults these are 24 filters of 5 x 5,
    600 hyperparameters.

    **Arguments:** `noisy`, `clean`: shape (images, height, width), or (height, width) for one. `filters`: their
    number, at most size^2 - 1 of them start different (as the cosines themselves); `size`: of each, at least 2;
    `delta`: what rounds the kink, in units of the pixels; learning makes filters larger where it should be smaller.

    y has the shape of the images, (images, height, width).

    **Raises:** ValueError naming the argument: shapes that differ, images smaller than a filter, NaN, numbers out of
    range.
    """

    noisy: Float[Array, "b h w"]
    clean: Float[Array, "b h w"]
    basis: Float[Array, "s s m"]
    delta: Float[Array, ""]
    filters: int = eqx.field(static=True)

    def __init__(self, noisy: Any, clean: Any, *, filters: int | None = None, size: int = 5, delta: float = 5e-3):
        owner = "DenoisingTuning"
        if not (isinstance(size, int) and size >= 2):
            raise ValueError(f"{owner}: `size` must be an integer of at least 2, found {size!r}.")
        filters = size * size - 1 if filters is None else filters
        if not (isinstance(filters, int) and filters >= 1):
            raise ValueError(f"{owner}: `filters` must be an integer of at least 1, found {filters!r}.")
        if not float(delta) > 0:
            raise ValueError(f"{owner}: `delta` must be positive, found {delta!r}.")
        self.noisy = _images(owner, "noisy", noisy, size)
        self.clean = _images(owner, "clean", clean, size).astype(self.noisy.dtype)
        if self.noisy.shape != self.clean.shape:
            raise ValueError(f"{owner}: `noisy` has shape {self.noisy.shape}, but `clean` has {self.clean.shape}.")
        self.basis = jnp.asarray(_cosines(size), self.noisy.dtype)
        self.delta = jnp.asarray(delta, self.noisy.dtype)
        self.filters = filters

    @property
    def inner(self) -> Denoiser:
        """The denoising of all images at once."""
        return Denoiser(self.noisy, self.basis, self.delta)

    def outer(self, x: ArrayLike, y: ArrayLike) -> Float[Array, ""]:
        """Half the mean squared error to the clean images."""
        return 0.5 * jnp.mean(jnp.square(jnp.asarray(y) - self.clean))

    def initial(self) -> tuple[Array, Array]:
        """`(x0, y0)`: the cosines themselves, each with a weight of exp(-5), and the noisy images."""
        count = self.basis.shape[2]
        rows = np.arange(self.filters) % count
        x = np.concatenate([np.full((self.filters, 1), -5.0), np.eye(count)[rows]], axis=1)
        return jnp.asarray(x, self.noisy.dtype), self.noisy

    def denoise(self, x: ArrayLike, image: Any) -> Float[Array, "..."]:
        """An image (height, width), or several (images, height, width), denoised at x. Raises
        `bilevel.NotConverged`."""
        owner = "DenoisingTuning.denoise"
        images = _images(owner, "image", image, self.basis.shape[0]).astype(self.noisy.dtype)
        inner = Denoiser(images, self.basis, self.delta)
        y = bilevel.solve(inner, jnp.asarray(x, images.dtype), images, rtol=1e-5).y
        return y.reshape(jnp.shape(image))


def _images(owner: str, name: str, images: Any, size: int) -> Array:
    array = _data.real(owner, name, images)
    if array.ndim not in (2, 3) or array.size == 0:
        raise ValueError(f"{owner}: `{name}` must have shape (images, height, width), found {array.shape}.")
    if min(array.shape[-2:]) < size:
        raise ValueError(f"{owner}: `{name}` has images of {array.shape[-2:]}, smaller than a filter of {size}.")
    return array[None] if array.ndim == 2 else array


def _cosines(size: int) -> np.ndarray:
    """The orthonormal products of discrete cosines (type II) without the constant, shape (size, size, size^2 - 1)."""
    place = np.arange(size)
    one = np.cos(np.pi * (place[:, None] + 0.5) * place[None, :] / size) * np.sqrt(2 / size)
    one[:, 0] /= np.sqrt(2)
    both = np.einsum("ia,jb->ijab", one, one).reshape(size, size, size * size)
    return both[:, :, 1:]
