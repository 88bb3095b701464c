"""The inference stage: responses of the tuned and the untuned model, and how good they are."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rlhf.config import InferenceConfig
from rlhf.console import say, show
from rlhf.data.prompts import PromptRenderer
from rlhf.data.reading import PreferenceData, PromptData, read_once
from rlhf.errors import InputError, StoppedBySignal
from rlhf.evaluation import evaluate_preferences
from rlhf.files.disk import rename
from rlhf.files.local_copy import recorded_base
from rlhf.files.output import PARTIAL_SUMS
from rlhf.files.run_folder import Run, Status, prepare_output
from rlhf.files.text import write_text
from rlhf.hardware import pick_device
from rlhf.inference.before_and_after import Models, load_models, predict_rows
from rlhf.inference.best_of import add_best
from rlhf.inference.local_metrics import module_metrics
from rlhf.inference.metrics import prediction_metrics, responses_by_prefix
from rlhf.inference.predictions import Prediction, PredictionFile, read_predictions, write_sums
from rlhf.inference.report import report_markdown, samples_markdown, summary_lines
from rlhf.models.content import weights_fingerprint
from rlhf.models.families import family_notes
from rlhf.models.generation import Generator
from rlhf.models.loading import check_stage, load_tokenizer, read_model_config
from rlhf.models.policy_folder import PolicySource, find_policy
from rlhf.models.reward_model import check_reward_model, limit_lines
from rlhf.reports.dry_run import dry_run_report
from rlhf.signals import SignalGuard, StopRequested, stop_point
from rlhf.stages import STAGES, RunResult
from rlhf.training.inputs import read_data
from rlhf.training.tracking import ProgressLine, Trackers

STAGE = "inference"
PARTIAL = "predictions.partial.jsonl"
FINAL = "predictions.jsonl"
# With settings other than those of its training, the policy would not behave as trained.
INHERITED = (
    "instruction",
    "chat_template_options",
    "prompt_sequence_length",
    "target_sequence_length",
    "truncation_side",
    "temperature",
    "min_response_length",
)
_SECONDS_BETWEEN_UPLOADS = 60.0  # a remote output is published as whole files
_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class InferenceResult(RunResult):
    """What a run of inference leaves behind.

    Its metrics are those of `metrics.prediction_metrics`; the reward model's own, on rows with
    candidates, begin with `reward_model_`.

    Attributes:
        predictions: Path of predictions.jsonl.
        samples: Path of samples.md, before and after side by side.
    """

    predictions: str
    samples: str


@dataclass(frozen=True)
class _Inputs:
    """What is read and checked before any weights.

    Attributes:
        source: The contents of `policy_path`.
        notes: What there is to know of the model, line by line.
        renderer: Renders the prompts.
        prompts: All rows.
        preferences: Rows with candidates, on which the reward model itself is evaluated; None
            without a reward model.
    """

    source: PolicySource
    notes: Sequence[str]
    renderer: PromptRenderer
    prompts: PromptData
    preferences: PreferenceData | None


def run_inference(
    config: InferenceConfig, *, generator: Generator | None = None
) -> InferenceResult:
    """Generate with the tuned and the untuned model, score both, and write the comparison.

    Settings in `INHERITED` that the configuration does not set are taken from the policy's
    training. An interrupted run continues where it stopped; a finished one returns at once.

    Args:
        config: The stage's configuration.
        generator: What decodes; our own engine by default.

    Raises:
        InputError: If files, configuration or checkpoints are wrong; nothing is written.
        StoppedBySignal: After SIGTERM or SIGINT, once everything so far is saved.
    """
    source = find_policy(config.policy_path)
    config = with_policy_settings(config, source)
    inputs = _read_inputs(config, source)
    commits = {"eval_dataset": ", ".join(inputs.prompts.commits)} if inputs.prompts.commits else {}
    run = prepare_output(
        config,
        _fingerprints(config, inputs),
        stage=STAGE,
        commits=commits,
        saved=(PARTIAL, FINAL),
    )
    if run.status is Status.FINISHED and not config.dry_run:
        say(f"{STAGE}: already finished in {config.output_dir}")
        return _result(run, run.conclude())
    lines = _description(config, inputs)
    if config.dry_run:
        show(dry_run_report(STAGE, config, len(inputs.prompts), lines))
        return _result(run, {})
    say("\n".join(lines))
    with run.held(), SignalGuard(at_once=True) as signals:
        if run.status is Status.FINISHED:  # another process just finished it
            return _result(run, run.conclude())
        file = _open_predictions(run, config, len(inputs.prompts))
        models = None
        if file.count < len(inputs.prompts) or inputs.preferences:
            models = load_models(config, source, generator)
            say(f"{STAGE}: {models.codec.check_prompts(inputs.prompts).line()}")
        run.start()
        metrics: dict[str, Any] = {}
        if models is not None:
            _predict(models, config, inputs.prompts, file, run, signals)
            metrics = _reward_model_metrics(models, config, inputs.preferences)
        return _finish(config, run, metrics)


def with_policy_settings(config: InferenceConfig, source: PolicySource) -> InferenceConfig:
    """Return the configuration with the base, and everything not set, taken from the policy's own.

    Settings that differ from the policy's are kept, with a warning.
    """
    found: dict[str, Any] = {}
    sampled = config.sampling_strategy == "temperature_sampling" or config.best_of > 1
    for name in INHERITED:
        trained, here = source.settings.get(name), getattr(config, name)
        if trained is None or trained == here:
            continue
        if name not in config.model_fields_set:
            found[name] = trained
        elif name != "temperature" or sampled:
            say(f"{STAGE}: {name} is {here!r}, but the policy was trained with {trained!r}")
    if config.base_model is None and source.base_model is not None:
        where = f"policy_path: {config.policy_path}"
        base, revision = recorded_base(source.base_model, where, source.revision)
        found |= {"base_model": base, "revision": revision}
    return InferenceConfig.model_validate(config.model_dump() | found)


def _read_inputs(config: InferenceConfig, source: PolicySource) -> _Inputs:
    """Check rows, limits and metrics before any weights are read."""
    if config.base_model is None:
        raise InputError(
            f"base_model: {config.policy_path} does not record what it was tuned from; give the "
            "untuned model to compare with"
        )
    pick_device(config.device)
    model_config = read_model_config(config.base_model, config.revision)
    full = source.kind == "full"
    tokenizer = (
        load_tokenizer(str(source.folder))
        if full
        else load_tokenizer(config.base_model, config.revision)
    )
    renderer = PromptRenderer.for_tokenizer(
        tokenizer, config.instruction, config.chat_template_options
    )
    problems: list[str] = []
    prompts = preferences = None
    try:
        with read_once():
            every_row, with_candidates = STAGES[STAGE].reads
            prompts = read_data(every_row, config, renderer)
            if config.reward_model_path is not None:
                preferences = read_data(with_candidates, config, renderer)
    except InputError as error:
        problems += error.problems
    problems += check_stage(config, model_config)
    problems += _metric_problems(config.extra_metrics, prompts or ())
    if problems or prompts is None:
        raise InputError(problems)
    if config.reward_model_path is not None:
        check_reward_model(
            config.reward_model_path,
            renderer,
            prompts.report.conversations > 0,
            config.reward_model_label,
        )
    return _Inputs(source, family_notes(model_config), renderer, prompts, preferences)


def _metric_problems(modules: Sequence[str], prompts: PromptData | tuple[()]) -> list[str]:
    """Try further metrics on a few rows: they must not fail after hours of generation."""
    problems = []
    if modules:
        rows = [row for row, _ in zip(prompts, range(100), strict=False)]
        rows = [row for row in rows if row.references][:4] or rows[:4]
        texts = [(row.references or [row.input_text])[0] for row in rows]
        for path in modules:
            try:
                module_metrics(path, texts, [row.references for row in rows])
            except InputError as error:
                problems += error.problems
    return problems


def _fingerprints(config: InferenceConfig, inputs: _Inputs) -> dict[str, str]:
    fingerprints = {
        "eval_dataset": inputs.prompts.fingerprint,
        "policy_path": inputs.source.fingerprint,
        "base_model": weights_fingerprint(config.base_model or "", config.revision),
    }
    if config.reward_model_path is not None:
        fingerprints["reward_model_path"] = weights_fingerprint(config.reward_model_path)
    return fingerprints


def _description(config: InferenceConfig, inputs: _Inputs) -> list[str]:
    sampling = "greedy"
    if config.sampling_strategy == "temperature_sampling":
        sampling = f"sampled at temperature {config.temperature:g}"
    reports = [inputs.prompts.report, *([inputs.preferences.report] if inputs.preferences else [])]
    if inputs.source.kind == "adapter":
        policy = f"adapter {inputs.source.folder} on {config.base_model}; before: adapter off"
    else:
        policy = (
            f"full model {inputs.source.folder}; before: {config.base_model}, "
            "loaded as a second model"
        )
    best_of = []
    if config.best_of > 1:
        best_of.append(
            f"{STAGE}: also the best of {config.best_of} samples of the untuned model under the "
            f"reward model, at temperature {config.temperature:g}"
        )
    return [
        *inputs.notes,
        *dict.fromkeys(line for report in reports for line in report.lines()),
        f"{STAGE}: {len(inputs.prompts)} rows, {config.batch_size} at once, {sampling}, prompts up "
        f"to {config.prompt_sequence_length} and responses up to "
        f"{config.target_sequence_length} tokens; output in {config.output_dir}",
        f"{STAGE}: {policy}; reward model: {config.reward_model_path or 'none'}",
        *best_of,
        *limit_lines(config.reward_model_path, config),
    ]


def _open_predictions(run: Run, config: InferenceConfig, total: int) -> PredictionFile:
    """Open the growing file, with what an interrupted run left in it."""
    path = run.output.path
    if run.status is Status.CONTINUE:
        run.output.fetch(PARTIAL, PARTIAL_SUMS, FINAL)
        if (path / FINAL).is_file():  # stopped between the rename and metrics.json
            rename(path / FINAL, path / PARTIAL)
            if not (path / PARTIAL_SUMS).is_file():  # or its metrics.json was removed
                write_sums(path / PARTIAL, path / PARTIAL_SUMS, config.batch_size, run.identity)
    file = PredictionFile(
        path / PARTIAL, path / PARTIAL_SUMS, config.batch_size, total, run.identity
    )
    if file.count:
        say(f"{STAGE}: continues after {file.count} of {total} rows")
    return file


def _predict(
    models: Models,
    config: InferenceConfig,
    prompts: PromptData,
    file: PredictionFile,
    run: Run,
    signals: SignalGuard,
) -> None:
    """Append the missing rows, batch by batch; a signal discards an unfinished batch."""
    progress = ProgressLine(STAGE, len(prompts), file.count, ("reward", "kl"))
    uploaded = time.monotonic()
    signals.wait()
    try:
        while file.count < len(prompts):
            stop_point()
            rows = prompts[file.count : file.count + config.batch_size]
            predictions = predict_rows(models, config, rows, start=file.count)
            if config.best_of > 1:
                predictions = add_best(predictions, models, config, rows, start=file.count)
            file.append(predictions)
            progress.update(file.count, _means(predictions), log=True)
            if time.monotonic() - uploaded > _SECONDS_BETWEEN_UPLOADS:
                run.output.publish()
                uploaded = time.monotonic()
    except StopRequested:
        raise StoppedBySignal(-(-file.count // config.batch_size)) from None
    finally:
        progress.close()
        run.output.publish()
    signals.all_saved(-(-file.count // config.batch_size))


def _means(predictions: Sequence[Prediction]) -> dict[str, float]:
    rewards = [row.reward for row in predictions if row.reward is not None]
    means = {"kl": sum(row.kl for row in predictions) / len(predictions)}
    return means | ({"reward": sum(rewards) / len(rewards)} if rewards else {})


def _reward_model_metrics(
    models: Models,
    config: InferenceConfig,
    preferences: PreferenceData | None,
) -> dict[str, Any]:
    """Return how well the reward model agrees with the choices in rows that have candidates."""
    if not preferences or models.scorer is None:
        return {}
    pairs: list[tuple[float, float, int, int, int]] = []
    for start in range(0, len(preferences), _ROWS_AT_ONCE):
        rows = preferences[start : start + _ROWS_AT_ONCE]
        texts = [text for row in rows for text in row.candidates]
        prompts = [row.prompt for row in rows for _ in row.candidates]
        scores = models.scorer.score(prompts, texts, config.batch_size).tolist()
        lengths = models.codec.responses(texts).lengths.tolist()
        first = 0
        for row in rows:
            pairs += [
                (scores[a], scores[b], lengths[a], lengths[b], row.row)
                for a, b in ((first + better, first + worse) for better, worse in row.pairs)
            ]
            first += len(row.candidates)
    *columns, numbers = zip(*pairs, strict=True)
    result = evaluate_preferences(*columns, rows=numbers, seed=config.seed)
    bins = [asdict(row) for row in result.bins]
    return {**result.metrics("reward_model_"), "reward_model_calibration": bins}


def _finish(config: InferenceConfig, run: Run, further: Mapping[str, Any]) -> InferenceResult:
    """Write metrics, report and samples; the predictions get their final name."""
    path = run.output.path
    predictions = list(read_predictions(path / PARTIAL))
    metrics: dict[str, Any] = {"stage": STAGE}
    metrics |= prediction_metrics(predictions, seed=config.seed, best_of=config.best_of)
    references = [row.references for row in predictions]
    for module in config.extra_metrics:
        for prefix, responses in responses_by_prefix(predictions).items():
            texts = [response.text for response in responses]
            figures = module_metrics(module, texts, references)
            metrics |= {prefix + name: figure for name, figure in figures.items()}
    metrics |= further
    write_text(path / "samples.md", samples_markdown(predictions))
    write_text(path / "README.md", report_markdown(config, metrics))
    trackers = Trackers(["tensorboard"], path, 0, pick_device(config.device).type == "cpu", {})
    trackers.log(0, {f"{STAGE}/{k}": v for k, v in metrics.items() if isinstance(v, int | float)})
    trackers.close()
    rename(path / PARTIAL, path / FINAL)
    result = _result(run, run.finish(metrics))
    say("\n".join(f"{STAGE}: {line}" for line in [*summary_lines(metrics), result.samples]))
    return result


def _result(run: Run, metrics: Mapping[str, Any]) -> InferenceResult:
    return InferenceResult(run.output.folder, metrics, run.file(FINAL), run.file("samples.md"))
