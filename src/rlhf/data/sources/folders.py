"""Folders as data sets: all data files in them, or what `datasets.save_to_disk` wrote."""

import json
import re
from collections.abc import Callable, Sequence
from typing import IO

from rlhf.data.sources.formats import format_of, suffixes
from rlhf.errors import InputError

_STATE, _SPLITS = "state.json", "dataset_dict.json"
_ABOUT = frozenset((_STATE, _SPLITS, "dataset_info.json", "dataset_infos.json"))
_SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)(?![a-z])")
_MOST_BYTES = 2**20


def data_files(
    folder: str, names: Sequence[str], folders: Sequence[str], read: Callable[[str], IO[bytes]]
) -> list[str]:
    """Choose the data files of a folder.

    Args:
        folder: Its path or address, for messages.
        names: Names of the files directly in it.
        folders: Names of the folders directly in it.
        read: Opens one of the files.

    Returns:
        Their names, sorted, or in the order in which `datasets` wrote them.

    Raises:
        InputError: There are none, or they are not one data set.
    """
    if _SPLITS in names:
        raise InputError(
            f"{folder} holds the splits {', '.join(sorted(folders))}; give one of them, such as "
            f"{folder}/{sorted(folders)[0] if folders else 'train'}"
        )
    if _STATE in names:
        return _saved_files(folder, names, read)
    files = sorted(name for name in names if name[0] not in "._" and name not in _ABOUT)
    formats = {name: format_of(name) for name in files}
    files = [name for name in files if formats[name] is not None]
    if not files:
        inner = f"; perhaps in {folder}/{sorted(folders)[0]}" if folders else ""
        raise InputError(f"{folder} is a folder without data files ({suffixes()}){inner}")
    kinds = sorted({one.name for one in formats.values() if one is not None})
    if len(kinds) > 1:
        raise InputError(
            f"{folder} holds files of several formats ({', '.join(kinds)}), expected one; "
            f"give a pattern, such as {folder}/*.{files[0].partition('.')[2]}"
        )
    splits = sorted({match.group(1) for name in files if (match := _SPLIT.match(name))})
    if len(splits) > 1:
        raise InputError(
            f"{folder} holds several splits ({', '.join(splits)}), expected one; give a pattern, "
            f"such as {folder}/{splits[0]}*"
        )
    return files


def _saved_files(folder: str, names: Sequence[str], read: Callable[[str], IO[bytes]]) -> list[str]:
    """Return the files that `datasets.save_to_disk` listed."""
    try:
        with read(_STATE) as file:
            state = json.loads(file.read(_MOST_BYTES))
        files = [str(entry["filename"]) for entry in state["_data_files"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{folder}: {_STATE} is damaged; save the data set again") from None
    missing = [name for name in files if name not in names]
    if missing:
        raise InputError(f"{folder}: {missing[0]:.200} is missing; save the data set again")
    if not files or state.get("_indices_data_files"):
        raise InputError(f"{folder} holds no whole data set; save it again with save_to_disk")
    return files
