"""Files from the Hugging Face hub: from the network or its cache, else one line that says how to place them by hand."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from mmrep.errors import CheckpointError

WANTED = ("*.json", "*.safetensors", "*.txt", "*.model", "files/**")
"""Of a repository: configs, weights without code, tokenizers."""


def fetch_from_hub(repository: str) -> Path:
    """The folder of a repository at the hub: see `WANTED`.

    Raises:
        CheckpointError: If it is in no cache and cannot be fetched.
    """
    from huggingface_hub import snapshot_download

    return fetched(lambda: snapshot_download(repository, allow_patterns=list(WANTED)), repository)


def fetch_pretrained(known: Mapping[str, Any], name: str) -> Path:
    """The weights file of an entry of open_clip's list of pretrained models.

    Args:
        known: The entry.
        name: For the message.

    Raises:
        CheckpointError: If it is in no cache and cannot be fetched.
    """
    import open_clip

    if known.get("hf_hub") and not online():
        return fetched(lambda: _cached(known["hf_hub"]), name)
    return fetched(lambda: open_clip.download_pretrained(dict(known)), name)


def _cached(place: str) -> str:
    """A file of the hub's cache; safetensors before what else there is, as open_clip does."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

    repository, _, file = place.rpartition("/")
    file = file or HF_WEIGHTS_NAME
    safe = HF_SAFE_WEIGHTS_NAME if file == HF_WEIGHTS_NAME else f"{file.rpartition('.')[0]}.safetensors"
    try:
        return hf_hub_download(repository, safe, local_files_only=True)
    except LocalEntryNotFoundError:
        return hf_hub_download(repository, file, local_files_only=True)


def fetched(fetch: Callable[[], Any], name: str) -> Path:
    """The path that ``fetch`` gives.

    Raises:
        CheckpointError: In one line, whatever it raised.
    """
    try:
        with without_waiting():
            return Path(fetch())
    except Exception as error:  # offline, no such repository, no access: the hub's client has a dozen types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        told = f"cannot be fetched ({type(error).__name__}: {reason[:120]})"
        raise CheckpointError(
            told if online() else "in no cache, and there is no network to fetch it from",
            where=name,
            fix="check the name and the network, or download the files by hand and give their folder",
        ) from error


@contextmanager
def without_waiting() -> Iterator[None]:
    """Tell the hub's client that there is no network, where there is none: it looks into its cache and does not try again."""
    if online():
        yield
        return
    with offline():
        yield


@contextmanager
def offline() -> Iterator[None]:
    """Keep the hub's client from the network, whatever a config names."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def online() -> bool:
    """Whether the hub's host has an address, or a proxy is set: without one its client would try again for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if any(scheme != "no" for scheme in getproxies()):
        return True
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True
