"""The training room: runs as they grow, and trainings that are started from the page."""
