"""What Google Cloud takes for the name of a thing, so that a wrong one is found before it is sent.

Each check returns what is wrong, without the field's name, or "" for a name that can exist.
"""

import re

from rlhf.config.describe import nearest

# Vertex AI's regions; a test compares them with its client library's, which refuses all others.
REGIONS = (
    "africa-south1",
    "asia-east1",
    "asia-east2",
    "asia-northeast1",
    "asia-northeast2",
    "asia-northeast3",
    "asia-south1",
    "asia-south2",
    "asia-southeast1",
    "asia-southeast2",
    "australia-southeast1",
    "australia-southeast2",
    "europe-central2",
    "europe-north1",
    "europe-north2",
    "europe-southwest1",
    "europe-west1",
    "europe-west2",
    "europe-west3",
    "europe-west4",
    "europe-west6",
    "europe-west8",
    "europe-west9",
    "europe-west12",
    "me-central1",
    "me-central2",
    "me-west1",
    "northamerica-northeast1",
    "northamerica-northeast2",
    "southamerica-east1",
    "southamerica-west1",
    "us-central1",
    "us-east1",
    "us-east4",
    "us-east5",
    "us-east7",
    "us-south1",
    "us-west1",
    "us-west2",
    "us-west3",
    "us-west4",
    "us-west8",
)
_PLACEHOLDER = re.compile(r"(?i)\byour[-_ ]?[a-z]+[\w-]*|<[^>]*>|\$\{?\w+\}?|\{+[^}]*\}+|…|\.\.\.")
# A part of an ID between slashes.
_PART = r"[A-Za-z0-9._:-]+"
# By field: what its value looks like, and how that is said.
_SHAPES = {
    "project": (
        # Old ones have the organization's domain in front. Vertex takes a project's number too, but
        # the registry of the default image does not.
        r"([a-z0-9.-]+\.[a-z]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]",
        "a project ID: 6 to 30 lower case letters, digits and -, the first a letter",
    ),
    "service_account": (
        r"[a-z0-9][a-z0-9.-]*@([a-z0-9-]+\.)*gserviceaccount\.com",
        "an address such as NAME@PROJECT.iam.gserviceaccount.com",
    ),
    "network": (
        r"projects/[0-9]+/global/networks/[a-z]([a-z0-9-]{0,61}[a-z0-9])?",
        "projects/NUMBER/global/networks/NAME, with the project's number (gcloud projects "
        "describe PROJECT --format='value(projectNumber)')",
    ),
    "tensorboard_resource_id": (
        rf"projects/{_PART}/locations/{_PART}/tensorboards/[0-9]+",
        "projects/P/locations/L/tensorboards/NUMBER",
    ),
    "encryption_spec_key_name": (
        rf"projects/{_PART}/locations/{_PART}/keyRings/{_PART}/cryptoKeys/{_PART}",
        "projects/P/locations/L/keyRings/R/cryptoKeys/K, without a version",
    ),
    "huggingface_token_secret": (
        rf"[A-Za-z0-9_-]{{1,255}}|projects/{_PART}/secrets/[A-Za-z0-9_-]{{1,255}}"
        rf"(/versions/{_PART})?",
        "NAME or projects/P/secrets/NAME/versions/V",
    ),
    "image": (
        r"[a-z0-9][a-z0-9.-]*(:[0-9]+)?(/[a-z0-9]+([._-]+[a-z0-9]+)*)+"
        r"(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@sha256:[0-9a-f]{64})?",
        "HOST/PROJECT/REPOSITORY/NAME:TAG or …/NAME@sha256:DIGEST",
    ),
}
_SHAPES["serving_container_image"] = _SHAPES["image"]
# 3 to 222 characters; dots divide it into parts of at most 63.
_BUCKET = re.compile(
    r"(?=.{3,222}$)[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?)*"
)
_LABEL_KEY = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_LABEL_VALUE = re.compile(r"[a-z0-9_-]{0,63}")
# Google's limit of 64.
MOST_LABELS = 64


def placeholder(text: str) -> str:
    """Return the part of a text that was to be replaced, such as YOUR-BUCKET; "" for none."""
    found = _PLACEHOLDER.search(text)
    return found[0] if found else ""


def _left_in(text: str) -> str:
    found = placeholder(text)
    return f"{text} still has the placeholder {found}; put your own in its place" if found else ""


def region(name: str) -> str:
    """Check a region of Vertex AI."""
    if left := _left_in(name):
        return left
    if name in REGIONS:
        return ""
    zone = re.fullmatch(r"(.+)-[a-f]", name)
    if zone and zone[1] in REGIONS:
        return f"{name} is a zone; expected its region, {zone[1]}"
    return f"{name!r} is no region of Vertex AI{nearest(name.lower(), REGIONS)}"


def shape(field: str, value: str) -> str:
    """Check a name whose form is known: account, network, key, secret, image."""
    pattern, expected = _SHAPES[field]
    # A token pasted by mistake must not show up in an error.
    secret = field == "huggingface_token_secret"
    if not secret and (left := _left_in(value)):
        return left
    if re.fullmatch(pattern, value):
        return ""
    return f"expected {expected}" + ("" if secret else f", got {value!r:.200}")


def address(path: str, *, written: bool = False) -> str:
    """Check an address in a bucket, gs:// or /gcs/; anything else has no bucket to look at.

    Args:
        path: The address, which may be a glob where it is read.
        written: Whether objects are to be made there.
    """
    if left := _left_in(path):
        return left
    parts = path.rstrip("/").split("/")[3:]
    if ".." in parts or "." in parts or any(ord(character) < 32 for character in path):
        return f"{path!r}: expected no . or .. between slashes, and no control characters"
    if written and ("" in parts or re.search(r"[*?\[\]#]", path)):
        return f"{path}: expected no empty part, and none of * ? [ ] #"
    for start in ("gs://", "/gcs/"):
        if path.startswith(start):
            bucket = path.removeprefix(start).split("/")[0]
            reserved = bucket.startswith("goog") or "google" in bucket
            numbers = bucket.replace(".", "").isdecimal() and bucket.count(".") == 3
            if not _BUCKET.fullmatch(bucket) or numbers or (written and reserved):
                return (
                    f"{path}: {bucket!r} cannot be a bucket; expected 3 to 63 lower case letters, "
                    "digits, -, _ and ., no IP address, and no name of Google's"
                )
    return ""


def labels(given: dict[str, str]) -> list[str]:
    """Check labels of pipeline and jobs."""
    found = [
        f"{name}={value}: expected lower case letters, digits, - and _, at most 63, the name "
        "beginning with a letter"
        for name, value in given.items()
        if not (_LABEL_KEY.fullmatch(name) and _LABEL_VALUE.fullmatch(value))
    ]
    found += [f"{name}: names in goog- are Google's own" for name in given if name[:5] == "goog-"]
    if len(given) > MOST_LABELS:
        found.append(f"there are {len(given)}; at most {MOST_LABELS} are taken")
    return found


def region_of(resource: str) -> str:
    """Return the location in a resource's name, projects/P/locations/L/…; "" without one."""
    found = re.match(r"projects/[^/]+/locations/([^/]+)/", resource)
    return found[1] if found else ""
