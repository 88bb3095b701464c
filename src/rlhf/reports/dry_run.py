"""What `--dry_run` prints: data, steps, model, and memory per role."""

import math
from collections.abc import Sequence

from rlhf.config import StageConfig, TrainingConfig
from rlhf.models.loading import read_model_config
from rlhf.models.memory import count_parameters, memory_per_role, total_memory


def dry_run_report(
    stage: str,
    config: StageConfig,
    rows: int,
    data_lines: Sequence[str] = (),
    *,
    base_model: str | None = None,
    reward_bases: Sequence[str] = (),
) -> str:
    """Say what a stage would do: its data, its steps, its model and memory per role.

    Args:
        stage: Its name, for the heading.
        config: Its configuration.
        rows: Rows that it would work on.
        data_lines: What was found in the data, line by line.
        base_model: The base where it is not `config.base_model`; none at all leaves memory out.
        reward_bases: Bases of reward models that are not the policy's.

    Raises:
        InputError: A checkpoint's config.json cannot be read or is of another architecture.
    """
    lines = [f"{stage}: dry run; no weights are loaded and nothing is trained", *data_lines]
    lines.append(_steps_line(config, rows))
    name = base_model or config.base_model
    if name is not None:
        revision = None if base_model else config.revision
        model_config = read_model_config(name, revision)
        lora = config.lora if isinstance(config, TrainingConfig) else None
        counts = count_parameters(model_config, lora)
        trained = f", {counts.adapter:,} in an adapter" if counts.adapter else ""
        lines.append(
            f"model: {name} ({model_config.model_type}), {counts.base:,} parameters{trained}"
        )
        reward_configs = [read_model_config(base) for base in reward_bases]
        lines += [
            "memory (estimate):",
            memory_table(memory_per_role(model_config, config, reward_configs)),
        ]
    return "\n".join(lines)


def _steps_line(config: StageConfig, rows: int) -> str:
    if not isinstance(config, TrainingConfig):
        return f"rows: {rows}, {math.ceil(rows / config.batch_size)} batches of {config.batch_size}"
    steps = config.total_steps(rows)
    seen = steps * config.rows_per_step
    epochs = f"{seen / rows:.2f} epochs of {rows} rows" if rows else "no rows"
    total = steps * config.batch_size
    return f"steps: {steps} of {config.batch_size}, {total} in all, {epochs}"


def memory_table(roles: dict[str, int]) -> str:
    """Format bytes per role as lines of a table, the peak last."""
    rows = [*roles.items(), ("peak", total_memory(roles))]
    width = max(len(role) for role, _ in rows)
    return "\n".join(f"  {role:<{width}}  {_size(size):>10}" for role, size in rows)


def _size(number: int) -> str:
    if number < 2**30:
        return f"{number / 2**20:.1f} MiB"
    return f"{number / 2**30:.1f} GiB"
