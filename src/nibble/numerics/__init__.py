"""Pure functions on tensors: formats, state codecs, update rules."""
