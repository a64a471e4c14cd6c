"""The assistant in a terminal: a conversation, and a file of questions."""
