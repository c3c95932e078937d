"""The optimiser, parameter groups and schedules."""
