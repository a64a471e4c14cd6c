"""GGUF, the form that llama.cpp and Ollama read: language model, eyes, and a certificate by it."""
