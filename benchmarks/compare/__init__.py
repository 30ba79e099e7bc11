"""``make compare``: every family of objectives and its rivals, on two tasks, with modalities missing, over three seeds."""
