"""Identify a model by its content: the identity changes only if the model's results may change.

Weights count byte by byte, settings by their meaning. The order of keys, library versions, folder
names and any logs or figures next to them do not matter.
"""

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.errors import InputError
from rlhf.files.disk import cache_folder, checksum
from rlhf.files.local_copy import local_folder, recorded_base
from rlhf.files.storage import find_files, is_remote, open_store, storage_errors
from rlhf.files.text import write_text
from rlhf.models.weights import loaded_fingerprint
from rlhf.untrusted import read_json

WEIGHTS = "*.safetensors"
# Files that loaders read besides weights.
SETTINGS = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "reward_model.json",
    "*.safetensors.index.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
)
# Subfolders of a reward model; any other subfolder belongs to something else.
PARTS = ("adapter", "merged")
# Lies beside saved weights and holds their checksums by file name.
ORIGIN = "rlhf.json"
_WITHOUT_MEANING = {
    "transformers_version",
    "peft_version",
    "version",
    "_name_or_path",
    "name_or_path",
    "base_model_name_or_path",
    "base_model",
    "revision",
    "files",
}
# Fields of a stored object, best first; not every store has all of them.
_STORES_CHECKSUMS = ("md5Hash", "crc32c", "etag", "ETag", "mtime", "created")
_SETS = {"target_modules", "exclude_modules"}  # peft writes these sets as lists in any order
_WORTH_REMEMBERING = 2**24  # bytes; smaller files are quick to hash
_SECONDS_OF_A_CLOCK_TICK = 0.1


def weights_fingerprint(path: str, revision: str | None = None) -> str:
    """Return a hash of everything that determines a model's results: weights, settings, tokenizer.

    Args:
        path: A model, an adapter or a reward model: local folder, folder in a store, or Hub id.
        revision: Hub revision, if `path` is a Hub id.

    Returns:
        A short hash; "" if nothing is there, such as a folder that a later stage of a dry run
        would write.
    """
    if is_remote(path):
        found = _remote_content(path)
    elif Path(path).expanduser().is_dir():
        found = _local_content(Path(path).expanduser())
    else:
        return _commit(path, revision)
    if not found:
        return ""
    digest = hashlib.sha256()
    for (part, name), content in sorted(found.items()):
        digest.update(f"{part}/{name} {content}\n".encode())
    return digest.hexdigest()[:16]


def model_fingerprint(model: Any) -> str:
    """Return a hash of the weights and settings of a model given as an object."""
    settings = json.loads(json.dumps(model.config.to_dict(), default=str))
    return f"{loaded_fingerprint(model)}-{_hash_of_settings(settings)[:8]}"


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a short hash of the vocabulary; if two hashes match, so do the tokenizers' ids."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


def check_written(folder: Path) -> None:
    """Refuse weights that have changed since they were written.

    Raises:
        InputError: A file does not match its checksum in rlhf.json.
    """
    for name, expected in _written(folder).items():
        path = folder / name
        if path.is_file() and remembered_checksum(path) != expected:
            raise InputError(
                f"{path} does not match the checksum that was written with it: the file was "
                "damaged or changed. Restore it, or rerun the stage that made it"
            )


def remembered_checksum(path: Path) -> str:
    """Return the SHA-256 of a file, computed once while the file stays unchanged.

    Checksums of large files are cached (in `$RLHF_CACHE` or ~/.cache/rlhf) by path, size, times and
    inode; a cache that is damaged or not writable only costs time.
    """
    before = path.stat()
    if before.st_size < _WORTH_REMEMBERING:
        return checksum(path)
    marks = (before.st_dev, before.st_ino, before.st_size, before.st_mtime_ns, before.st_ctime_ns)
    name = hashlib.sha256(f"{path.resolve()} {marks}".encode()).hexdigest()[:32]
    note = cache_folder() / "checksums" / name
    with contextlib.suppress(OSError, ValueError):
        if re.fullmatch("[0-9a-f]{64}", known := note.read_text(encoding="ascii")):
            return known
    found = checksum(path)
    after = path.stat()
    # A change within one clock tick would not show in the times.
    settled = time.time() - max(after.st_mtime, after.st_ctime) > _SECONDS_OF_A_CLOCK_TICK
    if settled and after.st_mtime_ns == before.st_mtime_ns:
        with contextlib.suppress(OSError):
            write_text(note, found)
    return found


def written_checksums(folder: Path) -> dict[str, str]:
    """Return the checksums of a folder's weights, for the rlhf.json beside them."""
    return {path.name: remembered_checksum(path) for path in sorted(folder.glob(WEIGHTS))}


def _local_content(folder: Path, weights: dict[str, str] | None = None) -> dict[Any, str]:
    """Map (part, name) to content; for a reward model on a base, include that base."""
    record = folder / "reward_model.json"
    parts = ("", *PARTS) if record.is_file() else ("",)
    found: dict[Any, str] = {}
    for part in parts:
        if not (folder / part).is_dir():
            continue
        for path in sorted((folder / part).iterdir()):
            if path.is_file() and any(fnmatch(path.name, pattern) for pattern in SETTINGS):
                found[part, path.name] = _meaning(path)
            elif weights is None and path.is_file() and fnmatch(path.name, WEIGHTS):
                found[part, path.name] = remembered_checksum(path)
    for name, content in (weights or {}).items():
        part, _, file = name.rpartition("/")
        if part in parts:
            found[part, file] = content
    if record.is_file() and not (folder / "merged").is_dir():
        found["", "reward_model.json base"] = _recorded_content(record)
    return found


def _recorded_content(record: Path) -> str:
    """Return the content of the base that a reward model's record names, if it can be read."""
    values = read_json(record) or {}
    name, revision = values.get("base_model"), values.get("revision")
    if not isinstance(name, str) or not name or not isinstance(revision, str | None):
        return ""
    return weights_fingerprint(recorded_base(name, str(record)), revision)


def _remote_content(path: str) -> dict[Any, str]:
    """Do the same for a folder in a store, whose own checksums identify its weights."""
    try:
        folder = local_folder(path, weights=False)
    except InputError:
        return {}
    filesystem, root = open_store(path.rstrip("/"))
    with storage_errors(f"{path} cannot be read"):
        details = find_files(filesystem, root)
    weights = {}
    for name, info in details.items():
        if fnmatch(name, WEIGHTS):
            mark = next((str(info[key]) for key in _STORES_CHECKSUMS if info.get(key)), "")
            weights[name.removeprefix(root).strip("/")] = f"{info['size']} {mark}"
    return _local_content(folder, weights)


def _commit(name: str, revision: str | None) -> str:
    """Return the commit of a model on the Hub; "" if there is no such model."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        return ""
    try:
        file = hf_hub_download(name, "config.json", revision=revision)
    except (OSError, ValueError, HFValidationError, HfHubHTTPError):
        return ""
    return Path(file).parent.name  # …/snapshots/COMMIT/config.json


def _meaning(path: Path) -> str:
    """Hash a settings file: JSON by what it says, anything else by its bytes."""
    content = path.read_bytes()
    if path.suffix == ".json":
        value = read_json(path)
        if value:
            return _hash_of_settings(value)
    return hashlib.sha256(content).hexdigest()


def _hash_of_settings(value: Mapping[str, Any]) -> str:
    kept = {
        name: sorted(item, key=str) if name in _SETS and isinstance(item, list) else item
        for name, item in value.items()
        if name not in _WITHOUT_MEANING
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _written(folder: Path) -> dict[str, str]:
    """Return names and checksums from rlhf.json; {} if there are none or they are unreadable."""
    files = (read_json(folder / ORIGIN) or {}).get("files")
    if not isinstance(files, dict):
        return {}
    return {
        name: value
        for name, value in files.items()
        if isinstance(value, str) and Path(name).name == name
    }
