"""The command `rlhf`: reads flags and files and calls one function of the library.

torch is imported only after the configuration is known to be good.
"""

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Literal

import click

import rlhf
from rlhf.config import PipelineConfig, Schema, ScoreConfig
from rlhf.config.columns import EXAMPLE as COLUMNS_EXAMPLE
from rlhf.config.loading import unreadable_character
from rlhf.config.mappings import OPTIONS_EXAMPLE, mapping_from_text
from rlhf.console import show, steady_streams
from rlhf.errors import InputError
from rlhf.flags import (
    CONTEXT,
    PLAIN_CONTEXT,
    ConfigCommand,
    config_options,
    given_flags,
    read_config,
    unknown_flags,
)
from rlhf.process import exit_code, quiet_third_parties
from rlhf.stages import STAGES, Function, call


class Commands(click.Group):
    """Commands, with one for every stage that is registered when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names, sorted."""
        stages = {stage.command for stage in STAGES.values()}
        return sorted(stages | _OF_CONFIGURATIONS.keys() | set(super().list_commands(ctx)))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command, made from its configuration's fields if it has one."""
        if cmd_name == "run":
            return _reward_command(cmd_name, *_OF_CONFIGURATIONS[cmd_name])
        if cmd_name in _OF_CONFIGURATIONS:
            return _config_command(cmd_name, *_OF_CONFIGURATIONS[cmd_name])
        for stage in STAGES.values():
            if stage.command == cmd_name:
                record = (cmd_name, stage.config, stage.run, stage.help)
                if stage is STAGES.get("ppo"):
                    return _reward_command(*record, ("reward_model_path|rewards",))
                return _config_command(*record)
        return super().get_command(ctx, cmd_name)


def _config_command(name: str, cls: type[Schema], function: Function, text: str) -> click.Command:
    """Make a command that hands its configuration to one function."""

    @config_options(cls)
    @click.command(name, cls=ConfigCommand, help=text, context_settings=CONTEXT)
    @click.pass_context
    def command(ctx: click.Context, /, **_: Any) -> None:
        call(function, read_config(ctx, cls))

    return command


def _reward_command(
    name: str, cls: type[Schema], function: Function, text: str, required: tuple[str, ...] = ()
) -> click.Command:
    """Make a command that takes reward functions beside its configuration.

    Args:
        name: Its name.
        cls: Its configuration.
        function: What it calls.
        text: What it does, for `--help`.
        required: Optional fields that it cannot do without unless there is a function.
    """

    @config_options(cls)
    @click.command(name, cls=ConfigCommand, help=text, context_settings=CONTEXT)
    @click.option(
        "--reward_fn",
        metavar="MODULE:FUNCTION, repeatable",
        multiple=True,
        help="Python function (prompts, responses, columns...) -> numbers: a further reward of "
        "PPO, of weight 1 unless an entry of rewards names it.",
    )
    @click.pass_context
    def command(ctx: click.Context, /, reward_fn: tuple[str, ...], **_: Any) -> None:
        config = read_config(ctx, cls, () if reward_fn else required)
        functions = {address: _imported(address) for address in reward_fn}
        call(function, config, **({"reward_fn": functions} if functions else {}))

    return command


# Commands of a configuration that are no stages.
_OF_CONFIGURATIONS: dict[str, tuple[type[Schema], Function, str]] = {
    "run": (PipelineConfig, "rlhf:run_pipeline", "Run all stages on your own data, or the Hub's."),
    "score": (ScoreConfig, "rlhf:run_score", "Add reward scores to the rows of a file."),
}


@click.group(cls=Commands, context_settings=PLAIN_CONTEXT)
@click.version_option(rlhf.__version__, prog_name="rlhf")
def cli() -> None:
    """Reinforcement learning from human feedback for T5, LLaMA and their relatives."""


@cli.command()
@click.option(
    "--arch",
    type=click.Choice(["t5", "llama"]),
    default="t5",
    show_default=True,
    help="Model family.",
)
@click.option(
    "--output_dir", metavar="TEXT", help="Folder for the results.  [default: runs/quickstart-ARCH]"
)
@click.option(
    "--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="Random seed."
)
def quickstart(arch: Literal["t5", "llama"], output_dir: str | None, seed: int) -> None:
    """Run all stages on the built-in corpus in minutes, with no network or GPU."""
    from rlhf.quickstart.run import run_quickstart

    run_quickstart(arch=arch, output_dir=output_dir, seed=seed)


@cli.group()
def vertex() -> None:
    """Run the stages on Vertex AI (extra `vertex`)."""


@config_options(PipelineConfig)
@vertex.command("submit", cls=ConfigCommand, context_settings=CONTEXT)
@click.option(
    "--parameters",
    metavar="FILE.json",
    help="The pipeline's parameters, such as those of Google's rlhf_pipeline; not with --config.",
)
@click.option("--wait", is_flag=True, help="Watch the run until it ends.")
@click.pass_context
def vertex_submit(ctx: click.Context, /, parameters: str | None, wait: bool, **_: Any) -> int:
    """Run reward model, PPO and inference as a pipeline of custom jobs.

    Takes the same file as `rlhf run`. output_dir is a gs:// folder; the section `vertex` chooses
    region and machines. --dry_run prints the exact request and sends nothing.
    """
    _needs_vertex()
    from rlhf.vertex.submit import read_parameters, submit

    if parameters is None:
        config = read_config(ctx, PipelineConfig)
    elif ctx.params["config"] is not None:
        raise InputError("config, parameters: give one of them, not both")
    else:
        config = read_parameters(parameters, given_flags(ctx), unknown_flags(ctx))
    return submit(config, wait=wait)


@vertex.command("compile")
@click.argument("output", metavar="OUTPUT.yaml")
def vertex_compile(output: str) -> None:
    """Write the pipeline's YAML, for the console or other KFP tools."""
    _needs_vertex()
    from rlhf.console import say
    from rlhf.vertex.pipeline import compile_pipeline

    if not output.endswith(".yaml"):
        raise InputError(f"OUTPUT.yaml: expected a name ending in .yaml, got {output}")
    try:
        compile_pipeline(output)
    except OSError as error:
        raise InputError(f"{output}: cannot be written: {error.strerror}") from error
    say(
        "its default image is a tag; give `image` with a digest where all runs are to have the same"
    )


def _needs_vertex() -> None:
    """Raise InputError where the extra `vertex` is not installed."""
    missing = [
        name
        for name in ("kfp", "google_cloud_pipeline_components", "google.cloud.aiplatform")
        if not _installed(name)
    ]
    if missing:
        raise InputError(
            f"{', '.join(missing)} not installed; pip install 'rlhf-ppo[vertex]' (from a checkout: "
            "pip install -c constraints.txt '.[vertex]')"
        )


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@cli.group()
def data() -> None:
    """Check and convert data sets."""


@data.command()
@click.argument("files", nargs=-1, metavar="[FILE...]")
@click.option("--preference_dataset", multiple=True, help="Preference rows; may be repeated.")
@click.option("--prompt_dataset", multiple=True, help="Rows with prompts; may be repeated.")
@click.option("--eval_dataset", multiple=True, help="Held-out rows; may be repeated.")
@click.option(
    "--kind",
    type=click.Choice(["auto", "preference", "prompt", "demonstration"]),
    default="auto",
    show_default=True,
    help="What every row of FILE and eval_dataset must be; auto: a preference if it has "
    "candidates, else a prompt.",
)
@click.option(
    "--on_bad_rows",
    type=click.Choice(["error", "skip"]),
    default="error",
    show_default=True,
    help="Whether bad rows are errors, or are counted and skipped.",
)
@click.option(
    "--columns", metavar="JSON", help=f"The files' columns by our names: {COLUMNS_EXAMPLE}."
)
@click.option(
    "--ties",
    type=click.Choice(["drop", "keep"]),
    default="drop",
    show_default=True,
    help="Whether tied answers are left out or kept.",
)
@click.option("--instruction", default="", help="Text put before every input, as in training.")
@click.option(
    "--chat_template_options",
    metavar="JSON",
    help=f"Variables for the chat template of base_model: {OPTIONS_EXAMPLE}.",
)
@click.option(
    "--base_model",
    help="Count lengths in this model's tokens, and compare conversations with their rendering as "
    "a whole; loads no weights.",
)
@click.option("--revision", help="Branch, tag or commit of base_model on the Hub.")
@click.option(
    "--prompt_sequence_length",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Longest prompt, tokens.",
)
@click.option(
    "--target_sequence_length",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Longest response, tokens.",
)
def check(files: tuple[str, ...], **options: Any) -> None:
    """Validate data sets, describe their contents, and look for prompts that they share.

    A data set may be a path, a glob, a folder, an address or a Hub id. The FILEs together are one.
    """
    from rlhf.reports.data_check import check_sets

    names = ("preference_dataset", "prompt_dataset", "eval_dataset")
    given = {"data": files, **{name: options.pop(name) for name in names}}
    sets = {name: list(paths) for name, paths in given.items() if paths}
    if not sets:
        raise InputError(f"FILE: give one, or a data set by name: {', '.join(names)}")
    for name, example in (
        ("columns", COLUMNS_EXAMPLE),
        ("chat_template_options", OPTIONS_EXAMPLE),
    ):
        options[name] = _mapping(name, options[name], example)
    show("\n".join(check_sets(sets, **options).lines()))


@data.command("convert")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.argument("output", metavar="OUTPUT")
@click.option(
    "--layout",
    default="auto",
    show_default=True,
    help="Layout of all rows; auto: recognized row by row. The docs have a table.",
)
@click.option(
    "--columns", metavar="JSON", help='Columns of the data by our names: {"prompt": "question"}.'
)
def data_convert(sources: tuple[str, ...], output: str, layout: str, columns: str | None) -> None:
    """Convert files in other layouts to the library's rows."""
    from rlhf.data.convert import convert

    mapping = _mapping("columns", columns, COLUMNS_EXAMPLE)
    show("\n".join(convert(list(sources), output, layout, mapping).lines()))


def _mapping(flag: str, text: str | None, example: str) -> Any:
    """Return the mapping that the JSON of a flag holds; None without the flag."""
    try:
        value = mapping_from_text(text, example)
    except ValueError as error:
        raise InputError(f"{flag}: {error}") from None
    if not isinstance(value, dict | None):
        raise InputError(f"{flag}: expected JSON such as {example}, got {text!r:.200}")
    return value


def _imported(address: str) -> Callable[..., Any]:
    """Import `module:function`, looking in the current folder too."""
    module_name, _, function_name = address.partition(":")
    names = [*module_name.split("."), function_name]
    if not all(name.isidentifier() for name in names):
        raise InputError(f"reward_fn: expected MODULE:FUNCTION, names of Python, got {address!r}")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and names[0] == error.name.split(".")[0]:
            raise InputError(f"reward_fn: there is no module {module_name!r}") from None
        raise InputError(f"reward_fn: {module_name!r} needs {error.name!r}: {error}") from error
    except (Exception, SystemExit) as error:  # whatever the module does
        frames = traceback.extract_tb(error.__traceback__)
        where = f"{frames[-1].filename}:{frames[-1].lineno}"
        what = f"{type(error).__name__}: {error}"
        raise InputError(f"reward_fn: {module_name!r} fails at {where}: {what}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(f"reward_fn: {module_name!r} has no function {function_name!r}")
    return function


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: What follows `rlhf`; None for those of the process.
    """
    steady_streams()
    quiet_third_parties()
    given = list(sys.argv[1:] if arguments is None else arguments)
    return exit_code(lambda: _run(given or ["--help"]))


def _run(arguments: list[str]) -> Any:
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if bad := unreadable_character(argument):
            flag = before if before.startswith("-") else "argument"
            raise InputError(f"{flag}: expected text, got {argument!r:.100} with {bad}")
    return cli.main(arguments, prog_name="rlhf", standalone_mode=False)
