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
from rlhf.files.hub import hub_commit, is_hub_id
from rlhf.files.local_copy import SETTINGS, local_folder, recorded_base
from rlhf.files.storage import find_files, is_remote, open_store, storage_errors
from rlhf.files.text import write_text
from rlhf.models.weights import loaded_fingerprint
from rlhf.untrusted import parse_json, read_json

WEIGHTS = "*.safetensors"
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
_DEEPEST = 10  # adapters on each other; loading refuses more
_SETS = {"target_modules", "exclude_modules"}  # peft writes these sets as lists in any order
_WORTH_REMEMBERING = 2**24  # bytes; smaller files are quick to hash
_SECONDS_OF_A_CLOCK_TICK = 0.1


def weights_fingerprint(path: str, revision: str | None = None, *, with_base: bool = True) -> str:
    """Return a hash of everything that determines a model's results: weights, settings, tokenizer.

    Args:
        path: A model, an adapter or a reward model: local folder, folder in a store, or Hub id.
        revision: Hub revision, if `path` is a Hub id.
        with_base: Whether the base that an adapter names counts too.

    Returns:
        A short hash, for a whole model on the Hub its commit; "" if nothing is there, such as a
        folder that a later stage of a dry run would write.
    """
    return _fingerprint(path, revision, _DEEPEST if with_base else 0)


def _fingerprint(path: str, revision: str | None, bases: int) -> str:
    """Return the fingerprint with at most so many bases, each of the one before, counted in."""
    if is_remote(path):
        found, folder = _remote_content(path)
    elif (folder := Path(path).expanduser()).is_dir():
        found = _local_content(folder)
    elif is_hub_id(path):
        try:
            commit = hub_commit(path, revision)
            folder = local_folder(path, weights=False, revision=commit)
        except InputError:
            return ""
        if not bases or not _names_base(folder):
            return commit
        found = {("", "commit"): commit}
    else:
        return ""
    if found and bases:
        found |= _base_content(folder, bases - 1)
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


def read_origin(folder: Path) -> dict[str, Any] | None:
    """Return the base, revision and fingerprint noted beside saved weights; None without a note.

    Raises:
        InputError: The note is not valid.
    """
    path = folder / ORIGIN
    if not path.is_file():
        return None
    try:
        origin: dict[str, Any] = parse_json(path.read_bytes())
        known = {name: origin[name] for name in ("base_model", "revision", "fingerprint")}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: not the note that rlhf writes: {error!r:.200}") from error
    if not isinstance(known["fingerprint"], str) or not all(
        value is None or isinstance(value, str) for value in known.values()
    ):
        raise InputError(f"{path}: not the note that rlhf writes: expected three strings")
    return origin


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
    """Map (part, name) to content."""
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
    return found


def _names_base(folder: Path) -> Path | None:
    """Return the file of a reward model or an adapter that names its base; None without one."""
    record, adapter = folder / "reward_model.json", folder / "adapter_config.json"
    if record.is_file():
        return None if (folder / "merged").is_dir() else record
    return adapter if adapter.is_file() else None


def _base_content(folder: Path, bases: int) -> dict[Any, str]:
    """Return the content of the base that a reward model or an adapter names, if it has one."""
    file = _names_base(folder)
    if file is None:
        return {}
    values = read_json(file) or {}
    if file.name == "adapter_config.json":
        values = read_json(folder / ORIGIN) or {
            "base_model": values.get("base_model_name_or_path"),
            "revision": values.get("revision"),
        }
    name, revision = values.get("base_model"), values.get("revision")
    content = ""
    if isinstance(name, str) and name and isinstance(revision, str | None):
        content = _fingerprint(*recorded_base(name, str(file), revision), bases)
    return {("", f"{file.name} base"): content}


def _remote_content(path: str) -> tuple[dict[Any, str], Path]:
    """Do the same for a folder in a store, whose own checksums identify its weights.

    Returns:
        The content, and a local copy of what is no weights.
    """
    try:
        folder = local_folder(path, weights=False)
    except InputError:
        return {}, Path()
    filesystem, root = open_store(path.rstrip("/"))
    with storage_errors(f"{path} cannot be read"):
        details = find_files(filesystem, root)
    weights = {}
    for name, info in details.items():
        if fnmatch(name, WEIGHTS):
            mark = next((str(info[key]) for key in _STORES_CHECKSUMS if info.get(key)), "")
            weights[name.removeprefix(root).strip("/")] = f"{info['size']} {mark}"
    return _local_content(folder, weights), folder


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
