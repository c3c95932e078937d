"""What one does with a model."""
