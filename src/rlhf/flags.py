"""Command-line flags made from a configuration class: names, types, defaults and help."""

import typing
from collections.abc import Callable
from typing import Any, TypeVar

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from rlhf.config import PipelineConfig, Schema, StageConfig, TrainingConfig, load_config
from rlhf.config.describe import (
    leaf_fields,
    may_be_none,
    nearest,
    takes_list,
    takes_mapping,
    type_name,
)
from rlhf.config.stages import STAGE_CONFIGS
from rlhf.errors import InputError
from rlhf.untrusted import parse_json

ConfigT = TypeVar("ConfigT", bound=Schema)

PLAIN_CONTEXT: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda name: name.replace("_", "-"),
}
# Unknown flags are collected by `read_config`, so that all are reported at once.
CONTEXT = PLAIN_CONTEXT | {"ignore_unknown_options": True, "allow_extra_args": True}


class ConfigOption(click.Option):
    """A flag for one field.

    Args:
        name: Dotted name of the field, which is the flag's too.
        field: The field.
        group: Heading under which `--help` lists it.
        needed: Whether the command cannot do without it.
        hidden: Whether `--help` leaves it out.
    """

    def __init__(
        self, name: str, field: FieldInfo, group: str, *, needed: bool = False, hidden: bool = False
    ) -> None:
        self.config_name = name
        self.field = field
        self.group = group
        # A flag that may stand alone: `--dry_run` and `--dry_run=false`.
        alone: dict[str, Any] = (
            {"is_flag": False, "flag_value": "true"} if field.annotation is bool else {}
        )
        super().__init__(
            [f"--{name}", name.replace(".", "__")],
            type=str,
            metavar=_metavar(field),
            help=f"{field.description} {_default_words(field, needed)}".strip(),
            multiple=takes_list(field),
            hidden=hidden,
            **alone,
        )

    def value_of(self, given: Any) -> Any:
        """Turn what was typed into what the schema reads; conversion is the schema's."""
        if isinstance(given, tuple):
            texts = list(given)
            if texts == ["null"] and may_be_none(self.field):
                return None
            only_list = type_name(self.field).startswith("list")
            return texts if only_list or len(texts) > 1 else texts[0]
        if takes_mapping(self.field):
            return _mapping_in(given)
        return None if given == "null" and may_be_none(self.field) else given

    def value_inside(self, given: str) -> Any:
        """Turn what was typed for one name of a mapping into a value: false, 3 or text."""
        only_text = typing.get_args(self.field.annotation)[1] is str
        return given if only_text else _json_or_text(given)


def _json_or_text(text: str) -> Any:
    try:
        return parse_json(text)
    except (ValueError, RecursionError):
        return text


def _mapping_in(text: str) -> Any:
    """Return the mapping that a JSON text holds; the text itself if it holds none."""
    value = _json_or_text(text)
    return value if isinstance(value, dict) else text


class ConfigCommand(click.Command):
    """A command whose `--help` lists its flags under the headings of the schema."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section a heading, those of the command itself first."""
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                sections.setdefault(getattr(parameter, "group", "Options"), []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records, col_max=34)


def _section_help() -> str:
    flags = ", ".join(f"--{stage}.FIELD" for stage in STAGE_CONFIGS)
    return f"Any field for one stage only: {flags}; `rlhf ppo --help` and so on list them."


def _metavar(field: FieldInfo) -> str:
    words = type_name(field)
    if "|" in words:
        return f"[{words.replace(' | ', '|')}]"
    return f"{words.split()[-1].upper()}{', repeatable' if takes_list(field) else ''}"


def _default_words(field: FieldInfo, needed: bool) -> str:
    if needed or field.is_required():
        return "[required]"
    default = field.get_default(call_default_factory=True)
    if default is None or default is PydanticUndefined or default in ("", [], {}):
        return ""
    shown = ", ".join(map(str, default)) if isinstance(default, list) else str(default)
    return f"[default: {shown.lower() if isinstance(default, bool) else shown}]"


def _group(cls: type[BaseModel], name: str) -> str:
    if name.startswith("lora."):
        return "LoRA adapters"
    if name.startswith("vertex."):
        return "Vertex AI"
    if name in TrainingConfig.model_fields and name not in StageConfig.model_fields:
        return "Training"
    own = name in cls.__annotations__ or name not in StageConfig.model_fields
    return "This stage" if own else "Every stage"


def config_options(cls: type[Schema]) -> Callable[[click.Command], click.Command]:
    """Decorate a command with `--config` and a flag for every field of a schema."""
    options = [
        ConfigOption(name, field, _group(cls, name), needed=name in cls.needed_on_load)
        for name, field in leaf_fields(cls)
        if not (cls is PipelineConfig and name in STAGE_CONFIGS)
    ]
    headings = ["This stage", "Every stage", "Training", "LoRA adapters", "Vertex AI"]
    options.sort(key=lambda option: headings.index(option.group))
    if cls is PipelineConfig:
        options += [
            ConfigOption(f"{stage}.{name}", field, "", hidden=True)
            for stage, stage_cls in STAGE_CONFIGS.items()
            for name, field in leaf_fields(stage_cls)
        ]

    def decorate(command: click.Command) -> click.Command:
        config = click.Option(
            ["--config"], metavar="FILE.yaml", help="YAML file with fields; flags override it."
        )
        command.params = [config, *command.params, *options]
        if cls is PipelineConfig:
            command.epilog = _section_help()
        return command

    return decorate


def read_config(ctx: click.Context, cls: type[ConfigT], required: tuple[str, ...] = ()) -> ConfigT:
    """Build the configuration from `--config` and the flags of the running command.

    Args:
        ctx: Context of the command, decorated by `config_options`.
        cls: The schema.
        required: Optional fields that this command cannot do without; `a|b` for one of the two.

    Raises:
        InputError: All unknown flags and all problems of the fields.
    """
    problems = unknown_flags(ctx)
    try:
        config = load_config(cls, ctx.params["config"], given_flags(ctx), required)
    except InputError as error:
        raise InputError(problems + error.problems) from None
    if problems:
        raise InputError(problems)
    return config


def given_flags(ctx: click.Context) -> dict[str, Any]:
    """Return the fields that the running command's flags give, by dotted name."""
    given = {}
    for option in ctx.command.params:
        value = ctx.params.get(option.name or "")
        if isinstance(option, ConfigOption) and value not in (None, ()):
            given[option.config_name] = option.value_of(value)
    inside, _, _ = _inside_mappings(ctx)
    return given | inside


def _inside_mappings(ctx: click.Context) -> tuple[dict[str, Any], list[str], list[str]]:
    """Read flags such as `--chat_template_options.enable_thinking false`, which click lacks.

    Returns:
        (values by dotted name, the other arguments, what is wrong).
    """
    mappings = {
        f"{option.config_name}.": option
        for option in ctx.command.params
        if isinstance(option, ConfigOption) and takes_mapping(option.field)
    }
    given: dict[str, Any] = {}
    rest: list[str] = []
    problems: list[str] = []
    arguments = list(ctx.args)
    while arguments:
        argument = arguments.pop(0)
        flag, has_value, value = argument.partition("=")
        plain = flag.removeprefix("--").replace("-", "_")
        prefix = next((one for one in mappings if plain.startswith(one)), None)
        if prefix is None or not argument.startswith("--"):
            rest.append(argument)
            continue
        name = flag.removeprefix("--")[len(prefix) :]
        if not has_value and arguments and not arguments[0].startswith("--"):
            has_value, value = "=", arguments.pop(0)
        if not name or "." in name or not has_value:
            problems.append(f"{flag}: expected --{prefix}NAME VALUE")
        else:
            given[prefix + name] = mappings[prefix].value_inside(value)
    return given, rest, problems


def unknown_flags(ctx: click.Context) -> list[str]:
    """Name the arguments that the command does not know, each with the nearest flag."""
    known = [name for option in ctx.command.params for name in option.opts]
    _, arguments, problems = _inside_mappings(ctx)
    value_expected = False
    for argument in arguments:
        if argument.startswith("-") and argument != "-":
            name = argument.split("=", 1)[0]
            problems.append(f"{name}: unknown flag{nearest(name, known)}")
            value_expected = "=" not in argument
        elif value_expected:
            value_expected = False
        else:
            problems.append(f"{argument!r}: unexpected argument; values belong to a --flag")
    return problems
