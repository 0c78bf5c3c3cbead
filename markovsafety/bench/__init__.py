"""Benchmarks: the package and its peers, side by side on the machine at hand, in one run."""
