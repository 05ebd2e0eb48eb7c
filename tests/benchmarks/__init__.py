"""Benchmarks: this engine against JAX and torch, in turns; `python -m tests.benchmarks --help`, docs/benchmarks.md."""
