"""Fast twins of numerics, chosen explicitly."""
