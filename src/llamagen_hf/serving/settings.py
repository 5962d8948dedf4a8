"""Settings of a server."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ServingSettings:
    """Limits and options of a server.

    Args:
        model_name (`str`): Name of the checkpoint in the API.
        max_pending (`int`, *optional*, defaults to 256): Images that may wait or be generated; more get 429.
        max_images (`int`, *optional*, defaults to 10): Images of one request.
        timeout (`float`, *optional*, defaults to 300): Seconds that a request may take; then it gets 504.
        cache_bytes (`int`, *optional*, defaults to 256 MiB): Size of the cache of images whose request had a seed.
        url_bytes (`int`, *optional*, defaults to 256 MiB): Size of the images that can be fetched by their address.
        url_seconds (`float`, *optional*, defaults to 3600): How long they can be fetched.
        public_url (`str`, *optional*): Beginning of these addresses; by default the address that the client used.
        response_format (`"b64_json"` or `"url"`, *optional*, defaults to `"b64_json"`):
            For requests that do not say which.
        any_size (`bool`, *optional*, defaults to `False`):
            Whether to scale images to sizes that the checkpoint does not generate, instead of refusing them.
        cors_origins (`tuple[str, ...]`, *optional*): Origins of web pages that may call the server; "*" for all.
        api_key (`str`, *optional*): Bearer token that clients must send.
        rate_limit (`str`, *optional*): Requests of one client address, such as "60/minute"; more get 429.
        max_body_bytes (`int`, *optional*, defaults to 16 MiB): Size of a request with its uploads; more get 413.
        drain_seconds (`float`, *optional*, defaults to 120): How long active requests have after SIGTERM.
        log_prompts (`bool`, *optional*, defaults to `False`): Whether the log contains prompts.
    """

    model_name: str
    max_pending: int = 256
    max_images: int = 10
    timeout: float = 300.0
    cache_bytes: int = 256 * 2**20
    url_bytes: int = 256 * 2**20
    url_seconds: float = 3600.0
    public_url: str | None = None
    response_format: Literal["b64_json", "url"] = "b64_json"
    any_size: bool = False
    cors_origins: tuple[str, ...] = ()
    api_key: str | None = None
    rate_limit: str | None = None
    max_body_bytes: int = 16 * 2**20
    drain_seconds: float = 120.0
    log_prompts: bool = False
