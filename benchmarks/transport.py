"""Transport side by side with its peers, in one process: `python -m benchmarks.transport [--part a|b|c]`.

(a) A hypergradient of a function of the coupling in all points of a cloud, at the same true relative error (the
    reference: this package at round-off): ott-jax (implicit differentiation, the loosest threshold that gets
    there), reverse mode through log-domain sweeps (the fewest
    that get there). All jitted whole.
(b) Fits of inverse transport: `InverseOT.newton`, L-BFGS on (theta, f, g) jointly, pyfixest's `fepois` with two-way
    fixed effects where it is installed, statsmodels' Poisson regression with dummies where its design fits in memory.
(c) Forward: potentials to a violation of the marginals of 1e-9, ours, ott-jax and POT.
"""

from __future__ import annotations

import argparse
import importlib.util
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np

import bilevel
from problems.transport import EntropicOT, InverseOT

from ._transport import (
    Barycenters,
    Squares,
    clouds,
    inverse_data,
    joint_lbfgs,
    ott_coupling,
    poisson_table,
    seconds_of,
    sweeps,
)  # fmt: skip

ACCURACY = 1e-6


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def relative(u, v) -> float:
    return float(jnp.linalg.norm(u - v) / jnp.linalg.norm(v))


def hypergradients(sizes: list[int], shares: list[float], repeats: int) -> None:
    print(f"\n(a) hypergradient to a true relative error of {ACCURACY:g}: seconds (ours / peer)")
    ratios = []
    for n in sizes:
        X, Y, a, median = clouds(n)
        loss = Barycenters(Y)
        for share in shares:
            epsilon = jnp.asarray(share * median)
            ot = EntropicOT(Squares(Y), a, a, epsilon)
            problem = bilevel.BilevelProblem(ot, lambda x, y, ot=ot, loss=loss: loss(x, ot.coupling(x, y)))
            tight = bilevel.hypergradient(problem, X, ot.initial(), rtol=1e-9, throw=False)
            call = lambda X, p=problem, ot=ot: bilevel.hypergradient(p, X, ot.initial(), rtol=ACCURACY, throw=False)
            whole = jax.jit(lambda X, call=call: call(X).gradient)
            mine, gradient = seconds_of(lambda whole=whole, X=X: whole(X), repeats)
            error = relative(gradient, tight.gradient)
            line = f"  n={n:5d} epsilon={share:4g} median  ours {mine:8.4f} (error {error:.0e})"
            if installed("ott"):
                value = lambda X, t, Y=Y, a=a, e=epsilon, loss=loss: loss(X, ott_coupling(X, Y, a, e, t))
                slope = jax.jit(jax.grad(value))
                for threshold in 10.0 ** np.arange(-3, -13, -1):
                    error = relative(slope(X, threshold), tight.gradient)
                    if error <= ACCURACY:
                        theirs, _ = seconds_of(lambda s=slope, t=threshold, X=X: s(X, t), repeats)
                        ratios.append(theirs / mine)
                        line += f"  ott-jax {theirs:8.4f} (x{theirs / mine:.1f}, at {threshold:.0e}, error {error:.0e})"
                        break
                else:
                    line += f"  ott-jax does not get there (error {error:.0e})"
            if n <= 500:
                for count in (10, 30, 100, 300, 1000):
                    if count * n * n * 8 > 2**31:
                        line += "  unrolled: out of memory"
                        break
                    unrolled = jax.jit(
                        jax.grad(lambda X, c=count, Y=Y, a=a, e=epsilon, f=loss: f(X, sweeps(X, Y, a, e, c, True)))
                    )
                    error = relative(unrolled(X), tight.gradient)
                    if error <= ACCURACY:
                        theirs, _ = seconds_of(lambda u=unrolled, X=X: u(X), repeats)
                        line += f"  unrolled {theirs:8.4f} (x{theirs / mine:.1f}, {count} sweeps)"
                        break
                else:
                    line += f"  unrolled: not in 1000 sweeps (error {error:.0e})"
            print(line, flush=True)
    if ratios:
        print(f"  geometric mean against ott-jax: x{np.exp(np.mean(np.log(ratios))):.2f}, smallest x{min(ratios):.2f}")


def fits(sizes: list[int], counts_of_features: list[int], repeats: int) -> None:
    print("\n(b) inverse transport, gradient to 1e-10: seconds")
    for K in counts_of_features:
        for n in sizes:
            features, counts, epsilon = inverse_data(n, K)
            iot = InverseOT(features, counts / counts.sum(), epsilon=epsilon)
            mine, result = seconds_of(lambda iot=iot: iot.newton(tol=1e-10).x, repeats)
            line = f"  K={K:3d} n={n:4d}  ours {mine:8.3f}"
            call = joint_lbfgs(features, counts, epsilon, 1e-10)
            theirs, (theta, slope, steps) = seconds_of(call, 1)
            line += (
                f"  joint L-BFGS {theirs:8.3f} (x{theirs / mine:.1f}, gradient {slope:.0e} after {steps} steps, "
                f"theta differs by {np.max(np.abs(theta - result)):.0e})"
            )
            if installed("pyfixest"):
                import pyfixest

                table = poisson_table(features, counts, epsilon)
                formula = "count ~ " + " + ".join(f"x{k}" for k in range(K)) + " | row + column"
                fit = lambda table=table, formula=formula, pyfixest=pyfixest: (
                    pyfixest.fepois(formula, table, vcov="iid").coef().to_numpy()
                )
                theirs, theta = seconds_of(fit, max(1, repeats // 2))
                line += (
                    f"  fepois {theirs:8.3f} (x{theirs / mine:.1f}, differs by {np.max(np.abs(theta - result)):.0e})"
                )
            if installed("statsmodels") and n * n * (2 * n + K) * 8 < 2**29:
                import statsmodels.api as sm

                table = poisson_table(features, counts, epsilon)
                dummies = np.hstack([np.eye(n)[table["row"]], np.eye(n)[table["column"]][:, 1:]])
                design = np.hstack([table[[f"x{k}" for k in range(K)]].to_numpy(), dummies])
                model = sm.GLM(table["count"].to_numpy(), design, family=sm.families.Poisson())
                theirs, theta = seconds_of(lambda model=model, K=K: model.fit(tol=1e-12).params[:K], 1)
                gap = np.max(np.abs(theta - result))
                line += f"  statsmodels {theirs:8.3f} (x{theirs / mine:.1f}, differs by {gap:.0e})"
            print(line, flush=True)


def forward(sizes: list[int], shares: list[float], repeats: int) -> None:
    print("\n(c) potentials to a violation of 1e-9: seconds")
    for n in sizes:
        X, Y, a, median = clouds(n)
        C = Squares(Y)(X)
        for share in shares:
            ot = EntropicOT(Squares(Y), a, a, share * median)
            whole = jax.jit(lambda X, ot=ot: bilevel.solve(ot, X, ot.initial(), rtol=1e-9, throw=False).y)
            mine, y = seconds_of(lambda whole=whole, X=X: whole(X), repeats)
            off = lambda pi, a=a: float(jnp.abs(pi.sum(1) - a).sum() + jnp.abs(pi.sum(0) - a).sum())
            line = f"  n={n:5d} epsilon={share:4g} median  ours {mine:8.4f} ({off(ot.coupling(X, y)):.0e})"
            if installed("ott"):
                run = jax.jit(lambda X, Y=Y, a=a, e=share * median: ott_coupling(X, Y, a, e, 1e-9))
                theirs, pi = seconds_of(lambda run=run, X=X: run(X), repeats)
                line += f"  ott-jax {theirs:8.4f} (x{theirs / mine:.1f}, {off(pi):.0e})"
            if installed("ot"):
                import ot as pot

                weights, costs = np.asarray(a), np.asarray(C)
                method = "sinkhorn" if share >= 0.1 else "sinkhorn_log"
                run = lambda w=weights, c=costs, e=share * median, method=method, pot=pot: pot.sinkhorn(
                    w, w, c, e, method=method, stopThr=1e-9, numItermax=100_000, warn=False
                )  # fmt: skip
                theirs, pi = seconds_of(run, max(1, repeats // 3))
                line += f"  POT {theirs:8.4f} (x{theirs / mine:.1f}, {off(pi):.0e})"
            print(line, flush=True)


def main() -> None:
    """Prints the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="abc", help="any of the letters a, b, c")
    parser.add_argument("--sizes", type=int, nargs="*", default=None, help="numbers of points")
    parser.add_argument("--epsilon", type=float, nargs="*", default=[1.0, 0.1, 0.01], help="shares of the median cost")
    parser.add_argument("--features", type=int, nargs="*", default=[4, 25])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    names = ("jax", "equinox", "ott-jax", "POT", "pyfixest", "statsmodels")
    modules = ("jax", "equinox", "ott", "ot", "pyfixest", "statsmodels")
    print(", ".join(f"{name} {version(name)}" for name, m in zip(names, modules, strict=True) if installed(m)))
    if "a" in arguments.part:
        hypergradients(arguments.sizes or [100, 500, 2000], arguments.epsilon, arguments.repeats)
    if "b" in arguments.part:
        fits(arguments.sizes or [100, 500], arguments.features, arguments.repeats)
    if "c" in arguments.part:
        forward(arguments.sizes or [100, 500, 2000], arguments.epsilon, arguments.repeats)


if __name__ == "__main__":
    main()
