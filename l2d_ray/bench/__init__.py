"""Benchmarks: medians of paired runs and their ratio."""
