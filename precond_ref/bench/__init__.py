"""Times of the methods beside their peers and their floors: the job of ``precond-ref bench``."""
