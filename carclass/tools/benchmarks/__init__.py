"""Benchmarks: carclass against a plain script on the same machine. Each `run` returns a flat dict of figures."""
