"""The chat: saved conversations, and the answers to them."""
