"""`columns`: the data's names for what the library reads."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from rlhf.config.describe import nearest
from rlhf.config.loading import InnerFieldsError, unreadable_character
from rlhf.config.mappings import mapping_from_text

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
EXAMPLE = '{"prompt": "question"}'
_LONGEST = 1000


def column_problems(columns: Mapping[str, str]) -> list[str]:
    """Say what is wrong with a mapping of our names to columns, each line beginning with a name."""
    problems = [
        f"{name}: unknown field{nearest(name, COLUMN_TARGETS)}; expected one of "
        f"{', '.join(COLUMN_TARGETS)}"
        for name in columns
        if name not in COLUMN_TARGETS
    ]
    for name, column in columns.items():
        if not isinstance(column, str) or not 0 < len(column) <= _LONGEST:
            problems.append(f"{name}: expected the name of a column, got {column!r:.100}")
        elif bad := unreadable_character(column):
            problems.append(f"{name}: expected the name of a column, got a text with {bad}")
    return problems


def _checked(value: dict[str, str]) -> dict[str, str]:
    if problems := column_problems(value):
        raise InnerFieldsError("\n".join(problems))
    return value


def _from_text(value: Any) -> Any:
    return mapping_from_text(value, EXAMPLE)


ColumnNames = Annotated[dict[str, str], BeforeValidator(_from_text), AfterValidator(_checked)]
