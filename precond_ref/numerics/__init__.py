"""Numerical building blocks: averages, matrix roots, scaling."""
