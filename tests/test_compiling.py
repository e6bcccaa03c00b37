"""What is compiled quickly is the same program; what is called back on the host keeps its digits."""

import threading
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from bilevel import BilevelProblem, Minimization, _compiling, _oracle, solvers
from bilevel._compiling import compiled, options, quickly


@pytest.fixture
def asked(monkeypatch):
    """The compiler options that `eqx.filter_jit` was given."""
    seen = []
    plain = _compiling.eqx.filter_jit

    def spy(function, **more):
        seen.append(more.get("compiler_options"))
        return plain(function, **more)

    monkeypatch.setattr(_compiling.eqx, "filter_jit", cast(Any, spy))
    return seen


def test_quickly_is_a_setting_of_the_thread_and_ends_with_its_block(asked):
    double = compiled(lambda x: 2 * x)
    assert asked == [None]
    with quickly():
        assert double(jnp.ones(3)).sum() == 6
        found = []
        thread = threading.Thread(target=lambda: found.append(_compiling._quick.get()))
        thread.start()
        thread.join()
        assert found == [False]
        double(jnp.ones(3))
    double(jnp.ones(3))
    kinds = [None, options("cpu")] if jax.default_backend() == "cpu" else [None]
    assert asked == kinds  # one program of each kind, whatever is called how often
    assert options("cpu") is not None, "this XLA no longer knows the options"


def test_outer_loops_factorize_small_matrices_with_one_thread(monkeypatch):
    info = pytest.importorskip("threadpoolctl").threadpool_info
    threads = lambda: [pool["num_threads"] for pool in info() if pool["user_api"] == "blas"]
    before, during = threads(), []
    plain = _oracle._evaluate

    def spy(*arguments):
        during.append(threads())
        return plain(*arguments)

    monkeypatch.setattr(_oracle, "_evaluate", spy)
    inner = Minimization(lambda x, y: jnp.sum((y - x) ** 2) + jnp.sum(y**4))
    bilevel.minimize(BilevelProblem(inner, lambda x, y: jnp.sum((y - 1) ** 2)), jnp.zeros(2), jnp.zeros(2), max_steps=1)
    assert during[0]  # the one that XLA calls is loaded by then
    assert all(number == 1 for found in during for number in found)
    assert threads()[: len(before)] == before


def test_options_that_xla_does_not_know_are_left_out(asked, monkeypatch):
    known = {"xla_backend_optimization_level": 0}
    monkeypatch.setattr(_compiling, "_OPTIONS", {"xla_no_such_option": True, **known})
    options.cache_clear()
    try:
        assert options("cpu") == known
        monkeypatch.setattr(_compiling, "_OPTIONS", {"xla_no_such_option": True})
        options.cache_clear()
        assert options("cpu") is None
        assert options("gpu") is None
        with quickly():
            assert compiled(lambda x: 2 * x)(jnp.ones(3)).sum() == 6
        assert asked == [None]
    finally:
        options.cache_clear()


def test_minimize_finds_the_same_quickly():
    inner = Minimization(lambda x, y: 0.5 * jnp.sum(jnp.exp(x) * y**2) - jnp.sum(jnp.sin(y)))
    problem = BilevelProblem(inner, lambda x, y: jnp.sum((y - 0.5) ** 2))
    fully = bilevel.minimize(problem, jnp.zeros(3), jnp.ones(3))
    with quickly():
        quick = bilevel.minimize(problem, jnp.zeros(3), jnp.ones(3))
    np.testing.assert_allclose(quick.x, fully.x, rtol=1e-9)


def test_a_host_solver_keeps_double_precision_where_only_the_callers_thread_has_it():
    A = np.diag([1.0, 2.0, 3.0])
    given = []

    def solve(x, y0):
        given.append((x.dtype, y0.dtype))
        return np.linalg.solve(A, x / 3)

    jax.config.update("jax_enable_x64", False)
    try:
        with jax.enable_x64(True):
            inner = Minimization(lambda x, y: 0.5 * y @ jnp.asarray(A) @ y - x @ y / 3)
            x = jnp.asarray([1.0, 1.0, 1.0], jnp.float64)
            find = lambda x: solvers.Host(solve).find(inner, x, x, tol=jnp.zeros(()), max_steps=1).y
            found, again, batch = find(x), jax.jit(find)(x), jax.vmap(find)(x[None])
            exact = np.linalg.solve(A, np.ones(3) / 3)
            for y in (found, again, batch[0]):
                np.testing.assert_allclose(np.asarray(y), exact, rtol=1e-15)
                assert y.dtype == jnp.float64
    finally:
        jax.config.update("jax_enable_x64", True)
    assert set(given) == {(np.dtype("float64"), np.dtype("float64"))}
