"""What every training stage does around its trainer once its inputs have been validated."""

from collections.abc import Callable

from rlhf.console import say, show
from rlhf.files.run_folder import Run, Status
from rlhf.stages import RunResult
from rlhf.training.trainer import Trainer


def run_training(
    run: Run,
    make_trainer: Callable[[], Trainer],
    *,
    report: Callable[[], str],
) -> RunResult:
    """Train, unless this is a dry run or the stage has already finished.

    Args:
        run: The output folder, which is held as long as the trainer exists.
        make_trainer: Loads the models and returns the trainer.
        report: Returns what a dry run prints.

    Raises:
        InputError: Another process is writing to the folder, or a checkpoint is bad.
        StoppedBySignal: After saving, when SIGTERM or SIGINT came.
    """
    config = run.config
    if config.dry_run:
        show(report())
        return RunResult(config.output_dir, {})
    if run.status is Status.FINISHED:
        say(f"{config.stage}: already finished in {config.output_dir}")
        return RunResult(config.output_dir, run.conclude())
    with run.held():
        return RunResult(config.output_dir, make_trainer().train())
