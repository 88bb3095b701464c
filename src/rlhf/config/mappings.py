"""Fields that hold a mapping of the user's own names to plain values."""

from typing import Annotated, Any

from pydantic import BeforeValidator

from rlhf.config.loading import InnerFieldsError, unreadable_character
from rlhf.untrusted import parse_json

OPTIONS_EXAMPLE = '{"enable_thinking": false}'


def mapping_from_text(value: Any, example: str) -> Any:
    """Turn the JSON text that a flag gives into a mapping; return anything else as it is.

    Args:
        value: What was given.
        example: JSON to show if the text is none.

    Raises:
        ValueError: It is a text, but no JSON.
    """
    try:
        return parse_json(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise ValueError(f"expected JSON such as {example}, got {value!r:.200}") from None


def _template_options(value: Any) -> Any:
    """Check the names and values that a chat template gets."""
    options = mapping_from_text(value, OPTIONS_EXAMPLE)
    if not isinstance(options, dict):
        raise ValueError(f"expected a mapping of names to values, got {value!r:.200}")
    problems = []
    for name, one in options.items():
        if not isinstance(one, str | bool | int | float | None):
            problems.append(f"{name}: expected text, a number, true or false, got {one!r:.200}")
        elif isinstance(one, float) and not abs(one) < float("inf"):
            problems.append(f"{name}: expected a finite number, got {one}")
        elif bad := unreadable_character(f"{name}{one}"):
            problems.append(f"{name!r}: expected text, got a text with {bad}")
    if problems:
        raise InnerFieldsError("\n".join(problems))
    return options


Plain = str | bool | int | float | None
ChatTemplateOptions = Annotated[dict[str, Plain], BeforeValidator(_template_options)]
