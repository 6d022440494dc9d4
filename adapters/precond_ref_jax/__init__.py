"""The methods of :mod:`precond_ref` as optax gradient transformations. This release exports none."""

__all__: list[str] = []
