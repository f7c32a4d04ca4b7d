"""Training: point sampling, losses, and the loop."""
