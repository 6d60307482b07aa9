"""Benchmarks: every figure of RESULTS.md has its script here."""
