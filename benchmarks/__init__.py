"""Benchmarks of deep_ep, side by side with other ways to do the same: see `python -m benchmarks.ep -h`."""
