"""The loop, its checkpoints and its reports."""
