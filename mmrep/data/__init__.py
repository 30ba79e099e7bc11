"""Sharded data: index -> plan -> reader -> decode -> transform -> collate -> `Batch`."""
