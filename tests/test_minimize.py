"""The outer loop: where it ends, what it costs, and that a killed run goes on as if nothing had happened."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel

RNG = np.random.default_rng(3)
A, B = jnp.asarray(RNG.normal(size=(60, 6))), jnp.asarray(np.sign(RNG.normal(size=60)))
A_VAL, B_VAL = jnp.asarray(RNG.normal(size=(60, 6))), jnp.asarray(np.sign(RNG.normal(size=60)))


def train(x, y):
    return jnp.mean(jax.nn.softplus(-B * (A @ y))) + jnp.sum(jnp.exp(x) * y**2) / 12


def validate(x, y):
    return jnp.mean(jax.nn.softplus(-B_VAL * (A_VAL @ y))) + 1e-3 * jnp.sum(x**2)


PROBLEM = bilevel.BilevelProblem(bilevel.Minimization(train), validate)
X0, Y0 = jnp.full(6, -1.0), jnp.zeros(6)


def true_gradient(x):
    return bilevel.hypergradient(PROBLEM, x, Y0, rtol=1e-9, atol=1e-12).gradient


@pytest.fixture(scope="module")
def usual():
    return bilevel.minimize(PROBLEM, X0, Y0, tol=1e-8)


def test_it_ends_at_a_stationary_point(usual):
    assert usual.converged
    assert float(jnp.abs(true_gradient(usual.x)).max()) <= 1e-7
    assert usual.history[0].step == 0
    assert [s.step for s in usual.history] == list(range(len(usual.history)))
    assert usual.history[-1].value <= usual.history[0].value
    assert "converged=True" in repr(usual)


def test_newton_cg_and_proximal_gradient_agree(usual):
    newton = bilevel.minimize(PROBLEM, X0, Y0, method="newton-cg", tol=1e-8)
    assert newton.converged
    np.testing.assert_allclose(newton.x, usual.x, atol=1e-4)
    assert newton.steps <= usual.steps
    free = bilevel.minimize(PROBLEM, X0, Y0, prox=lambda x, t: x, tol=1e-6)
    assert free.converged
    np.testing.assert_allclose(free.value, usual.value, atol=1e-8)


def test_a_penalty_by_its_prox_gives_exact_zeros():
    def soft(x, t):
        return jnp.sign(x) * jnp.maximum(jnp.abs(x) - 0.002 * t, 0)

    result = bilevel.minimize(PROBLEM, X0, Y0, prox=soft, tol=1e-6)
    assert result.converged
    gradient = true_gradient(result.x)
    zero = np.asarray(result.x) == 0
    assert np.all(np.abs(gradient[zero]) <= 0.002 + 1e-6)
    np.testing.assert_allclose(gradient[~zero], -0.002 * jnp.sign(result.x)[~zero], atol=1e-5)


def test_bounds_hold_and_the_projected_gradient_vanishes():
    result = bilevel.minimize(PROBLEM, X0, Y0, bounds=(-1.5, jnp.full(6, 0.5)), tol=1e-8)
    assert result.converged
    assert np.all((np.asarray(result.x) >= -1.5) & (np.asarray(result.x) <= 0.5))
    step = jnp.clip(result.x - true_gradient(result.x), -1.5, 0.5) - result.x
    assert float(jnp.abs(step).max()) <= 1e-6


def test_optax_optimizers_descend_to_the_same_point(usual):
    result = bilevel.minimize(PROBLEM, X0, Y0, method=optax.adam(0.3), max_steps=150, tol=1e-4)
    np.testing.assert_allclose(result.value, usual.value, atol=1e-3)


def test_max_steps_is_a_result_not_an_exception():
    result = bilevel.minimize(PROBLEM, X0, Y0, max_steps=2)
    assert not result.converged
    assert "max_steps" in result.message
    assert result.steps == 2


@pytest.mark.parametrize("method", ["l-bfgs-b", "trust-region", "newton-cg", "adam"])
def test_a_callback_ends_it(method):
    def callback(state):
        if state.step == 2:
            raise StopIteration

    method = optax.adam(0.1) if method == "adam" else method
    result = bilevel.minimize(PROBLEM, X0, Y0, method=method, callback=callback)
    assert result.steps == len(result.history) - 1 == 2
    assert not result.converged
    assert result.message.startswith("the callback ended it with a projected gradient of ")


@pytest.mark.long
def test_the_accuracy_follows_the_outer_steps(usual):
    """Cold inner solves at a fixed 1e-8 tolerance cost at least three times the inner gradients for the same value."""
    evaluations = 0

    def cold(x):
        nonlocal evaluations
        found = bilevel.solvers.Jaxopt().find(PROBLEM.inner, x, Y0, tol=jnp.asarray(1e-8), max_steps=500)
        evaluations += int(found.evaluations) // 2  # it counts value and gradient apart
        hg = bilevel.estimate(PROBLEM, x, found.y, bilevel.ImplicitAdjoint(correction=None))
        return float(hg.value), np.asarray(hg.gradient)

    import scipy.optimize as so

    out = so.minimize(
        cold, np.asarray(X0), jac=True, method="L-BFGS-B", options={"gtol": 1e-6, "ftol": 0, "maxcor": 20}
    )
    ours = bilevel.minimize(PROBLEM, X0, Y0, tol=1e-6)
    assert abs(ours.value - out.fun) <= 1e-9
    assert ours.evaluations * 3 <= evaluations


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="unknown method"):
        bilevel.minimize(PROBLEM, X0, Y0, method="sgd")
    with pytest.raises(TypeError, match="method"):
        bilevel.minimize(PROBLEM, X0, Y0, method=3)
    with pytest.raises(ValueError, match="lower <= upper"):
        bilevel.minimize(PROBLEM, X0, Y0, bounds=(1.0, -1.0))
    with pytest.raises(ValueError, match="tol"):
        bilevel.minimize(PROBLEM, X0, Y0, tol=-1.0)
    with pytest.raises(ValueError, match="y0"):
        bilevel.minimize(PROBLEM, X0, jnp.zeros((0,)))


def test_a_checkpoint_resumes_and_calls_back_for_new_steps_only(tmp_path, usual):
    class Stop(Exception):
        pass

    def stop(state):
        if state.step == 3:
            raise Stop

    path = tmp_path / "run.npz"
    with pytest.raises(Stop):
        bilevel.minimize(PROBLEM, X0, Y0, tol=1e-8, checkpoint=path, callback=stop)
    seen = []
    result = bilevel.minimize(PROBLEM, X0, Y0, tol=1e-8, checkpoint=path, callback=lambda s: seen.append(s.step))
    np.testing.assert_allclose(result.x, usual.x, rtol=0, atol=1e-9)
    assert seen[0] == 4
    assert len(result.history) == len(usual.history)


def test_a_foreign_checkpoint_is_refused_untouched(tmp_path):
    path = tmp_path / "run.npz"
    bilevel.minimize(PROBLEM, X0, Y0, max_steps=2, checkpoint=path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="belongs to another problem"):
        bilevel.minimize(PROBLEM, X0, Y0, max_steps=2, checkpoint=path, bounds=(-1.0, 1.0))
    with pytest.raises(ValueError, match="belongs to another problem"):
        bilevel.minimize(PROBLEM, X0, Y0, max_steps=2, checkpoint=path, method=optax.adam(0.1))
    with pytest.raises(ValueError, match="belongs to another problem"):
        bilevel.minimize(PROBLEM, X0 + 1, Y0, max_steps=2, checkpoint=path)
    assert path.read_bytes() == before
    path.write_text("not a checkpoint")
    with pytest.raises(ValueError, match="no checkpoint"):
        bilevel.minimize(PROBLEM, X0, Y0, max_steps=2, checkpoint=path)
    assert path.read_text() == "not a checkpoint"


PROGRAM = """
import sys, time
import jax
jax.config.update("jax_enable_x64", True)
sys.path.insert(0, {tests!r})
from tests import test_minimize as t
import bilevel
print("started", flush=True)
result = bilevel.minimize(
    t.PROBLEM, t.X0, t.Y0, tol=1e-8, checkpoint={path!r}, callback=lambda s: time.sleep({pause})
)
print("x", *[float(a) for a in result.x], flush=True)
"""


@pytest.mark.long
def test_kill_at_random_moments(tmp_path, usual):
    """Killed again and again, it ends at the same x. KILLS=20 for the long version."""
    path = str(tmp_path / "run.npz")
    root = str(pathlib.Path(__file__).parents[1])
    draw = random.Random(0)
    for kill in range(int(os.environ.get("KILLS", "2")) + 1):
        last = kill == int(os.environ.get("KILLS", "2"))
        program = PROGRAM.format(tests=root, path=path, pause=0 if last else 0.15)
        command = [sys.executable, "-c", program]
        with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == "started"
            if last:
                line = process.stdout.read().split()
                assert process.wait() == 0
                np.testing.assert_allclose([float(a) for a in line[1:]], usual.x, rtol=0, atol=1e-9)
            else:
                deadline = time.monotonic() + 120
                while not os.path.exists(path) and time.monotonic() < deadline:
                    time.sleep(0.02)
                time.sleep(draw.uniform(0, 0.8))
                process.send_signal(signal.SIGKILL)


@pytest.mark.long
def test_a_point_on_a_kink_of_h_is_stepped_beside():
    """y* = max(1 - e^x, 0): at x = 0 the weight has just gone, and h has a value but no gradient."""
    inner = bilevel.Composite(lambda x, y: 0.5 * jnp.sum((y - 1) ** 2), bilevel.prox.l1(jnp.exp))
    problem = bilevel.BilevelProblem(inner, lambda x, y: 0.5 * jnp.sum((y + 0.5) ** 2))
    with pytest.raises(bilevel.NotConverged, match="no derivative there"):
        bilevel.hypergradient(problem, jnp.zeros(()), jnp.zeros(1))
    found = bilevel.minimize(problem, jnp.zeros(()), jnp.zeros(1), bounds=(jnp.asarray(-2.0), jnp.asarray(2.0)))
    np.testing.assert_allclose(found.value, 0.125, rtol=1e-5)  # y = 0


def test_a_minimum_at_a_kink_ends_it_soon():
    """L-BFGS-B closes in on a kink of h to the last bit, and begins anew, unless it is stopped there."""
    inner = bilevel.Minimization(lambda x, y: 0.5 * jnp.sum((y - x) ** 2))
    kinked = bilevel.BilevelProblem(inner, lambda x, y: jnp.sum(jnp.abs(y - 0.3)) + 0.3 * y[0] + 0.1 * y[0] ** 2)
    found = bilevel.minimize(kinked, jnp.asarray([2.0]), jnp.zeros(1))
    np.testing.assert_allclose(found.x, [0.3], atol=1e-6)
    assert not found.converged
    assert "kink" in found.message
    assert found.hypergradients < 40


def test_ftol_ends_it_where_the_value_hardly_falls():
    """A valley along whose kink the gradient never vanishes: line searches alone would go on for hundreds of steps."""
    inner = bilevel.Minimization(lambda x, y: 0.5 * jnp.sum((y - x) ** 2))
    outer = lambda x, y: 1 + jnp.abs(y[0] - y[1] ** 2) + 0.1 * (y[1] - 1) ** 2
    problem = bilevel.BilevelProblem(inner, outer)
    start = (jnp.asarray([-1.0, 2.0]), jnp.zeros(2))
    rough = bilevel.minimize(problem, *start, ftol=1e-2)
    fine = bilevel.minimize(problem, *start, ftol=1e-4)
    assert not rough.converged
    assert "ftol" in rough.message
    assert rough.hypergradients <= fine.hypergradients
    values = np.minimum.accumulate([state.value for state in fine.history])
    assert fine.value == values[-1] <= rough.value
    with pytest.raises(ValueError, match="ftol"):
        bilevel.minimize(problem, *start, ftol=-1.0)
    with pytest.raises(ValueError, match="ftol"):
        bilevel.minimize(problem, *start, ftol=1e-3, method="newton-cg")


def identity(outer):
    """y*(x) = x: an outer function of x alone."""
    return bilevel.BilevelProblem(lambda x, y: 0.5 * jnp.sum((y - x) ** 2), lambda x, y: outer(y))


@pytest.mark.parametrize("method", ["trust-region", "l-bfgs-b"])
def test_far_out_a_small_gradient_is_no_convergence(method):
    """Beside a large x a gradient vanishes in round-off of x - gradient."""
    far = bilevel.minimize(identity(lambda y: -5e-5 * y), 1e12, 1e12, method=method, max_steps=5)
    assert not far.converged
    held = bilevel.minimize(identity(lambda y: -y), 1e12, 1e12, method=method, bounds=(0.0, 1e12 + 8))
    assert held.converged
    assert float(held.x) == 1e12 + 8


@pytest.mark.long
def test_without_a_minimum_it_does_not_converge():
    falls = bilevel.minimize(identity(lambda y: -y), 0.0, 0.0, method="trust-region", max_steps=80)
    assert not falls.converged
    bursts = bilevel.minimize(identity(lambda y: -jnp.exp(y)), 1.0, 0.0, method="trust-region", max_steps=80)
    assert not bursts.converged
    assert "unbounded below" in bursts.message


@pytest.mark.long
def test_outer_functions_that_are_not_defined_everywhere():
    edge = identity(lambda y: y - 0.01 * jnp.log(y))
    found = bilevel.minimize(edge, 1.0, 0.0, method="trust-region")  # a step into y <= 0 is refused
    assert found.converged
    np.testing.assert_allclose(found.x, 0.01, rtol=1e-4)
    with pytest.raises(bilevel.NotConverged, match="outer function has NaN or an infinity as its value"):
        bilevel.minimize(edge, 1.0, 0.0)
    with pytest.raises(bilevel.NotConverged, match="outer function"):
        bilevel.hypergradient(edge, -1.0, 0.0)
    with pytest.raises(bilevel.NotConverged, match="outer function"):  # wherever the trust region asks
        bilevel.minimize(identity(lambda y: jnp.where(y == 1, -y, jnp.nan)), 1.0, 1.0, method="trust-region")


@pytest.mark.long
def test_matrix_free_with_another_dtype_for_y():
    """x in float64, y in float32; without bounds the penalties grow beyond what float32 holds, and that is said."""
    rng = np.random.default_rng(0)
    A, b = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((60, 30), 60))
    penalty = lambda x, y: 0.5 * jnp.sum(jnp.exp(x.astype(y.dtype)) * y**2)
    inner = bilevel.Minimization(lambda x, y: jnp.sum(jnp.logaddexp(jnp.float32(0), b * (A @ y))) + penalty(x, y))
    problem = bilevel.BilevelProblem(inner, lambda x, y: jnp.sum(jnp.square(A[:10] @ y - 1)).astype(jnp.float64))
    start = jnp.zeros(30), jnp.zeros(30, jnp.float32)
    matrix_free = bilevel.ImplicitAdjoint(bilevel.ConjugateGradient())
    result = bilevel.minimize(problem, *start, adjoint=matrix_free, tol=1e-2, bounds=(-3.0, 3.0))
    assert result.converged
    assert result.y.dtype == jnp.float32
    with pytest.raises(bilevel.NotConverged, match="NaN or infinite values"):
        bilevel.minimize(problem, *start, adjoint=matrix_free, tol=1e-3)
