"""Checks of a run's addresses: whether they are valid and the jobs can reach them."""

import os
import re

from rlhf.config import PipelineConfig, RewardEntry, cloud_names
from rlhf.config.sources import GivenRows, entries
from rlhf.data.sources.hub import hub_id, is_hub_address
from rlhf.files.storage import as_url

# It becomes part of folder and job names.
LONGEST_RUN_NAME = 100
RUN_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{LONGEST_RUN_NAME - 1}}}")
# The folder next to the runs in which Vertex keeps its own files.
PIPELINE_ROOT = "pipeline_root"
# Fields that name files or folders read by the jobs.
_PATHS = (
    "preference_dataset",
    "prompt_dataset",
    "eval_dataset",
    "normalization_dataset",
    "reward_model_path",
    "tensorboard_dir",
)


def not_in_the_cloud(config: PipelineConfig) -> list[str]:
    """Report fields whose addresses are invalid or out of reach for a job on another machine."""
    output_dir = as_url(config.output_dir).rstrip("/")
    problems = _of_output(output_dir)
    root = config.vertex.pipeline_root.rstrip("/")
    if root == output_dir or root.startswith(f"{output_dir}/"):
        problems.append(f"vertex.pipeline_root: {root} is the run's own folder; give another")
    for stage in ("reward_model", "ppo", "inference"):
        stage_config, own = config.stage_config(stage), getattr(config, stage)
        for field in _PATHS:
            # A problem with an inherited value was already reported for the field itself.
            if field not in own and getattr(config, field, None) is None:
                continue
            given = getattr(stage_config, field, None) or []
            name = f"{stage}.{field}" if field in own else field
            for entry in entries(given) if given else ():
                problems += _of_file(name, entry.path)
        for number, entry in enumerate(getattr(stage_config, "rewards", ())):
            problems += _of_reward(f"{stage}.rewards.{number}", entry)
        if base := stage_config.base_model:
            name = f"{stage}.base_model" if own.get("base_model") == base else "base_model"
            problems += _of_base(name, base)
    return list(dict.fromkeys(problems))


def _of_output(output_dir: str) -> list[str]:
    folder, _, run_name = output_dir.rstrip("/").rpartition("/")
    if not folder.startswith("gs://") or folder == "gs://":
        return [f"output_dir: expected gs://BUCKET/FOLDER/RUN, got {output_dir}"]
    if wrong := cloud_names.address(folder, written=True):
        return [f"output_dir: {wrong}"]
    if run_name == PIPELINE_ROOT:
        return [
            f"output_dir: {PIPELINE_ROOT} is where Vertex keeps its own files; choose another name"
        ]
    if not RUN_NAME.fullmatch(run_name):
        return [
            "output_dir: its last part is the name of the run; expected letters, digits, ., - and "
            f"_, at most 100, got {run_name!r}"
        ]
    return []


def _of_file(name: str, path: str | GivenRows) -> list[str]:
    if isinstance(path, GivenRows):
        return [f"{name}: {path}, and the jobs are other processes; give an address or a Hub id"]
    if path.startswith(("gs://", "/gcs/")):
        wrong = cloud_names.address(path)
        return [f"{name}: {wrong}"] if wrong else []
    if name.endswith("_dataset") and (hub_id(path) is not None or is_hub_address(path)):
        return []
    if "://" in path:
        return [f"{name}: {path}: the jobs read gs:// addresses; copy it to the bucket"]
    return [
        f"{name}: {path} is on this machine, the jobs are not; copy it to the bucket (gcloud "
        "storage cp) and give its gs:// address"
    ]


def _of_reward(name: str, entry: RewardEntry) -> list[str]:
    if entry.path is not None:
        return _of_base(f"{name}.path", entry.path)
    return [f"{name}.function: the jobs have no code but the library's; leave it out"]


def _of_base(name: str, base: str) -> list[str]:
    if wrong := cloud_names.address(base):
        return [f"{name}: {wrong}"]
    if base.startswith("/gcs/"):
        return []
    if base.startswith((".", "/", "~")) or os.path.isdir(base):
        return [
            f"{name}: {base} is on this machine, the jobs are not; give a Hub id or a gs:// folder"
        ]
    return []
