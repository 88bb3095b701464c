"""Text files written whole: a reader (or a crash) sees all of a file or nothing of it."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlhf.files.disk import rename


def write_text(path: Path, text: str | Iterable[str]) -> None:
    """Writes a text, or one in pieces, so that a reader (or a crash) sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines([text] if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def json_safe(value: Any) -> Any:
    """The value with null for numbers that JSON does not know (NaN, infinity)."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: json_safe(item) for name, item in value.items()}
    return [json_safe(item) for item in value] if isinstance(value, list | tuple) else value


def to_json(value: Any) -> str:
    """Indented JSON with a final newline."""
    return json.dumps(json_safe(value), indent=2, ensure_ascii=False) + "\n"
