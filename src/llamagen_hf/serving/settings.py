"""What a server is told when it starts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ServingSettings:
    """Limits and habits of a server.

    Args:
        model_name (`str`): What `GET /v1/models` calls the checkpoint.
        max_pending (`int`, *optional*, defaults to 256): Images that may wait or be drawn; more get 429.
        max_images (`int`, *optional*, defaults to 10): Images of one request.
        timeout (`float`, *optional*, defaults to 300): Seconds that a request may take; then it gets 504.
        cache_bytes (`int`, *optional*, defaults to 256 MiB): Of finished images that were asked for with a seed.
        url_bytes (`int`, *optional*, defaults to 256 MiB): Of images that can be fetched by their address.
        url_seconds (`float`, *optional*, defaults to 3600): How long they can.
        public_url (`str`, *optional*): What these addresses begin with; by default what the client called.
        response_format (`str`, *optional*, defaults to `"b64_json"`): Or "url", for requests that do not say it.
        any_size (`bool`, *optional*, defaults to `False`):
            Whether to scale images to sizes that the checkpoint does not draw, in place of refusing them.
        cors_origins (`tuple[str, ...]`, *optional*): Origins of web pages that may call the server; "*" for all.
        api_key (`str`, *optional*): What clients must send as a bearer token.
        rate_limit (`str`, *optional*): Requests of one client address, such as "60/minute"; more get 429.
        max_body_bytes (`int`, *optional*, defaults to 16 MiB): Of a request, an uploaded image among them.
        drain_seconds (`float`, *optional*, defaults to 120): How long running requests have after SIGTERM.
        log_prompts (`bool`, *optional*, defaults to `False`): Whether logs contain prompts.
    """

    model_name: str
    max_pending: int = 256
    max_images: int = 10
    timeout: float = 300.0
    cache_bytes: int = 256 * 2**20
    url_bytes: int = 256 * 2**20
    url_seconds: float = 3600.0
    public_url: str | None = None
    response_format: str = "b64_json"
    any_size: bool = False
    cors_origins: tuple[str, ...] = ()
    api_key: str | None = None
    rate_limit: str | None = None
    max_body_bytes: int = 16 * 2**20
    drain_seconds: float = 120.0
    log_prompts: bool = False
