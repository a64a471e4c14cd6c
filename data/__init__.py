"""Files on disk in, batch tensors out. This room knows nothing of models."""
