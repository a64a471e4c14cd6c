"""The assistant over HTTP: the chat API that other programs already speak, and what guards it."""
