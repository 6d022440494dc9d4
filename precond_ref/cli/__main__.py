"""``python -m precond_ref.cli``."""

from precond_ref.cli import main

main()
