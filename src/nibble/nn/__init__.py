"""Modules: quantised linears, adapters, attention, loss."""
