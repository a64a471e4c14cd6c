"""What the page asks first: its texts, what the model is, and what can be done here."""
