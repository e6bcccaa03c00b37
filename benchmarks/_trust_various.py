"""Hard cases: constraints, solves stopped early, auxiliary outputs, closures over traced values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import bilevel

from ._trust_case import Case, case


def _quadratic(Q, B, shift, x, y):
    return 0.5 * y @ (Q @ y) - (B @ x + shift) @ y


def _affine(matrix, right, x, y):
    return matrix @ y - right


def _linear(c, x, y):
    return c @ y


def _program(weak: bool) -> Case:
    """min y'Qy/2 - q(x)'y with E y = e and A y <= a: 20 unknowns, 5 equalities, 10 inequalities, 3 of them active."""
    rng = np.random.default_rng(6)
    L = rng.normal(size=(20, 20))
    Q, B, c = L @ L.T / 20 + np.eye(20), rng.normal(size=(20, 4)), rng.normal(size=20)
    E, A = rng.normal(size=(5, 20)), rng.normal(size=(10, 20))
    x = np.asarray([0.5, -0.3, 0.8, 0.1])
    y, equal = rng.normal(size=20), rng.normal(size=5)
    pressing = np.asarray([0.7, 1.1, 0.0 if weak else 0.4])
    on = np.vstack([E, A[:3]])
    e, a = E @ y, A @ y + np.concatenate([np.zeros(3), np.linspace(0.5, 1.5, 7)])
    shift = Q @ y - B @ x + E.T @ equal + A[:3].T @ pressing  # makes y the solution, by its optimality conditions
    # y'(x) on the active set: the first rows of the inverse KKT matrix
    system = np.block([[Q, on.T], [on, np.zeros((8, 8))]])
    tangent = np.linalg.solve(system, np.vstack([B, np.zeros((8, 4))]))[:20]
    data = lambda f, *arrays: jax.tree_util.Partial(f, *map(jnp.asarray, arrays))  # leaves: both cases compile once
    inner = bilevel.Constrained(
        data(_quadratic, Q, B, shift), equality=data(_affine, E, e), inequality=data(_affine, A, a)
    )
    outer = data(_linear, c)
    point, y0 = jnp.asarray(x), jnp.zeros(20)
    ours = lambda: bilevel.hypergradient(bilevel.BilevelProblem(inner, outer), point, y0).gradient

    def with_jaxopt():
        import jaxopt

        def h(x):
            parameters = jaxopt.OSQP().run(
                params_obj=(jnp.asarray(Q), -(B @ x + shift)),
                params_eq=(jnp.asarray(E), jnp.asarray(e)),
                params_ineq=(jnp.asarray(A), jnp.asarray(a)),
            )
            return outer(x, parameters.params.primal)

        return jax.grad(h)(point)

    if weak:
        return Case(np.nan, ours, ("degenerate_active_set",), peers={"jaxopt": with_jaxopt})
    return Case(tangent.T @ c, ours, peers={"jaxopt": with_jaxopt})


@case("quadratic program, 5 equalities, 10 inequalities")
def _quadratic_program():
    return _program(weak=False)


@case("quadratic program, a weakly active constraint")
def _weak_program():
    return _program(weak=True)


# ------------------------------------------------------------------------------------------------ the rest


@case("linear solve stopped after 3 steps")
def _stopped():
    rng = np.random.default_rng(7)
    d = 10.0 ** np.linspace(0, 3, 30)
    Q = np.linalg.qr(rng.normal(size=(30, 30)))[0]
    H = jnp.asarray(Q @ np.diag(d) @ Q.T)
    x, y0 = jnp.asarray(rng.normal(size=30)), jnp.zeros(30)
    f, g = lambda x, y: 0.5 * y @ (H @ y) - x @ y, lambda x, y: 0.5 * jnp.sum((y - 1) ** 2)
    inverse = np.linalg.inv(np.asarray(H))
    truth = inverse @ (inverse @ np.asarray(x) - 1)
    adjoint = bilevel.ImplicitAdjoint(bilevel.ConjugateGradient(max_steps=3))
    ours = lambda: bilevel.hypergradient(bilevel.BilevelProblem(f, g), x, y0, adjoint=adjoint).gradient

    def with_jaxopt():
        import functools

        import jaxopt
        from jaxopt.linear_solve import solve_cg

        stop = functools.partial(solve_cg, maxiter=3)
        solve = jaxopt.LBFGS(lambda y, x: f(x, y), maxiter=5000, tol=1e-8, implicit_diff_solve=stop).run
        return jax.grad(lambda x: g(x, solve(y0, x).params))(x)

    def with_optimistix():
        import lineax
        import optimistix

        def h(x):
            rule = optimistix.ImplicitAdjoint(lineax.CG(rtol=1e-8, atol=1e-8, max_steps=3))
            solver = optimistix.LBFGS(rtol=1e-8, atol=1e-8)
            tags = frozenset({lineax.positive_semidefinite_tag})
            return g(
                x,
                optimistix.minimise(lambda y, x: f(x, y), solver, y0, x, adjoint=rule, max_steps=5000, tags=tags).value,
            )

        return jax.grad(h)(x)

    refusals = ("linear_solve", "estimate_untrusted", "max_steps")
    return Case(truth, ours, refusals, peers={"jaxopt": with_jaxopt, "optimistix": with_optimistix})


@case("derivative of an auxiliary output")
def _auxiliary():
    d = jnp.asarray([1.0, 2.0, 4.0])
    x, y0 = jnp.asarray([0.5, -1.0, 2.0]), jnp.zeros(3)
    f = lambda x, y: (0.5 * jnp.sum(d * y**2) - jnp.sum(x * y), jnp.sum(y**2))
    truth = 2 * np.asarray(x) / np.asarray(d) ** 2
    inner = bilevel.Minimization(f, has_aux=True)
    ours = lambda: jax.grad(lambda x: bilevel.solve(inner, x, y0).aux)(x)

    def with_jaxopt():
        import jaxopt

        solve = jaxopt.LBFGS(lambda y, x: f(x, y), has_aux=True).run
        return jax.grad(lambda x: solve(y0, x).state.aux)(x)

    def with_optimistix():
        import optimistix

        def h(x):
            solver = optimistix.BFGS(rtol=1e-8, atol=1e-8)
            return optimistix.minimise(lambda y, x: f(x, y), solver, y0, x, has_aux=True).aux

        return jax.grad(h)(x)

    return Case(truth, ours, peers={"jaxopt": with_jaxopt, "optimistix": with_optimistix})


@case("objective closes over the traced value")
def _closure():
    d = jnp.asarray([1.0, 2.0, 4.0])
    x, y0 = jnp.asarray([0.5, -1.0, 2.0]), jnp.zeros(3)
    truth = (np.asarray(x) / np.asarray(d) - 1) / np.asarray(d)
    g = lambda y: 0.5 * jnp.sum((y - 1) ** 2)
    f = lambda x: lambda y: 0.5 * jnp.sum(d * y**2) - jnp.sum(x * y)
    nothing = jnp.zeros(())
    ours = lambda: jax.grad(lambda x: g(bilevel.solve(lambda _, y: f(x)(y), nothing, y0).y))(x)

    def with_jaxopt():
        import jaxopt

        return jax.grad(lambda x: g(jaxopt.LBFGS(f(x)).run(y0).params))(x)

    def with_optimistix():
        import optimistix

        def h(x):
            solver = optimistix.BFGS(rtol=1e-8, atol=1e-8)
            return g(optimistix.minimise(lambda y, _: f(x)(y), solver, y0).value)

        return jax.grad(h)(x)

    return Case(truth, ours, peers={"jaxopt": with_jaxopt, "optimistix": with_optimistix})
