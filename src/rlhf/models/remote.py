"""Folders in object stores, brought to local disk."""

import hashlib
import os
from pathlib import Path

import fsspec

from rlhf.errors import InputError


def local_folder(url: str) -> Path:
    """Copies a remote folder such as gs://bucket/model into the cache, once per content.

    The cache is `$RLHF_CACHE` or ~/.cache/rlhf; a changed object (size or checksum) makes a new
    copy.

    Args:
        url: Folder in any store that fsspec knows.

    Raises:
        InputError: There is no such folder, or it cannot be read.
    """
    url = url.rstrip("/")
    try:
        filesystem, root = fsspec.core.url_to_fs(url)
        found = {
            path: details
            for path, details in filesystem.find(root, detail=True).items()
            if details["type"] == "file"
        }
    except Exception as error:  # each store raises its own
        raise InputError(f"{url} cannot be read: {error}") from error
    if not found:
        raise InputError(f"{url}: there is nothing under this address")
    marks = sorted(
        f"{path} {d['size']} {d.get('etag') or d.get('md5Hash') or d.get('mtime') or ''}"
        for path, d in found.items()
    )
    name = hashlib.sha256("\n".join([url, *marks]).encode()).hexdigest()[:24]
    cache = Path(os.environ.get("RLHF_CACHE", Path.home() / ".cache" / "rlhf")) / "folders"
    target = cache / name
    if not target.is_dir():
        partial = cache / f"{name}.{os.getpid()}.partial"
        for path in found:
            local = partial / Path(path).relative_to(root)
            local.parent.mkdir(parents=True, exist_ok=True)
            filesystem.get_file(path, str(local))
        partial.rename(target)
    return target
