"""A task as tokens with the span of every cell, and back."""
