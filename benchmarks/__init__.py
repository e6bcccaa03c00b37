"""Side by side with the peers, in one run: `python -m benchmarks.NAME`. Peers that are not installed are skipped."""
