"""Recordings to text and text to sound. This room knows nothing of the language model."""
