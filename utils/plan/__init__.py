"""A request, checked, before a model loads. Writes nothing."""
