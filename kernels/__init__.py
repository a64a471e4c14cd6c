"""Fast operations for training: one file a target."""
