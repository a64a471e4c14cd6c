"""The web app, built with Gradio."""
