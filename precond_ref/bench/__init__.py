"""How fast the methods are, beside their peers and their floors: `precond-ref bench`."""
