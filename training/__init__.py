"""What exact resume rests on, beside the checkpoint's own format."""
