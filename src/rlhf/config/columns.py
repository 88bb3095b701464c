"""`columns`: the data's names for what the library reads."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from rlhf.config.describe import nearest
from rlhf.config.loading import InnerFieldsError, unreadable_character
from rlhf.untrusted import parse_json

# What may be read from a column of another name: the fields of the library's rows, and what some
# layout has beside them.
COLUMN_TARGETS = (
    "input_text",
    "messages",
    "prompt",
    "context",
    "output_text",
    "candidate_0",
    "candidate_1",
    "choice",
    "chosen",
    "rejected",
    "candidates",
    "ranking",
    "scores",
    "margin",
    "system",
    "history",
    "completion",
    "response",
    "responses",
    "rank",
    "helpfulness",
    "candidate_0_score",
    "candidate_1_score",
    "score_chosen",
    "score_rejected",
)
_LONGEST = 1000


def mapping_from_text(value: Any, example: str) -> Any:
    """Return the mapping that a flag gives as JSON text; anything else as it is.

    Args:
        value: What was given.
        example: What is right, for the message.

    Raises:
        ValueError: It is a text, but no JSON.
    """
    try:
        return parse_json(value) if isinstance(value, str) else value
    except ValueError:
        raise ValueError(f"expected JSON such as {example}, got {value!r:.200}") from None


def _from_text(value: Any) -> Any:
    return mapping_from_text(value, '{"prompt": "question"}')


def _checked(value: Mapping[str, str]) -> Mapping[str, str]:
    problems = [
        f"{name}: unknown field{nearest(name, COLUMN_TARGETS)}; expected one of "
        f"{', '.join(COLUMN_TARGETS)}"
        for name in value
        if name not in COLUMN_TARGETS
    ]
    for name, column in value.items():
        if not 0 < len(column) <= _LONGEST:
            problems.append(f"{name}: expected the name of a column, got {column!r:.100}")
        elif bad := unreadable_character(column):
            problems.append(f"{name}: expected the name of a column, got a text with {bad}")
    if problems:
        raise InnerFieldsError("\n".join(problems))
    return value


ColumnNames = Annotated[dict[str, str], BeforeValidator(_from_text), AfterValidator(_checked)]
