"""Settings of the API process, read from the environment once."""

from pydantic import Field, SecretStr

from infra.settings import InfraSettings


class ServiceSettings(InfraSettings):
    """What the API process needs beyond what every process needs."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(default=8000, ge=1, le=65535)
    """Port to listen on."""
    s3_public_endpoint: str | None = None
    """The object store's address as clients see it, for download links; null is the one this process uses."""
    max_body_bytes: int = Field(default=1_000_000, ge=1_000)
    """Largest request body."""
    presign_seconds: int = Field(default=900, ge=1, le=900)
    """How long a download link works."""
    session_seconds: int = Field(default=12 * 3600, ge=60)
    """How long a dashboard login lasts."""
    bootstrap_key: SecretStr | None = None
    """An API key of the default tenant that is made at start when it is not there."""

    def secrets(self) -> tuple[SecretStr, ...]:
        """Return what must never show in a log."""
        known = (self.s3_access_key, self.s3_secret_key, self.key_pepper, self.bootstrap_key)
        return tuple(secret for secret in known if secret is not None)
