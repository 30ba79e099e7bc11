"""A table of paths, values or bytes (CSV, TSV, JSONL, Parquet) -> WebDataset shards and their index.json.

Example:
    python -m data_prep.table --csv birds.csv --out birds --image photo --text caption --audio song --values labs=age,bp

A cell of an image, audio or array column is a path, or in Parquet the bytes or numbers themselves; of a text column it is
the text; ``--values`` makes one float32 vector of several numeric columns. An empty cell means that the row lacks that
modality. A row with a bad cell is dropped whole and listed in ``rejects.csv``. A run that was interrupted goes on where it
stopped. See docs/corpus_scale.md.
"""

from data_prep.table.command import main

__all__ = ["main"]
