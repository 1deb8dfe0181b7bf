"""Settings of the API process, read from the environment once."""

from typing import Literal

from pydantic import Field, SecretStr

from infra.settings import InfraSettings, Words


class ServiceSettings(InfraSettings):
    """What the API process needs beyond what every process needs."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(default=8000, ge=1, le=65535)
    """Port to listen on."""
    api_processes: int = Field(default=1, ge=1, le=64)
    """Processes that serve the port, each with a core at most; rate and stream limits are counted in each."""
    s3_public_endpoint: str | None = None
    """The object store's address as clients see it, for download links; null is the one this process uses."""
    max_body_bytes: int = Field(default=1_000_000, ge=1_000)
    """Largest request body."""
    max_text_bytes: int = Field(default=100_000_000, ge=1_000)
    """Largest text that may be uploaded."""
    rate_limit_per_second: float = Field(default=500, ge=0, le=1e6)
    """Requests a second that one API key may send for long, in each API process; 0 switches the limit off."""
    rate_limit_burst: int = Field(default=1000, ge=1, le=1_000_000)
    """Requests that one API key may send at once."""
    max_event_streams: int = Field(default=20, ge=1, le=10_000)
    """Event streams that one API key may have open at once, in each API process; a dashboard page is one, too."""
    key_memory_seconds: float = Field(default=1.0, ge=0, le=60)
    """How long a key that was revoked through another API process may still work; 0 looks every key up each time."""
    presign_seconds: int = Field(default=900, ge=1, le=900)
    """How long a download link works."""
    idempotency_hours: int = Field(default=24, ge=1)
    """How long the answer to a request with an Idempotency-Key is kept."""
    session_seconds: int = Field(default=12 * 3600, ge=60)
    """How long a dashboard login lasts."""
    metrics_access: Literal["loopback", "open", "key"] = "loopback"
    """Who may read /metrics without an API key: this machine, anybody, or nobody."""
    webhook_networks: Words = ()
    """Private networks that webhooks may go to, as 10.1.0.0/16; there also over http and to any port."""
    bootstrap_key: SecretStr | None = None
    """An API key of the default tenant that is made at start when it is not there."""

    def secrets(self) -> tuple[SecretStr, ...]:
        """Return what must never show in a log."""
        known = (self.s3_access_key, self.s3_secret_key, self.key_pepper, self.bootstrap_key)
        return tuple(secret for secret in known if secret is not None)
