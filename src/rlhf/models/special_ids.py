"""Check that the ids that end, begin and pad sequences are rows of the embedding."""

from collections.abc import Sequence
from typing import Any

# Old LLaMA configurations use -1 for none.
_OPTIONAL = ("bos_token_id", "pad_token_id")
_FIELDS = ("eos_token_id", "decoder_start_token_id", "forced_bos_token_id", *_OPTIONAL)


def special_id_problems(sources: Sequence[tuple[str, Any]], rows: int) -> list[str]:
    """Return the special ids for which the model has no embedding, one line each.

    Args:
        sources: Configurations, with the names of their files.
        rows: Rows of the embedding.
    """
    return [
        f"{name}: {field} is {id_!r}, expected a token id from 0 to {rows - 1}: the model has "
        f"{rows} embeddings"
        for name, source in sources
        for field in _FIELDS
        for id_ in _listed(getattr(source, field, None))
        if not (_is_id(id_) and 0 <= id_ < rows) and not (field in _OPTIONAL and id_ == -1)
    ]


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple | set) else [value]


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
