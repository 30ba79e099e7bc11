"""A hash that is the same in every process, on every machine."""

from __future__ import annotations

import hashlib


def stable_hash(content: bytes | str) -> int:
    """A non-negative number of 63 bits: fits int64 tensors and seeds torch's generators. Python's own differs by process.

    Half a character (a lone surrogate), which JSON can hold, counts as it is.
    """
    data = content.encode(errors="surrogatepass") if isinstance(content, str) else content
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1
