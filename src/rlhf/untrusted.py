"""Safe reading, naming and printing of what comes from outside: files, stores, addresses."""

import json
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from rlhf.errors import InputError

# Moves the cursor, changes colors, reorders or hides text, or starts an unwanted new line: control
# characters (except tab and line feed), text directions, invisible marks, lone surrogates.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
_USER = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)[^/?#\s'\"]*@")
_SECRET = re.compile(
    r"(?i)([?&;][^=&;#\s'\"]*"
    r"(?:token|key|secret|signature|sig|password|passwd|pwd|credential|auth)[^=&;#\s'\"]*=)"
    r"[^&;#\s'\"]+"
)


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: If it is not JSON, is nested too deeply, or has a number of thousands of digits.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; None if the file is missing or holds something else."""
    try:
        value = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def printable(text: str) -> str:
    """Return a text with an escape for everything that would affect a terminal."""
    return _UNSAFE.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    return match.group().encode("unicode_escape").decode()


def without_secrets(text: str) -> str:
    """Return a text without user, password, token or signature in its addresses."""
    if "://" not in text:
        return text
    return _SECRET.sub(r"\1***", _USER.sub(r"\1", text))


def as_markdown(text: str) -> str:
    """Return a text escaped for a line of Markdown, where it has no special meaning."""
    line = " ".join(printable(without_secrets(text)).splitlines())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace("\\", "\\\\")
    return re.sub(r"([*`\[~|#]|(?<!\w)_|_(?!\w))", r"\\\1", line)


def as_code(text: str) -> str:
    """Return a text as inline code in Markdown."""
    line = " ".join(printable(without_secrets(text)).splitlines())
    return f"`{line.replace('`', chr(39)).replace('|', '/')}`"


def inner_names(names: Iterable[str], where: str) -> list[str]:
    """Check names from a store or a file before they are joined to a local folder.

    Args:
        names: Relative names, parts separated by `/`.
        where: Source of the names, for the message.

    Raises:
        InputError: If a name leads out of the folder or is not a valid file name everywhere.
    """
    checked = list(names)
    for name in checked:
        parts = name.split("/")
        if (
            any(part in ("", ".", "..") for part in parts)
            or "\\" in name
            or re.match(r"[A-Za-z]:", name)
            or _UNSAFE.search(name)
            or "\n" in name
        ):
            raise InputError(
                f"{where}: {name!r} is not the name of a file in a folder (it may lead out of it); "
                "nothing was read; rename or remove it there"
            )
    folders = {str(parent) for name in checked for parent in PurePosixPath(name).parents}
    for name in checked:
        if name in folders:
            raise InputError(f"{where}: {name!r} is a file and a folder at once; rename one there")
    return checked
