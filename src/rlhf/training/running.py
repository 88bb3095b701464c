"""What every training stage does around its trainer, once its inputs are known to be good."""

from collections.abc import Callable

from rlhf.config import TrainingConfig
from rlhf.console import say, show
from rlhf.files.run_folder import Run, Status
from rlhf.stages import RunResult
from rlhf.training.trainer import Trainer


def run_training(
    run: Run,
    config: TrainingConfig,
    make_trainer: Callable[[], Trainer],
    *,
    report: Callable[[], str],
) -> RunResult:
    """Train, unless this is a dry run or the stage is finished already.

    Args:
        run: The output folder, which is held while the trainer exists.
        config: The stage's configuration.
        make_trainer: Loads the models.
        report: Says what would be done, for a dry run.

    Raises:
        InputError: Another process writes into the folder, or a checkpoint is bad.
        StoppedBySignal: After saving, when SIGTERM or SIGINT came.
    """
    if config.dry_run:
        show(report())
        return RunResult(config.output_dir, {})
    if run.status is Status.FINISHED:
        say(f"{config.stage}: already finished in {config.output_dir}")
        return RunResult(config.output_dir, run.conclude())
    with run.held():
        return RunResult(config.output_dir, make_trainer().train())
