"""Many trainings from one cache: which, in which processes, and what came of them."""
