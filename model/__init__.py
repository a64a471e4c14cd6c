"""The models: the frozen language base, the frozen vision tower, and the projector between them."""
