"""The assistant: a trained model that answers conversations, many at a time, for every command."""
