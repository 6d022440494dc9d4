"""The methods of :mod:`precond_ref` as PyTorch optimizers. This release exports none."""

__all__: list[str] = []
