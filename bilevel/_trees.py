"""Trees of arrays: flat coordinates, norms, and the checks every entry point makes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree


def is_traced(*trees: PyTree) -> bool:
    """Whether any leaf is a tracer."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


def path_name(path) -> str:
    """A leaf's path, as a person writes it: `['a'][0]`, or `the only leaf`."""
    return jax.tree_util.keystr(path) or "the only leaf"


def float_tree(tree: PyTree, function: str, argument: str, *, empty: bool = False) -> PyTree:
    """The tree with array leaves; raises unless all are real floating arrays (and, unless `empty`, not all empty).

    Python floats become arrays of the default floating dtype.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    arrays = []
    for path, leaf in leaves:
        where = f"bilevel.{function}: argument `{argument}`, leaf {path_name(path)}"
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, float, int, bool, complex)):
            raise TypeError(f"{where}: expected a floating array, found {type(leaf).__name__}.")
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"{where}: expected a floating dtype, found {dtype}; convert it, for example with "
                f"jnp.asarray({argument}, float)."
            )
        if jnp.finfo(dtype).bits < 32:
            raise ValueError(f"{where}: float32 and float64 are supported, found {dtype}; convert it.")
        arrays.append(leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf))
    if not empty and sum(a.size for a in arrays) == 0:
        raise ValueError(f"bilevel.{function}: argument `{argument}` is empty: there is nothing to solve for.")
    return jax.tree.unflatten(structure, arrays)


def check_like(tree: PyTree, reference: PyTree, function: str, argument: str, meaning: str) -> None:
    """Raises ValueError unless `tree` has the structure and the shapes of `reference`, and floating leaves."""
    got, want = jax.tree.structure(tree), jax.tree.structure(reference)
    if got != want:
        raise ValueError(
            f"bilevel.{function}: {argument} must have the structure of {meaning}: expected {want}, found {got}."
        )
    pairs = zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(reference), strict=True)
    for (path, a), b in pairs:
        if jnp.shape(a) != jnp.shape(b):
            raise ValueError(
                f"bilevel.{function}: {argument}, leaf {path_name(path)}: expected the shape {jnp.shape(b)} of "
                f"{meaning}, found {jnp.shape(a)}."
            )
        if not jnp.issubdtype(jnp.result_type(a), jnp.floating):
            raise ValueError(
                f"bilevel.{function}: {argument}, leaf {path_name(path)}: expected a floating dtype, found "
                f"{jnp.result_type(a)}."
            )


def non_finite(tree: PyTree) -> str | None:
    """The path and count of the first leaf with NaN or infinity, or None. Concrete leaves only."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, (jax.Array, np.ndarray)) and not isinstance(leaf, jax.core.Tracer):
            if jnp.issubdtype(leaf.dtype, jnp.inexact):
                bad = int(leaf.size - np.isfinite(np.asarray(leaf)).sum())
                if bad:
                    return f"leaf {path_name(path)} has {bad} of {leaf.size} entries NaN or infinite"
    return None


def closed_over(function: Any) -> dict[str, Any]:
    """The arrays a plain Python function closes over, by variable name (one level: enough for a message)."""
    function = getattr(function, "__func__", function)
    cells = getattr(function, "__closure__", None) or ()
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    found = {}
    for name, cell in zip(names, cells, strict=False):
        try:
            found[name] = cell.cell_contents
        except ValueError:
            continue
    return {name: value for name, value in found.items() if isinstance(value, (jax.Array, np.ndarray))}


def ravel(tree: PyTree) -> tuple[jax.Array, Callable[[Any], PyTree]]:
    """A tree of floating arrays as one vector of their common dtype, and the way back (to each leaf's own dtype; of
    NumPy arrays to NumPy arrays)."""
    leaves, structure = jax.tree.flatten(tree)
    shapes = [jnp.shape(leaf) for leaf in leaves]
    dtypes = [jnp.result_type(leaf) for leaf in leaves]
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*dtypes) if dtypes else jnp.result_type(float)
    bounds = np.cumsum([0] + [int(np.prod(shape)) for shape in shapes])

    def unravel(flat):
        parts = [
            flat[start:stop].reshape(shape).astype(own)
            for start, stop, shape, own in zip(bounds[:-1], bounds[1:], shapes, dtypes, strict=True)
        ]
        return jax.tree.unflatten(structure, parts)

    return ravel_like(tree, dtype), unravel


def ravel_like(tree: PyTree, dtype) -> jax.Array:
    """A tree as one vector of the given dtype."""
    leaves = jax.tree.leaves(tree)
    if not leaves:
        return jnp.zeros((0,), dtype)
    if len(leaves) == 1:
        return jnp.asarray(leaves[0]).reshape(-1).astype(dtype)
    return jnp.concatenate([jnp.asarray(leaf).reshape(-1).astype(dtype) for leaf in leaves])


def on_host(tree: PyTree, dtype) -> np.ndarray:
    """`ravel_like` of a concrete tree, in NumPy: no dispatch for each leaf."""
    leaves = jax.tree.leaves(tree)
    return np.concatenate([np.asarray(leaf, dtype).ravel() for leaf in leaves]) if leaves else np.zeros(0, dtype)


@functools.partial(jax.jit, static_argnums=0)
def _called(fixed, arrays, arguments):
    return _assembled(fixed, arrays)(*arguments)


def _assembled(fixed, arrays):
    structure, others = fixed
    left = iter(arrays)
    return jax.tree.unflatten(structure, [next(left) if leaf is _ARRAY else leaf for leaf in others])


_ARRAY = object()


def shapes_of(function: Any, *arguments: PyTree) -> PyTree:
    """The shapes and dtypes of `function(*arguments)`, traced once for all functions that differ in their arrays only.

    `jax.eval_shape` looks for earlier traces by comparing functions, which for two with traced arrays in them has no
    answer.
    """
    leaves, structure = jax.tree.flatten(function)
    others = tuple(_ARRAY if eqx.is_array(leaf) else leaf for leaf in leaves)
    return _called.trace((structure, others), [a for a in leaves if eqx.is_array(a)], arguments).out_info


def norm(tree: PyTree) -> jax.Array:
    """The Euclidean norm over all leaves, without overflow, in the common dtype."""
    flat, _ = ravel(tree)
    if flat.size == 0:
        return jnp.zeros((), flat.dtype)
    scale = jnp.max(jnp.abs(flat))
    safe = jnp.where((scale > 0) & jnp.isfinite(scale), scale, jnp.ones_like(scale))
    return jnp.sqrt(jnp.sum(jnp.square(flat / safe))) * safe


def all_finite(tree: PyTree) -> jax.Array:
    """Whether every entry of every floating leaf is finite."""
    flags = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree) if eqx.is_inexact_array(leaf)]
    return jnp.all(jnp.stack(flags)) if flags else jnp.asarray(True)


def add(a: PyTree, b: PyTree) -> PyTree:
    """a + b, leaf by leaf, in a's dtypes."""
    return jax.tree.map(lambda p, q: p + q.astype(p.dtype), a, b)


def subtract(a: PyTree, b: PyTree) -> PyTree:
    """a - b, leaf by leaf, in a's dtypes."""
    return jax.tree.map(lambda p, q: p - q.astype(p.dtype), a, b)


def where(condition, yes: PyTree, no: PyTree) -> PyTree:
    """Elementwise choice between two trees by one scalar condition."""
    return jax.tree.map(lambda p, q: jnp.where(condition, p, q), yes, no)


def coarsest(*arguments) -> float:
    """The machine precision of the coarsest floating dtype among the leaves: round-off of the whole computation."""
    return max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(arguments))
