"""What a reward model's folder records about its training: `reward_model.json`."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rlhf.config.common import MOST_TOKENS
from rlhf.errors import InputError
from rlhf.files.local_copy import local_folder
from rlhf.files.text import write_text
from rlhf.untrusted import parse_json

RECORD_FILE = "reward_model.json"


@dataclass(frozen=True)
class RewardRecord:
    """The content of `reward_model.json`: what it takes to use the model as it was trained.

    Attributes:
        base_model: The base it was trained on, as named then.
        revision: Hub revision of the base.
        fingerprint: Fingerprint of the base's weights.
        tokenizer: Fingerprint of the vocabulary.
        dtype: Storage type of the base in training.
        prompt_sequence_length: Maximum tokens of a prompt.
        target_sequence_length: Maximum tokens of a response.
        truncation_side: Side on which an overlong prompt is cut.
        instruction: Text put before every input.
        prompting: Fingerprint of instruction, chat template and its options.
        chat_template_options: Variables that the chat template got.
        turn_end: Token that ended responses in a chat; "" for EOS.
        pooling: Which state the head reads.
        shift: Subtracted from the raw score.
        scale: Divides the shifted score.
        version: Version of this library.
    """

    base_model: str
    revision: str | None
    fingerprint: str
    tokenizer: str
    dtype: str
    prompt_sequence_length: int
    target_sequence_length: int
    truncation_side: str
    instruction: str
    prompting: str
    chat_template_options: dict[str, Any] = field(default_factory=dict)
    turn_end: str = ""
    pooling: str = "last_token"
    shift: float = 0.0
    scale: float = 1.0
    version: str = ""

    @classmethod
    def read(cls, path: Path) -> "RewardRecord":
        """Read `reward_model.json`.

        Raises:
            InputError: It cannot be read or lacks fields.
        """
        try:
            values: dict[str, Any] = parse_json(path.read_bytes())
            known = {one.name for one in fields(cls)}
            record = cls(**{name: value for name, value in values.items() if name in known})
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: not the record of a reward model: {error}") from error
        _check_record(record, path)
        if record.pooling != "last_token":
            raise InputError(
                f"{path}: pooling {record.pooling!r} is unknown here; expected 'last_token'"
            )
        return record

    def write(self, folder: Path) -> None:
        """Write `reward_model.json`."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        write_text(folder / RECORD_FILE, text + "\n")


def read_record(path: str) -> RewardRecord | None:
    """Return the record of a reward model, without reading weights.

    Returns:
        None for a sequence classifier or an adapter, which records nothing about its prompts.

    Raises:
        InputError: There is no such folder, or its record cannot be read.
    """
    try:
        folder = local_folder(path, weights=False)
    except InputError as error:
        problems = [f"reward_model_path: {problem}" for problem in error.problems]
        raise InputError(problems) from error
    if not folder.is_dir():
        raise InputError(f"reward_model_path: there is no folder {path}")
    file = folder / RECORD_FILE
    return RewardRecord.read(file) if file.is_file() else None


def _check_record(record: RewardRecord, path: Path) -> None:
    """Refuse values that training never writes: they would cause useless scores or a traceback."""
    problems = []
    for one in fields(record):
        value = getattr(record, one.name)
        if one.name in ("shift", "scale"):
            good = type(value) in (int, float) and abs(value) < 1e30  # a NaN is not
            good = good and (one.name == "shift" or value > 1e-30)
            expected = "a finite number" + (" above 0" if one.name == "scale" else "")
        elif one.name.endswith("_length"):
            good, expected = type(value) is int and 1 <= value <= MOST_TOKENS, "a number of tokens"
        elif one.name == "truncation_side":
            good, expected = value in ("left", "right"), "left or right"
        elif one.name == "chat_template_options":
            good, expected = isinstance(value, dict), "a mapping"
        else:
            nothing = one.name == "revision" and value is None
            good, expected = nothing or isinstance(value, str), "text"
        if not good:
            problems.append(f"{path}: {one.name}: expected {expected}, got {value!r:.80}")
    if problems:
        raise InputError(problems)
