"""A plan computed: predictions, shards and a manifest."""
