"""What files use of gcsfs beyond its public interface. Checked with gcsfs 2026.10.1."""

from typing import Any


def upload_address(filesystem: Any, bucket: str) -> str:
    """Return where Google Cloud Storage takes a bucket's uploads."""
    return f"{filesystem._location}/upload/storage/v1/b/{bucket}/o"


def request(filesystem: Any, method: str, address: str, *parts: str, **options: Any) -> Any:
    """Send a request as gcsfs does, with its credentials and its retries.

    Args:
        filesystem: gcsfs' own.
        method: GET, POST or DELETE.
        address: A URL, or one below the service's, in which `{}` stand for `parts`.
        *parts: Names in it, to be quoted.
        **options: `headers`, `data`, `json_out` to get the answer's JSON; others are put into the
            URL, such as `ifGenerationMatch`.

    Returns:
        The answer's JSON, or its headers and content.
    """
    return filesystem.call(method, address, *parts, **options)
