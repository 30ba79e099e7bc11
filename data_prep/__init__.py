"""Datasets of the field, and tables of your own, to shards: one file or folder per source, all on mmrep.data.writer."""
