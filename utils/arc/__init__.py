"""Tasks in (files, dataset rows), views, scores and predictions out. Knows no tokens."""
