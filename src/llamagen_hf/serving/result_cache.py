"""Finished images that are kept: for requests that come again, and for clients that asked for an address."""

import secrets
from collections.abc import Hashable
from typing import Any

from cachetools import LRUCache, TTLCache

from .frontend import MEDIA_TYPES


OVERHEAD = 512  # bytes of a key and its entry, roughly


class ResultCache:
    """Images by everything that determines them. The least recently used ones are dropped first.

    Args:
        max_bytes (`int`): Size of all images together; 0 keeps none.
    """

    def __init__(self, max_bytes: int):
        self._images = LRUCache(max_bytes, getsizeof=lambda entry: len(entry[0]) + OVERHEAD)

    @property
    def bytes(self) -> int:
        """Size of the images that are kept."""
        return self._images.currsize

    def get(self, key: Hashable) -> tuple[bytes, Any] | None:
        """The file of an image and what was stored with it; `None` if it is not kept."""
        return self._images.get(key)

    def put(self, key: Hashable, file: bytes, facts: Any) -> None:
        """Keep an image, unless it is larger than the whole cache."""
        if len(file) + OVERHEAD <= self._images.maxsize:
            self._images[key] = (file, facts)


class UrlStore:
    """Images by names that can't be guessed, for a limited time.

    Args:
        max_bytes (`int`): Size of all images together. The least recently used ones are dropped first.
        seconds (`float`): How long an image is kept at most.
    """

    def __init__(self, max_bytes: int, seconds: float):
        self._images = TTLCache(max_bytes, seconds, getsizeof=lambda file: len(file) + OVERHEAD)

    @property
    def bytes(self) -> int:
        """Size of the images that are kept."""
        self._images.expire()
        return self._images.currsize

    def put(self, files: list[bytes], format: str) -> list[str]:
        """Keep the images of a request.

        Returns:
            `list[str]`: Their names.

        Raises:
            ValueError: If they do not fit together, so that the last would drop the first.
        """
        size = sum(len(file) + OVERHEAD for file in files)
        if size > self._images.maxsize:
            raise ValueError(
                f"The images take {size / 2**20:.1f} MiB, and the server keeps {self._images.maxsize / 2**20:g} MiB "
                "for addresses; ask for `b64_json`, or for fewer or smaller images."
            )
        names = [f"{secrets.token_urlsafe(24)}.{format}" for _ in files]
        self._images.update(zip(names, files, strict=True))
        return names

    def get(self, name: str) -> tuple[bytes, str] | None:
        """The file of an image and its media type; `None` if it is not kept."""
        file = self._images.get(name)
        return None if file is None else (file, MEDIA_TYPES[name.rpartition(".")[2]])
