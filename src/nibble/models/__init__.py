"""transformers models on the meta device, and what must be known of a family."""
