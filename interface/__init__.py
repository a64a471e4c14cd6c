"""What stands between people or programs and the assistant: terminal, batch, HTTP API, filter."""
