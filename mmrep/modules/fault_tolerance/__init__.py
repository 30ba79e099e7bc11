"""What keeps a run's work when a signal, a dead rank or a full disk ends it: docs/faults.md. `mmrep fit` adds all of it."""
