"""Measurements; their figures stand in RESULTS.md."""
