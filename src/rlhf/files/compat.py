"""gcsfs internals that files/ relies on. Checked with gcsfs 2026.10.1."""

from typing import Any


def upload_address(filesystem: Any, bucket: str) -> str:
    """Return the address to which Google Cloud Storage takes uploads for a bucket."""
    return f"{filesystem._location}/upload/storage/v1/b/{bucket}/o"


def request(filesystem: Any, method: str, address: str, *parts: str, **options: Any) -> Any:
    """Send a request through gcsfs, with its credentials and retries.

    Args:
        filesystem: The gcsfs file system.
        method: GET, POST or DELETE.
        address: A URL, or a path under the service's URL, with `{}` for each of `parts`.
        *parts: Names to quote and insert.
        **options: `headers`, `data`, `json_out` to get the response as JSON; others become query
            parameters, such as `ifGenerationMatch`.

    Returns:
        The response's JSON, or its headers and content.
    """
    return filesystem.call(method, address, *parts, **options)
