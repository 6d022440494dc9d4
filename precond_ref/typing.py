"""Names for types in signatures, since array libraries have no common types."""

from typing import Any

Array = Any
"""An array of one array-API namespace."""
Arrays = tuple[Array, ...]
"""Several arrays, such as one for each axis."""
Namespace = Any
"""A module of the array API, such as ``array_api_compat.numpy``."""
Scalar = Any
"""A Python float, a 0-D array, or a tracer."""
