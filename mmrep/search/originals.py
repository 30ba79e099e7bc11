"""`Originals`: the samples that hits stand for, as they lie in the shards."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from pathlib import Path

from mmrep.data.decode import decode
from mmrep.data.html_members import Member, read_members
from mmrep.data.index import Index
from mmrep.data.reader import Samples, Where
from mmrep.errors import DataError, SampleError
from mmrep.search.index import Hit
from mmrep.search.manifest import Manifest, absolute_place


class Originals:
    """Reads what was embedded.

    Args:
        folder: Of the embeddings.
        manifest: Its manifest.
        data: Folder or URL of the shards' index, where it is not where it was, seen from the folder.

    Raises:
        DataError: If the data is not there, or is other data.
    """

    def __init__(self, folder: Path, manifest: Manifest, data: str | None = None) -> None:
        place = data or absolute_place(manifest.data, folder)
        try:
            index = Index.load(place)
        except DataError as error:
            fix = error.fix if data else "say where it is now: --data DIR"
            raise DataError(f"the embedded data is not there: {error.what}", where=place, fix=fix) from error
        if index.fingerprint != manifest.source.fingerprint:
            raise DataError("not the data that was embedded", where=place, fix="say where that is: --data DIR")
        self.samples = Samples(replace(index, splits={"embedded": manifest.source.shards}), "embedded")
        self.kinds = {name: modality.kind for name, modality in index.modalities.items()}
        counts = [0, *(shard.samples for shard in self.samples.shards)]
        names = (shard.name for shard in self.samples.shards)
        self._firsts = dict(zip(names, accumulate(counts), strict=False))

    def number(self, hit: Hit) -> int:
        """The number of a hit's sample in ``samples``."""
        return self._firsts[hit.shard] + hit.number

    def members(self, hit: Hit) -> list[Member]:
        """All modalities of a hit as HTML."""
        return read_members(self.samples, self.number(hit), list(self.kinds))

    def texts(self, hit: Hit) -> dict[str, str]:
        """The texts of a hit, by modality; what it lacks or cannot be read is left out."""
        number, found = self.number(hit), {}
        for name in (name for name, kind in self.kinds.items() if kind == "text"):
            extension = self.samples.extension_of(number, name)
            if extension is None:
                continue
            try:
                data = self.samples.read(number, extension)
                found[name] = str(decode("text", extension, data, Where(self.samples, number)))
            except SampleError:
                continue
        return found
