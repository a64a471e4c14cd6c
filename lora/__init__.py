"""Low-rank adapters: a wrapped linear layer, and its injection, state and merge.

Knows torch and bitsandbytes only (arXiv:2106.09685, and arXiv:2305.14314 for adapters over NF4).
"""
