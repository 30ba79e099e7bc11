"""What a run shows and writes of itself: docs/seeing_a_run.md. `mmrep fit` adds all of it."""
