"""Checkpoints of `minimize`: every evaluation so far, in one .npz written atomically, without pickle."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from ._oracle import Evaluation
from ._trees import closed_over

_FORMAT = "bilevel-minimize-2"


def fingerprint(problem: PyTree, x0: PyTree, y0: PyTree, bounds: PyTree, method: Any) -> str:
    """What a checkpoint belongs to: the problem's leaves (and the arrays its functions close over), x0, y0, bounds,
    method. Equal in another process with the same arguments."""
    digest = hashlib.sha256()

    def add(*items):
        for item in items:
            if isinstance(item, str):
                digest.update(item.encode())
            elif eqx.is_array_like(item):
                array = np.ascontiguousarray(item)
                digest.update(f"{array.shape}{array.dtype}".encode())
                digest.update(array.tobytes())

    for tree in (problem, x0, y0, bounds):
        add(*jax.tree.leaves(tree), "|")
    add(type(problem).__qualname__)
    for owner, name in ((getattr(problem, "inner", None), "objective"), (problem, "outer")):
        function = getattr(owner, name, None)
        add(getattr(function, "__qualname__", ""))
        for variable, value in sorted(closed_over(function).items()):
            add(variable, value)
    if isinstance(method, str):
        add(method)
    else:  # an optax optimizer is known by what it does
        state = method.init(x0)
        try:
            with jax.numpy_dtype_promotion("standard"):
                update, _ = method.update(jax.tree.map(lambda a: a + 1, x0), state, x0)
            add(*jax.tree.leaves(update))
        except TypeError:  # needs more than a gradient
            pass
        add("optax", *jax.tree.leaves(state))
    return digest.hexdigest()


def write(path: Path, mark: str, evaluations: list[Evaluation]) -> None:
    """Replaces the file in one step: a reader, or a restart, sees the old one or the new one."""
    stacked = {f"e_{name}": np.stack([getattr(e, name) for e in evaluations]) for name in Evaluation._fields}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            arrays: dict[str, Any] = {"format": np.array(_FORMAT), "mark": np.array(mark), **stacked}
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read(path: Path, mark: str) -> list[Evaluation]:
    """The evaluations in the file, [] where there is none. ValueError, and the file untouched, if it is not ours."""
    for leftover in path.parent.glob(f"{path.name}*.part"):
        leftover.unlink(missing_ok=True)
    if not path.exists():
        return []
    foreign = f"bilevel.minimize: checkpoint {str(path)!r}"
    try:
        with np.load(path, allow_pickle=False) as data:
            if str(data["format"]) != _FORMAT:
                raise ValueError("another format")
            found = str(data["mark"])
            columns = [data[f"e_{name}"] for name in Evaluation._fields]
    except Exception as error:
        raise ValueError(f"{foreign} is no checkpoint of bilevel.minimize ({error}); it was left untouched.") from error
    if found != mark:
        raise ValueError(
            f"{foreign} belongs to another problem, start, bounds or method; it was left untouched. Pass another path, "
            "or remove it to start afresh."
        )
    rows = zip(*columns, strict=True)
    return [Evaluation(x, float(v), g, float(e), y, a, bool(f), float(s)) for x, v, g, e, y, a, f, s in rows]
