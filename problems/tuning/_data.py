"""Data as people hand them over: checked where they are concrete, with errors that name the argument."""

from __future__ import annotations

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def features(owner: str, name: str, X: Any, *, columns: int | None = None) -> Array:
    """X as an array of shape (n, p), n and p at least 1: floating dtypes are kept, integers and booleans converted.

    Raises ValueError for anything else: another number of axes, another number of `columns`, a sparse matrix,
    entries that are not real numbers, NaN, infinity.
    """
    if hasattr(X, "toarray"):
        raise ValueError(f"{owner}: `{name}` is a sparse matrix; this model needs a dense one, {name}.toarray().")
    array = real(owner, name, X)
    if array.ndim != 2:
        hint = f"; one feature is {name}[:, None]" if array.ndim == 1 else ""
        raise ValueError(f"{owner}: `{name}` must have shape (rows, features), found shape {array.shape}{hint}.")
    if array.size == 0:
        raise ValueError(f"{owner}: `{name}` is empty, its shape is {array.shape}.")
    if columns is not None and array.shape[1] != columns:
        raise ValueError(f"{owner}: `{name}` has {array.shape[1]} features, but `X` has {columns}.")
    return array


def targets(owner: str, name: str, y: Any, X_name: str, X: Array) -> Array:
    """y as an array of shape (n,) in X's dtype, one entry per row of X; raises ValueError for anything else."""
    array = real(owner, name, y)
    if array.ndim != 1:
        raise ValueError(f"{owner}: `{name}` must have one axis, found shape {array.shape}.")
    if array.shape[0] != X.shape[0]:
        raise ValueError(f"{owner}: `{X_name}` has {X.shape[0]} rows, but `{name}` has {array.shape[0]} entries.")
    return array.astype(X.dtype)


def real(owner: str, name: str, values: Any) -> Array:
    """Values as a floating array of any shape; raises ValueError for what is not real or not finite."""
    if isinstance(values, jax.core.Tracer):  # shapes are known, entries are not
        return values if jnp.issubdtype(values.dtype, jnp.floating) else values.astype(float)
    array = values if isinstance(values, jax.Array) else np.asarray(values)
    if jnp.issubdtype(array.dtype, jnp.integer) or array.dtype == bool:
        return jnp.asarray(array, float)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{owner}: `{name}` must hold real numbers, found dtype {array.dtype}.")
    finite = np.isfinite(np.asarray(array))
    if not finite.all():
        first = tuple(int(i) for i in np.argwhere(~finite)[0])
        where = first[0] if len(first) == 1 else first
        raise ValueError(
            f"{owner}: `{name}` has {int((~finite).sum())} entries that are NaN or infinite, the first at {where}."
        )
    return jnp.asarray(array)
