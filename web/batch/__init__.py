"""The batch room: one question about many pictures."""
