"""What every test stands on. Imports neither bilevel nor problems: jaxtyping's hook has to see them first."""

import gc
import os
import zlib
from collections.abc import Callable

import jax
import pytest
from hypothesis import HealthCheck, settings

# Tests only: the library itself never touches a JAX setting. Tests of float32 say so in their dtypes.
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Compiling is most of what the suite does, and nothing here is timed. Read when the first computation starts.
_flags = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if jax.__version_info__ < (0, 11):  # halves it again; a flag that a later XLA does not know would end the process
    _flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(_flags))

# Figures are drawn to files; no test needs a display.
os.environ.setdefault("MPLBACKEND", "Agg")

# CI=true: the same examples in every run. HYPOTHESIS_MAX_EXAMPLES=1000: a longer search.
settings.register_profile(
    "bilevel",
    deadline=None,  # the first example of a test compiles
    derandomize=bool(os.environ.get("CI")),
    max_examples=int(os.environ.get("HYPOTHESIS_MAX_EXAMPLES", "20")),
    suppress_health_check=[HealthCheck.too_slow],  # drawing the first arrays compiles too
    print_blob=True,
)
settings.load_profile("bilevel")


@pytest.fixture
def getkey(request: pytest.FixtureRequest) -> Callable[[], jax.Array]:
    """``getkey()`` is a new PRNG key at each call; a test gets the same ones in every run, in any order.

    Under ``@given`` draw a seed from hypothesis instead, which can then shrink it.
    """
    key = jax.random.key(zlib.crc32(request.node.nodeid.encode()))
    count = iter(range(1_000_000))
    return lambda: jax.random.fold_in(key, next(count))


def pytest_collection_finish() -> None:
    """What is imported by now stays: the garbage collector need not walk through it, nor after every few objects of
    a trace (a tenth of the suite's time otherwise)."""
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)


_since_cleared = 0


@pytest.fixture(autouse=True)
def _few_programs_alive():
    """Drops compiled programs now and then: each holds memory maps, of which a process may have some ten thousands."""
    global _since_cleared
    yield
    _since_cleared += 1
    if _since_cleared >= 12:
        _since_cleared = 0
        jax.clear_caches()
