"""Finished images, for those who ask again, and for those who asked for an address."""

import secrets
from collections.abc import Hashable

from cachetools import LRUCache, TTLCache

from .front import MEDIA_TYPES


OVERHEAD = 512  # bytes of a key and its place, roughly


class ResultCache:
    """Images by everything that determines them, the least recently used of them leaving first.

    Args:
        max_bytes (`int`): Of all images; 0 keeps none.
    """

    def __init__(self, max_bytes: int):
        self._images = LRUCache(max_bytes, getsizeof=lambda item: len(item[0]) + OVERHEAD)

    @property
    def bytes(self) -> int:
        return self._images.currsize

    def get(self, key: Hashable) -> tuple[bytes, dict] | None:
        """An image's file and the facts that came with it."""
        return self._images.get(key)

    def put(self, key: Hashable, file: bytes, facts: dict) -> None:
        """Keep an image, unless it is larger than the whole cache."""
        if len(file) + OVERHEAD <= self._images.maxsize:
            self._images[key] = (file, facts)


class UrlStore:
    """Images by names that nobody can guess, for a while.

    Args:
        max_bytes (`int`): Of all images; the least recently used leave first.
        seconds (`float`): How long one stays at the most.
    """

    def __init__(self, max_bytes: int, seconds: float):
        self._images = TTLCache(max_bytes, seconds, getsizeof=lambda file: len(file) + OVERHEAD)

    @property
    def bytes(self) -> int:
        self._images.expire()
        return self._images.currsize

    def put(self, files: list[bytes], format: str) -> list[str]:
        """Keep the images of a request.

        Returns:
            `list[str]`: Their names.

        Raises:
            ValueError: In one sentence, if all of them do not fit, so that the last would push the first out.
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
        """An image's file and media type."""
        file = self._images.get(name)
        return None if file is None else (file, MEDIA_TYPES[name.rpartition(".")[2]])
