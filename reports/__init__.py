"""What a training wrote down: its log, the curves, and how two runs differ."""
