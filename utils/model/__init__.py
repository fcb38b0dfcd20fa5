"""Token ids to hidden states, on a mesh. Knows no text."""
