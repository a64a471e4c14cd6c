"""Small models with random weights, one of every family, on which every pair can be tried."""
