"""Checking other implementations against this one: vectors of inputs and results."""
