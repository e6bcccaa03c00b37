"""The estimator study as a table: `python -m benchmarks.estimators`; drawn by `examples/plot_estimators.py`."""

from __future__ import annotations

import argparse

import jax
import numpy as np

from ._study import CASES, ESTIMATORS, errors, slope


def main() -> None:
    """Prints, per case and estimator, the slope and the error at two inner distances (mean over seeds)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    seeds = parser.parse_args().seeds
    jax.config.update("jax_enable_x64", True)
    for name in CASES:
        runs = [errors(name, seed) for seed in range(seeds)]
        print(f"\n{name}: {seeds} seeds, mean (standard deviation)")
        print(f"  {'estimator':20s} {'slope':>14s}   error at distance 1e-1    at 1e-3")
        for key in ESTIMATORS:
            slopes = [slope(d, e[key], 1e-11) for d, e in runs]
            at = [
                np.mean([np.exp(np.interp(-np.log(t), -np.log(d), np.log(e[key] + 1e-300))) for d, e in runs])
                for t in (1e-1, 1e-3)
            ]
            if np.all(np.isnan(slopes)):
                shown = "exact"
            else:
                shown = f"{np.nanmean(slopes):.2f} ({np.nanstd(slopes):.2f})"
            print(f"  {key:20s} {shown:>14s}   {at[0]:18.2e}  {at[1]:14.2e}")


if __name__ == "__main__":
    main()
