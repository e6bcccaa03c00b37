"""Balanced and unbalanced transport: values, couplings and all gradients against a solver and differences made here."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel
from bilevel._trees import ravel
from bilevel.linear import linear_system
from problems import transport
from problems.transport import EntropicOT, UnbalancedOT, _hessian
from problems.transport._pairs import Matrix
from tests.problems._transport import SQUARES, Affine, derivative, kl, reference

RNG = np.random.default_rng(11)
N, M, EPSILON = 5, 4, 0.15
C0, C1 = RNG.uniform(size=(N, M)), RNG.uniform(size=(N, M))
A, B = RNG.uniform(0.5, 1.5, size=N), RNG.uniform(0.5, 1.5, size=M)
A, B = A / A.sum(), B / B.sum()
W = RNG.normal(size=(N, M))
X = 0.7
TAUS = {"balanced": (np.inf, np.inf), "both": (0.4, 1.5), "first kept": (np.inf, 0.5), "second kept": (0.8, np.inf)}


def solved(ot, **options):
    return bilevel.solve(ot, jnp.asarray(X), ot.initial(), **options)


def build(p):
    """The problem at parameters p: costs, weights, epsilon and the finite tau are leaves."""
    cost = Affine(p["C0"], p["C1"])
    if "tau" not in p:
        return EntropicOT(cost, p["a"], p["b"], p["epsilon"])
    return UnbalancedOT(cost, p["a"], p["b"], p["epsilon"], tuple(np.inf if t is None else t for t in p["tau"]))


def parameters(kind):
    p = {"C0": C0, "C1": C1, "a": A, "b": B if kind == "balanced" else 1.7 * B, "epsilon": EPSILON, "x": X}
    if kind != "balanced":
        p["tau"] = tuple(None if t == np.inf else t for t in TAUS[kind])
    return jax.tree.map(jnp.asarray, p)


def both_outer(p):
    """The value, and a function of the coupling, at the solution."""
    ot = build(p)
    y = bilevel.solve(ot, p["x"], ot.initial()).y
    pi = ot.coupling(p["x"], y)
    weights = np.pad(W, [(0, k - len_) for k, len_ in zip(pi.shape, W.shape, strict=True)])
    return ot.value(p["x"], y), jnp.sum(weights * pi**2)


def both_reference(p):
    p = jax.tree.map(np.asarray, p)
    tau_1, tau_2 = (np.inf if t is None else float(t) for t in p.get("tau", (None, None)))
    pi, value, *_ = reference(p["C0"] + p["x"] * p["C1"], p["a"], p["b"], float(p["epsilon"]), tau_1, tau_2)
    return value, np.sum(W * pi**2)


def direction(p, key, balanced):
    """A random direction in one parameter (for the weights of balanced problems: one that keeps the masses)."""
    d = jax.tree.map(jnp.zeros_like, p)
    size = jax.tree.map(lambda leaf: jnp.asarray(RNG.normal(size=jnp.shape(leaf))), p[key])
    if balanced and key in "ab":
        size = size - size.mean()
    if key in "ab":
        size = 0.3 * size * p[key].min()
    return d | {key: size}


@functools.cache
def gradients(kind):
    return jax.jit(jax.jacrev(both_outer))(parameters(kind))


@pytest.mark.parametrize("kind", TAUS)
def test_values_couplings_and_marginals(kind):
    p = parameters(kind)
    ot = build(p)
    solution = bilevel.solve(ot, p["x"], ot.initial())
    assert solution.converged
    pi, value, *_ = reference(C0 + X * C1, p["a"], p["b"], EPSILON, *TAUS[kind])
    y = solution.y
    np.testing.assert_allclose(ot.coupling(X, y), pi, rtol=1e-9)
    np.testing.assert_allclose(ot.value(X, y), value, rtol=1e-10)  # primal = dual
    rows, columns = ot.marginals(X, y)
    np.testing.assert_allclose(rows, pi.sum(1), rtol=1e-9)
    np.testing.assert_allclose(columns, pi.sum(0), rtol=1e-9)
    V = RNG.normal(size=(M, 2))
    np.testing.assert_allclose(ot.apply(X, y, V), pi @ V, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(ot.apply(X, y, V[:, 0]), pi @ V[:, 0], rtol=1e-8, atol=1e-12)
    # the conditions (2.3) of the marginals, and the value identity
    f, g = y
    t1, t2 = TAUS[kind]
    a, b = np.asarray(p["a"]), np.asarray(p["b"])
    np.testing.assert_allclose(rows, a * np.exp(-f / t1), rtol=1e-9)
    np.testing.assert_allclose(columns, b * np.exp(-g / t2), rtol=1e-9)
    if kind == "both":
        mass = pi.sum()
        identity = EPSILON * a.sum() * b.sum() + t1 * a.sum() + t2 * b.sum() - (EPSILON + t1 + t2) * mass
        np.testing.assert_allclose(value, identity, rtol=1e-10)


@pytest.mark.long
@pytest.mark.parametrize(
    "kind", ["balanced", "both", *(pytest.param(k, marks=pytest.mark.slow) for k in ("first kept", "second kept"))]
)
@pytest.mark.parametrize("key", ["C0", "x", "a", "b", "epsilon", "tau"])
def test_gradients_of_value_and_coupling_in_everything(kind, key):
    p = parameters(kind)
    if key not in p:
        pytest.skip("no such parameter")
    d = direction(p, key, kind == "balanced")
    if key == "tau":
        d["tau"] = tuple(None if t is None else 0.1 * u for t, u in zip(p["tau"], d["tau"], strict=True))
    moved = lambda s: both_reference(jax.tree.map(lambda u, v: np.asarray(u) + s * np.asarray(v), p, d))
    expected = derivative(lambda s: np.array(moved(s)), 0.005)
    for k in range(2):
        pairing = sum(
            float(jnp.vdot(u, v)) for u, v in zip(jax.tree.leaves(gradients(kind)[k]), jax.tree.leaves(d), strict=True)
        )
        np.testing.assert_allclose(pairing, expected[k], rtol=1e-8, atol=1e-9)


def test_derivatives_of_the_value_are_the_envelopes():
    p = parameters("both")
    ot = build(p)
    pi = np.asarray(ot.coupling(X, bilevel.solve(ot, p["x"], ot.initial()).y))
    g, _ = gradients("both")
    t1, t2 = TAUS["both"]
    a, b = A, 1.7 * B
    np.testing.assert_allclose(g["C0"], pi, rtol=1e-8)
    np.testing.assert_allclose(g["epsilon"], kl(pi, np.outer(a, b)), rtol=1e-8)
    np.testing.assert_allclose(g["tau"], [kl(pi.sum(1), a), kl(pi.sum(0), b)], rtol=1e-8)
    f = -t1 * np.log(pi.sum(1) / a)
    np.testing.assert_allclose(g["a"], -t1 * np.expm1(-f / t1) - EPSILON * (np.exp(-f / t1) - b.sum()), rtol=1e-8)


# ------------------------------------------------------------------------------------------------ what the engine needs


def outer_of_potentials(x, y):
    return jnp.sum(jnp.sin(y[0])) + jnp.sum(y[1] ** 2)


@pytest.mark.long
def test_outer_functions_of_the_potentials():
    """Unbalanced: any. Balanced: those that do not see the gauge; the others are refused, not answered."""
    p = parameters("both")
    found = bilevel.hypergradient(bilevel.BilevelProblem(build(p), outer_of_potentials), p["x"], build(p).initial())
    at = lambda s: reference(C0 + (X + s) * C1, p["a"], p["b"], EPSILON, *TAUS["both"])[2:]
    expected = derivative(lambda s: outer_of_potentials(None, at(s)), 0.005)
    np.testing.assert_allclose(found.gradient, expected, rtol=1e-6)

    p = parameters("balanced")
    with pytest.raises(bilevel.NotConverged, match="changes along the declared gauge"):
        bilevel.hypergradient(bilevel.BilevelProblem(build(p), outer_of_potentials), p["x"], build(p).initial())


def test_every_solver_finds_the_same():
    p = parameters("both")
    ot = build(p)
    pi = reference(C0 + X * C1, p["a"], p["b"], EPSILON, *TAUS["both"])[0]
    accelerated = transport.Sinkhorn("log", anderson=5)
    for solver in (transport.Sinkhorn("log"), accelerated, transport.Sinkhorn("kernel"), transport.SchurNewton()):
        solution = bilevel.solve(ot, p["x"], ot.initial(), solver=solver)
        np.testing.assert_allclose(ot.coupling(X, solution.y), pi, rtol=1e-8, err_msg=str(solver))
    with pytest.raises(ValueError, match="domain must be 'kernel' or 'log'"):
        transport.Sinkhorn("primal")
    with pytest.raises(ValueError, match="anderson must be a number of sweeps, 0 or more, found -1"):
        transport.Sinkhorn("log", anderson=-1)
    with pytest.raises(ValueError, match="is in the log domain: pass domain='log' too"):
        transport.Sinkhorn(anderson=5)


def test_anderson_acceleration_takes_fewer_sweeps_and_reaches_what_it_says():
    """At an epsilon where plain sweeps need hundreds; both are stopped by their own measure, checked here."""
    C = jnp.asarray(SQUARES)
    weights = jnp.full(40, 1 / 40)
    ot = EntropicOT(Affine(C, jnp.zeros_like(C)), weights, weights, 0.03 * float(np.median(SQUARES)))
    steps = {}
    for depth in (0, 5):
        solver = transport.Sinkhorn("log", annealing=False, anderson=depth)
        found = jax.jit(lambda s=solver: s.find(ot, jnp.asarray(0.0), ot.initial(), tol=1e-9, max_steps=5000))()
        steps[depth] = int(found.steps)
        rows, columns = ot.optimality(jnp.asarray(0.0), found.y)
        assert np.sqrt(np.sum(rows**2) + np.sum(columns**2)) <= 1e-9
    assert 2 * steps[5] < steps[0] < 5000, steps


@pytest.mark.parametrize("shape", [(40, 30), pytest.param((30, 40), marks=pytest.mark.slow)])
def test_the_schur_complement_is_factorized_where_iterations_are_slow(shape, monkeypatch):
    """Either way it solves with dF/dy: balanced on the quotient by the gauge, and unbalanced with large tau."""
    monkeypatch.setattr(_hessian, "ALWAYS_DIRECT", 0)
    C = jnp.asarray(SQUARES[: shape[0], : shape[1]])
    a, b = (jnp.full(k, 1 / k) for k in shape)
    zero = jnp.asarray(0.0)

    @jax.jit
    def solved(epsilon):
        out = []
        for tau in (np.inf, 5.0):
            ot = UnbalancedOT(Affine(C, jnp.zeros_like(C)), a, 1.0 * b, epsilon, tau)
            y = transport.SchurNewton().find(ot, zero, ot.initial(), tol=jnp.asarray(1e-9), max_steps=200).y
            _, system = linear_system(ot, zero, y)
            right = system.off_gauge(jnp.sin(jnp.arange(70.0)) * ravel(ot.optimality(zero, ot.initial()))[0])
            solver = _hessian.SchurComplement()
            state: Any = solver.prepare(system)
            answer = solver.solve(state, system, right)
            rest = jnp.linalg.norm(system.mv(answer.value) - right) / jnp.linalg.norm(right)
            once = solver.once(system, right)
            short = jnp.linalg.norm(once.value - answer.value) / jnp.linalg.norm(answer.value)
            out.append((state.direct, rest, answer.status.code, short, once.status.code))
        return out

    for share, direct in ((3.0, False), (0.02, True)):
        for chosen, rest, code, short, code_once in solved(share * float(np.median(SQUARES))):
            assert bool(chosen) == direct
            assert rest < 1e-11
            assert code == code_once == 0
            # one digit by iterations, all of them by a factorization
            assert short < (1e-9 if direct else 0.1)
            assert direct or short > 1e-9


def test_solved_once_it_sees_a_direction_that_only_round_off_fixes():
    """Two parts of two points that do not see each other: the potentials of one against the other's are free, and
    what is left of F need not show it."""
    C = jnp.where(jnp.asarray(np.kron(np.eye(2), np.ones((2, 2)))) > 0, 1.0, 60.0)
    a = jnp.full(4, 0.25)
    right = jnp.asarray([1.0, -1, 0, 0, 0, 0, 0, 0])  # solvable: it does not ask for the free direction
    for epsilon, message in ((5.0, "converged"), (1.0, "singular")):
        ot = EntropicOT(Affine(C, jnp.zeros_like(C)), a, a, epsilon)
        _, system = linear_system(ot, jnp.asarray(0.0), ot.initial())
        assert _hessian.SchurComplement().once(system, right).status == message


@pytest.mark.long
def test_derivatives_of_the_marginals_are_those_of_the_formula():
    """Sums over rows and columns, in which potentials enter by factors that are one, against autodiff of the plain
    formula, in all arguments together and one at a time, twice, with a forbidden pair and a point without weight."""
    costs = jnp.asarray(C0).at[1, 2].set(jnp.inf)
    arguments = (costs, jnp.asarray(C0[:, 0]), jnp.asarray(C0[0]), jnp.asarray(A).at[2].set(0.0), jnp.asarray(B),
                 jnp.asarray(EPSILON))  # fmt: skip
    rng = np.random.default_rng(3)
    ways = [jnp.asarray(rng.normal(size=v.shape)) for v in arguments]

    def plain(costs, f, g, a, b, epsilon):
        allowed = costs != jnp.inf
        E = jnp.exp((f[:, None] + g - jnp.where(allowed, costs, 0)) / epsilon)
        pi = jnp.where(allowed, E, 0) * a[:, None] * b
        return jnp.concatenate([pi.sum(1), pi.sum(0)])

    def ours(costs, f, g, a, b, epsilon):
        return jnp.concatenate(Matrix(costs).sums(f, g, a, b, epsilon))

    weights = jnp.asarray(rng.normal(size=N + M))
    for chosen in [tuple(range(6)), *((k,) for k in range(6)), (1, 2)]:

        def along(s, function, chosen=chosen):
            moved = [v + s * w if k in chosen else v for k, (v, w) in enumerate(zip(arguments, ways, strict=True))]
            return function(*moved)

        def twice(function, along=along):
            first = lambda s: jax.jvp(functools.partial(along, function=function), (s,), (jnp.ones_like(s),))[1]
            zero = jnp.asarray(0.0)
            return first(zero), jax.jvp(first, (zero,), (jnp.ones_like(zero),))[1]

        def reverse(function, chosen=chosen):
            return jax.grad(lambda *p: weights @ jnp.sin(function(*p)), argnums=chosen)(*arguments)

        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10), twice(ours), twice(plain))
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12), reverse(ours), reverse(plain)
        )


# ------------------------------------------------------------------------------------------------ zero, infinity


@pytest.mark.long
@pytest.mark.parametrize("kind", ["balanced", pytest.param("both", marks=pytest.mark.slow)])
def test_a_weight_of_zero_is_a_point_that_is_not_there(kind):
    p = parameters(kind)
    C = C0 + X * C1
    more = {
        "C0": np.pad(C0, ((0, 1), (0, 1)), constant_values=0.3), "C1": np.pad(C1, ((0, 1), (0, 1))),
        "a": np.append(p["a"], 0.0), "b": np.append(p["b"], 0.0),
    }  # fmt: skip
    more = p | jax.tree.map(jnp.asarray, more)
    ot = build(more)
    y = bilevel.solve(ot, p["x"], ot.initial()).y
    pi, value, f, g = reference(C, p["a"], p["b"], EPSILON, *TAUS[kind])
    np.testing.assert_allclose(ot.coupling(X, y), np.pad(pi, ((0, 1), (0, 1))), rtol=1e-8)
    np.testing.assert_allclose(ot.value(X, y), value, rtol=1e-9)

    # the derivative in that weight is the one from above: mass moved there (taken from everywhere when balanced)
    def along(s):
        a = more["a"] + s * jnp.asarray(np.eye(N + 1)[N])
        a = a / jnp.sum(a) * jnp.sum(p["b"]) if kind == "balanced" else a
        return both_outer(more | {"a": a})

    slopes = jax.jit(jax.jacfwd(along))(0.0)
    spread = np.pad(W, ((0, 1), (0, 1)))

    def moved(s):
        a = np.append(p["a"], s)
        a = a / a.sum() * np.sum(p["b"]) if kind == "balanced" else a
        costs = np.asarray(more["C0"] + X * more["C1"])[:, :M]
        coupling, value, *_ = reference(costs, a, p["b"], EPSILON, *TAUS[kind])
        return np.array([value, np.sum(spread[:, :M] * coupling**2)])

    h = 2e-4
    one_sided = (-11 * moved(0) + 18 * moved(h) - 9 * moved(2 * h) + 2 * moved(3 * h)) / (6 * h)
    np.testing.assert_allclose(slopes, one_sided, rtol=1e-6, atol=1e-8)


@pytest.mark.long
def test_a_weight_below_round_off_is_as_good_as_none():
    """Round-off of the other weights must not get into a potential whose own weight is smaller still."""
    costs = C0 + X * C1
    shares = np.append(np.full(N - 1, 1 / (N - 1)), 1e-17)

    def outer(x, rows):
        a = shares[:rows] / np.sum(shares[:rows])
        ot = EntropicOT(jax.tree_util.Partial(jnp.multiply, costs[:rows]), a, np.full(M, 1 / M), EPSILON)
        return jnp.sum(W[:rows] * ot.coupling(x, bilevel.solve(ot, x, ot.initial()).y))

    with_it, without = (jax.value_and_grad(outer)(jnp.asarray(1.0), rows) for rows in (N, N - 1))
    np.testing.assert_allclose(with_it, without, rtol=1e-8)


@pytest.mark.long
def test_infinite_costs_forbid_pairs():
    forbidden = C0 + X * C1
    forbidden[0, 1] = forbidden[2, :2] = np.inf
    p = parameters("both")
    for ot, taus in (
        (EntropicOT(lambda x: jnp.asarray(forbidden), A, B, EPSILON), TAUS["balanced"]),
        (UnbalancedOT(lambda x: jnp.asarray(forbidden), A, p["b"], EPSILON, TAUS["both"]), TAUS["both"]),
    ):
        pi, value, *_ = reference(forbidden, ot.a, ot.b, EPSILON, *taus)
        y = solved(ot).y
        np.testing.assert_allclose(ot.coupling(X, y), pi, rtol=1e-8)
        np.testing.assert_allclose(ot.value(X, y), value, rtol=1e-9)
    # a point without any pair: penalised mass may stay where it is, mass that must move makes it infeasible
    forbidden[2] = np.inf
    ot = UnbalancedOT(lambda x: jnp.asarray(forbidden), A, p["b"], EPSILON, (0.4, 1.5))
    rest = np.arange(N) != 2
    _, value, *_ = reference(forbidden[rest], A[rest], p["b"], EPSILON, 0.4, 1.5)
    # the point's own mass: destroyed, and in the reference measure of the entropy
    np.testing.assert_allclose(ot.value(X, solved(ot).y), value + 0.4 * A[2] + EPSILON * A[2] * p["b"].sum(), rtol=1e-9)


def without(rows, value=np.inf):
    C = C0 + X * C1
    C[rows] = value
    return C


LOCKED = C0 + X * C1
LOCKED[:3, 1:] = np.inf  # more mass in three rows than their only column takes


@pytest.mark.parametrize(
    ("C", "message"),
    [
        (without((1, 2), np.nan), "the cost is NaN for 1 pairs, the first is (1, 2)"),
        (without((3, 0), -np.inf), "the cost is minus infinity for 1 pairs, the first is (3, 0)"),
        (without(2), "all pairs of point 2 of `a` are forbidden"),
        (without((slice(None), 1)), "all pairs of point 1 of `b` are forbidden"),
        (LOCKED, "no coupling with these marginals avoids the forbidden pairs"),
    ],
)
def test_costs_without_a_solution_are_named(C, message):
    ot = EntropicOT(Affine(jnp.asarray(C), jnp.zeros((N, M))), A, B, EPSILON)
    with pytest.raises(bilevel.NotConverged, match=re.escape(message)):
        solved(ot, max_steps=300)


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: EntropicOT(c, -A, B, 0.1), "EntropicOT: `a` has 5 negative weights"),
        (lambda c: EntropicOT(c, A, 2 * B, 0.1), "`a` and `b` must have the same total mass"),
        (lambda c: UnbalancedOT(c, A, 2 * B, 0.1, np.inf), "`a` and `b` must have the same total mass"),
        (lambda c: EntropicOT(c, A, B, 0.0), "`epsilon` must be positive and finite, found 0"),
        (lambda c: EntropicOT(c, A, B, -1.0), "`epsilon` must be positive and finite, found -1"),
        (lambda c: EntropicOT(c, A, B, np.nan), "`epsilon` must be positive and finite, found nan"),
        (lambda c: UnbalancedOT(c, A, B, 0.1, 0.0), "`tau` must be positive and finite, found 0"),
        (lambda c: UnbalancedOT(c, A, B, 0.1, (1.0, -2.0)), "`tau` must be positive and finite, found -2"),
        (lambda c: UnbalancedOT(c, A, B, 0.1, (1.0, 2.0, 3.0)), "a number or a pair of them, found 3"),
        (lambda c: EntropicOT(c, A[:, None], B, 0.1), "`a` must have one axis, found shape (5, 1)"),
        (lambda c: EntropicOT(c, 0 * A, 0 * B, 0.1), "all weights in `a` are zero"),
        (lambda c: EntropicOT(c, np.append(A[1:], np.nan), B, 0.1), "`a` has 1 entries that are NaN"),
        (lambda c: EntropicOT(c, A[:0], B, 0.1), "`a` is empty"),
        (lambda c: solved(EntropicOT(c, A[1:] / A[1:].sum(), B, 0.1)), "`cost(x)` must have shape (4, 4)"),
        (lambda c: solved(EntropicOT(lambda x: x, A, B, 0.1)), "`cost(x)` must be a matrix of shape (5, 4)"),
        (lambda c: EntropicOT(c, A, B, 0.1).apply(X, (jnp.asarray(A), jnp.asarray(B)), A), "`v` must have shape (4,)"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(Affine(jnp.asarray(C0), jnp.asarray(C1)))


def test_wrong_types_are_named():
    with pytest.raises(TypeError, match="a fixed matrix C is lambda x: C"):
        EntropicOT(C0, A, B, 0.1)
    with pytest.raises(TypeError, match="`epsilon` must be a positive number"):
        EntropicOT(lambda x: C0, A, B, None)
