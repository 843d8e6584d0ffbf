"""Measuring code that several benchmarks share; it imports none of the libraries it measures."""
