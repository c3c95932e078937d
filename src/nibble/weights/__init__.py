"""Checkpoints, read one tensor at a time and written so that a half file is never left."""
