"""The jobs' container image: which torch it contains, and the digest behind its tag."""

import re
from typing import Any

from rlhf import __version__
from rlhf.errors import InputError

# Default of `_VARIANT` in containers/cloudbuild.yaml.
DEFAULT_CUDA = 126
_HOST = re.compile(r"([a-z0-9-]+\.)?gcr\.io|[a-z0-9-]+-docker\.pkg\.dev")
# Kinds of manifest that a registry may answer with.
_MANIFESTS = ", ".join(
    (
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    )
)


def cuda_of(image: str, known: int | None = None) -> int | None:
    """Return the CUDA build of torch in an image, 126 for 12.6 and 0 for a CPU build.

    Args:
        image: Its address; "" for the default one.
        known: The build, if already known.

    Returns:
        The build named by the end of the tag, or the default one; None if the tag does not tell.
    """
    if known is not None:
        return known
    tag = image.partition("@")[0].rpartition(":")[2]
    if found := re.search(r"(?:^|[-._])(?:cu(\d{3})|cpu)$", tag):
        return int(found[1] or 0)
    return DEFAULT_CUDA if image == "" or image.endswith(f"/rlhf/rlhf:{__version__}") else None


def pinned(image: str, session: Any) -> tuple[str, str]:
    """Replace an image's tag with the digest it points to now.

    Tags can move, and the jobs of one run start hours apart: with a digest all of them, and those
    that continue the run, get the same image.

    Args:
        image: Address with a tag or a digest.
        session: A `requests` session with Google Cloud credentials.

    Returns:
        The address, and a sentence for the user, or "".

    Raises:
        InputError: If the registry has no such image.
    """
    if "@" in image:
        return image, ""
    host, _, path = image.partition("/")
    name, _, tag = path.partition(":")
    if not _HOST.fullmatch(host):
        return image, f"image: {host} is not asked for the digest; a tag may be moved, give one"
    address = f"https://{host}/v2/{name}/manifests/{tag or 'latest'}"
    try:
        answer = session.head(address, headers={"Accept": _MANIFESTS}, timeout=30)
    except Exception as error:  # from requests or google-auth
        return image, f"image: its digest cannot be looked up: {error}"
    if answer.status_code == 404:
        raise InputError(
            f"vertex.image: there is no {image}; build and push it (docs/vertex.md, section 3), or "
            "correct the address"
        )
    digest = answer.headers.get("Docker-Content-Digest", "")
    if answer.status_code != 200 or not re.fullmatch("sha256:[0-9a-f]{64}", digest):
        return image, (
            f"image: its digest cannot be looked up ({answer.status_code}); a tag may be moved "
            "during a run: give the digest, or get roles/artifactregistry.reader"
        )
    return f"{host}/{name}@{digest}", f"image: {tag or 'latest'} is {digest} now"
