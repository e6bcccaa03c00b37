"""How much XLA optimizes: where a program is compiled for little data, compiling it is most of the work.

With XLA's CPU backend a program of this library takes some seconds to compile, most of them in LLVM's optimizations.
Without these it is there in a quarter of the time, and runs as fast where time goes into products and factorizations
of matrices, at half the speed or less where it goes into functions of single entries.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jax import lax

_OPTIONS: dict[str, Any] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,  # each fused loop else sets up a compiler of its own
    "xla_cpu_parallel_codegen_split_count": 4,
}

_quick: contextvars.ContextVar[bool] = contextvars.ContextVar("quick", default=False)


@contextlib.contextmanager
def quickly(yes: bool = True):
    """Outer loops inside compile their programs with little optimization, a setting of the thread, as contexts are, and
    use one thread of BLAS."""
    token = _quick.set(yes)
    try:
        with one_thread(yes):
            yield
    finally:
        _quick.reset(token)


@contextlib.contextmanager
def one_thread(yes: bool = True):
    """BLAS inside has one thread, for factorizations that are small beside making the matrix: several wait for each
    other, and where another process holds a core much longer than they compute. What is computed inside must be ready
    before the end."""
    blas = _blas() if yes else None
    with contextlib.nullcontext() if blas is None else blas.limit(limits=1, user_api="blas"):
        yield


@functools.cache
def _blas() -> Any:
    """What sets the number of threads, where it is installed (scikit-learn brings it)."""
    if importlib.util.find_spec("threadpoolctl") is None:
        return None
    import scipy.linalg  # noqa: F401  (loads the BLAS that XLA calls: only what is loaded is found)
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def asked_quickly() -> bool:
    """Whether this is inside `quickly`."""
    return _quick.get()


@functools.cache
def options(backend: str) -> dict[str, Any] | None:
    """The options under which this backend compiles quickly, those of them that this XLA knows; None: none."""
    if backend != "cpu":
        return None
    known = {}
    for name, value in _OPTIONS.items():
        with contextlib.suppress(Exception):  # whatever a later XLA raises for an option that is gone
            jax.jit(lambda: 0).lower().compile(compiler_options={name: value})
            known[name] = value
    return known or None


def compiled(function: Callable) -> Callable:
    """`eqx.filter_jit`, with the options of `quickly` inside it."""
    fully = eqx.filter_jit(function)
    with_options: dict[str, Callable] = {}

    @functools.wraps(function)
    def call(*args):
        backend = jax.default_backend()
        known = options(backend) if asked_quickly() else None
        if known is None:
            return fully(*args)
        if backend not in with_options:
            jit: Any = eqx.filter_jit  # hands on what it does not know itself
            with_options[backend] = jit(function, compiler_options=known)
        return with_options[backend](*args)

    return call


def held(function: Any, *arguments: Any) -> tuple:
    """`(function, *arguments)`, the same, for a call in the body of a loop: arrays that do not change in the loop are
    tied to the arguments, which do. Otherwise XLA moves what is computed from them alone out of the loop, once for
    each place that needs it, and then no longer sees that what is computed from these copies is the same."""
    arrays, rest = eqx.partition((function, arguments), eqx.is_array)
    function, arguments = eqx.combine(lax.optimization_barrier(arrays), rest)
    return function, *arguments
