"""Files written atomically: a reader (or a crash) sees the whole file or none of it."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from rlhf.errors import InputError
from rlhf.files.disk import rename, settle
from rlhf.files.owners import remove_abandoned, temporary, temporary_name
from rlhf.files.storage import is_remote, open_store, reason, storage_errors, upload


@contextmanager
def appears_whole(target: Path) -> Iterator[Path]:
    """Yield a path to write to; at the end of the block what is there is renamed to `target`.

    The result survives a power failure. After an error nothing is left, and what a killed process
    left is removed by the next one that writes the same file.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(target.parent, f".{target.name}-")
    partial = target.with_name(temporary_name(f".{target.name}"))
    try:
        yield partial
        settle(partial)
        rename(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str | Iterable[str]) -> None:
    """Write a whole local file from one string or from pieces."""
    with appears_whole(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines([text] if isinstance(text, str) else text)


@contextmanager
def whole_file(path: str, field: str) -> Iterator[IO[bytes]]:
    """Open a file that the user names for writing in pieces, locally or in a store.

    Args:
        path: Where to write it.
        field: Configuration field that names it, for messages.

    Raises:
        InputError: It cannot be created there.
        StorageError: The store failed.
    """
    if is_remote(path):
        with _uploaded_file(path, field) as file:
            yield file
        return
    with ExitStack() as stack:
        try:
            if Path(path).is_dir():
                raise InputError(f"{field}: {path} is a folder, expected a file")
            partial = stack.enter_context(appears_whole(Path(path)))
            file = stack.enter_context(partial.open("wb"))
        except OSError as error:
            raise InputError(f"{field}: {path} cannot be written: {reason(error)}") from error
        yield file


@contextmanager
def _uploaded_file(path: str, field: str) -> Iterator[IO[bytes]]:
    try:
        filesystem, root = open_store(path)
    except (ImportError, ValueError) as error:
        raise InputError(f"{field}: {path} cannot be written: {error}") from error
    with temporary("upload") as folder:
        with (folder / "file").open("wb") as file:
            yield file
        with storage_errors(f"{field}: {path} cannot be written"):
            upload(filesystem, str(folder / "file"), root)


def json_safe(value: Any) -> Any:
    """Return the value with null for numbers that JSON cannot represent (NaN, infinity)."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: json_safe(item) for name, item in value.items()}
    return [json_safe(item) for item in value] if isinstance(value, list | tuple) else value


def to_json(value: Any) -> str:
    """Return indented JSON with a final newline."""
    return json.dumps(json_safe(value), indent=2, ensure_ascii=False) + "\n"
