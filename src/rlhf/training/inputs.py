"""What a stage reads and checks before loading any weights; reports all problems at once."""

from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.config import StageConfig
from rlhf.data.chat_check import check_conversations
from rlhf.data.overlaps import find_overlap
from rlhf.data.prompt_codec import PromptCodec
from rlhf.data.prompts import PromptRenderer
from rlhf.data.reading import (
    PreferenceData,
    PromptData,
    load_preferences,
    load_prompts,
    split_holdout,
)
from rlhf.errors import InputError
from rlhf.files.run_folder import Run, prepare_output
from rlhf.hardware import pick_device
from rlhf.models.content import model_fingerprint, tokenizer_fingerprint, weights_fingerprint
from rlhf.models.families import family_notes
from rlhf.models.loading import (
    check_adapter,
    check_stage,
    given_config,
    load_tokenizer,
    prompt_layout,
    read_model_config,
)
from rlhf.stages import STAGES, Reads, RowKind

_LOADERS: dict[RowKind, Callable[..., PromptData | PreferenceData]] = {
    "preference": load_preferences,
    "candidates": partial(load_preferences, candidates_optional=True),
    "prompt": load_prompts,
    "demonstration": partial(load_prompts, require_output=True),
}


def read_data(reads: Reads, config: StageConfig, renderer: PromptRenderer, **options: Any) -> Any:
    """Read one of a stage's files as its stage record says.

    Args:
        reads: The entry of the stage record.
        config: The stage's configuration.
        renderer: Renders the prompts' text.
        **options: Further options of the function that reads rows of this kind.

    Returns:
        `PromptData` or `PreferenceData`; None if the field is not set.

    Raises:
        InputError: Bad files or rows.
    """
    paths = getattr(config, reads.field)
    if paths is None:
        return None
    if reads.kind in ("preference", "candidates"):
        options["ties"] = getattr(config, "ties", "drop")
    return _LOADERS[reads.kind](
        paths,
        renderer=renderer,
        on_bad_rows=config.on_bad_rows,
        columns=config.columns,
        name=reads.field,
        **options,
    )


class StageInputs:
    """Collects a stage's data and everything wrong with it.

    Args:
        config: The stage's configuration.
        model: A transformers model instead of `config.base_model`.
        tokenizer: Its tokenizer.

    Attributes:
        tokenizer: Tokenizer of the base.
        renderer: Renders the prompts' text.
        lines: What was found in the data, for the user.

    Raises:
        InputError: The base cannot be used at all.
    """

    def __init__(
        self,
        config: StageConfig,
        model: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        if model is None and config.base_model is None:
            raise InputError("base_model: is required, but not given")
        pick_device(config.device)
        base = config.base_model or ""
        self.config = config
        self._model, self._own_tokenizer = model, tokenizer
        self.model_config = (
            read_model_config(base, config.revision) if model is None else given_config(model)
        )
        self.tokenizer = tokenizer or load_tokenizer(base, config.revision)
        self.renderer = PromptRenderer.for_tokenizer(
            self.tokenizer, config.instruction, config.chat_template_options
        )
        self.lines: list[str] = family_notes(self.model_config)
        self._rows: list[str] = []
        self._limits: list[str] = check_stage(config, self.model_config)
        self._limits += check_adapter(config, self.model_config, model)
        self._fingerprints: dict[str, str] = {}
        self._chats_differ = False
        self._trained: Any = None
        self._commits: dict[str, str] = {}

    def read(self, name: str, **options: Any) -> Any:
        """Read one data set of the configuration and check that its prompts fit.

        Args:
            name: Field of the configuration; the stage record says how to read it.
            **options: See `read_data`.

        Returns:
            `PromptData` or `PreferenceData`; None if the field is not set or something is wrong,
            which `finish` reports.
        """
        stage = STAGES[self.config.stage]
        [reads] = [reads for reads in stage.reads if reads.field == name]
        try:
            data = read_data(reads, self.config, self.renderer, **options)
        except InputError as error:
            self._rows += error.problems
            return None
        if data is None:
            return None
        self._fingerprints[name] = data.fingerprint
        self._note_overlap(name, data, stage.reads[0].field)
        if data.commits:
            self._commits[name] = ", ".join(data.commits)
        self.lines += data.report.lines()
        codec = self._codec()
        try:
            codec.check_template(self.renderer, data.report.conversations > 0)
            lengths = codec.check_prompts(data)
        except InputError as error:
            self._limits += error.problems
            return None
        if lengths.shortened:
            self.lines.append(f"{name}: {lengths.line()}")
        if not self._chats_differ:
            warning = check_conversations(data, codec, self.renderer, name)
            self._chats_differ = bool(warning)
            self.lines += warning
        return data

    def _note_overlap(self, name: str, data: Any, trained: str) -> None:
        """Say how many rows for evaluation have a prompt of the stage's training rows."""
        if name == trained:
            self._trained = data
        elif name == "eval_dataset" and self._trained is not None and len(data):
            overlap = find_overlap(data, self._trained)
            self.lines += [overlap.line()] if overlap.count else []

    def hold_out(
        self, train: PreferenceData, held_out: PreferenceData | None
    ) -> tuple[PreferenceData, PreferenceData]:
        """Return rows to train on and rows to evaluate on, held out by prompt if none are given."""
        if held_out:
            return train, held_out
        train, held_out = split_holdout(train, seed=self.config.seed)
        self.lines.append(
            f"preference_dataset: {len(held_out)} rows held out by prompt for evaluation"
        )
        return train, held_out

    def finish(self, **fingerprints: str) -> Run:
        """Inspect the output folder once all data is valid.

        Args:
            **fingerprints: Fingerprints of anything else that determines the result.

        Raises:
            InputError: Everything that is wrong: rows first, then limits, then the folder.
        """
        if self._rows or self._limits:
            raise InputError([*self._rows, *self._limits])
        found = {**self._fingerprints, "base_model": self._base_fingerprint()}
        return prepare_output(
            self.config, found | fingerprints, stage=self.config.stage, commits=self._commits
        )

    def _base_fingerprint(self) -> str:
        """Return the fingerprint of the base, whether it was given by name or as an object."""
        if self._model is None:
            given = weights_fingerprint(self.config.base_model or "", self.config.revision)
        else:
            given = model_fingerprint(self._model)
        own = self._own_tokenizer and tokenizer_fingerprint(self._own_tokenizer)
        return f"{given} {own}" if own else given

    def _codec(self) -> PromptCodec:
        return PromptCodec(
            self.tokenizer,
            prompt_layout(self.model_config, self.tokenizer),
            self.config.prompt_sequence_length,
            self.config.target_sequence_length,
        )
