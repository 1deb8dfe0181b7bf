"""`python -m infra.deploy.make_env > .env`: fresh secrets for docker-compose.yml."""

import secrets
import sys

from infra.keys import new_token


def make_env(s3_public_endpoint: str = "http://127.0.0.1:8333") -> dict[str, str]:
    """Return every variable that docker-compose.yml has no default for."""
    return {
        "POSTGRES_PASSWORD": secrets.token_hex(24),
        "DUQUANT_S3_ACCESS_KEY": secrets.token_hex(10),
        "DUQUANT_S3_SECRET_KEY": secrets.token_hex(24),
        "DUQUANT_S3_PUBLIC_ENDPOINT": s3_public_endpoint,
        "DUQUANT_KEY_PEPPER": secrets.token_hex(32),
        "DUQUANT_API_KEY": new_token(),
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }


def main() -> None:
    """Print the file."""
    lines = [f"{name}={value}" for name, value in make_env(*sys.argv[1:2]).items()]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
