"""What benchmarks/run.py measures, beside what, and what counts as a change."""
