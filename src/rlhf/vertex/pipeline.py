"""The DAG `rlhf-pipeline`: validate → reward model → PPO → inference, each a Vertex custom job.

Every job runs the same container image; only arguments and machine differ. Signatures are generated
from the table in `parameters.py`, so that each parameter is written down once.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from google_cloud_pipeline_components.utils import build_serverless_customjob_container_spec
from kfp import compiler, dsl

from rlhf.vertex import default_image
from rlhf.vertex.compat import project_and_location
from rlhf.vertex.parameters import PARAMETERS, REQUIRED, Parameter, description

PIPELINE_NAME = "rlhf-pipeline"
_PROJECT, _LOCATION = project_and_location()
# Defaults that are only known while the pipeline runs.
_AT_RUN_TIME = {
    "project": _PROJECT,
    "location": _LOCATION,
    "image": default_image(_PROJECT, _LOCATION),
    "output_directory": dsl.PIPELINE_ROOT_PLACEHOLDER,
    "run_name": dsl.PIPELINE_JOB_NAME_PLACEHOLDER,
}
VALIDATION_MACHINE = "e2-highmem-4"
# Parameters that are passed to GPU jobs unchanged.
_OF_GPU_JOBS = (
    "project",
    "location",
    "image",
    "boot_disk_type",
    "boot_disk_size_gb",
    "service_account",
    "network",
    "encryption_spec_key_name",
    "strategy",
    "max_wait_duration",
    "timeout",
    "restart_job_on_worker_restart",
    "labels",
    "huggingface_token_secret",
    "tensorboard_resource_id",
)
# Decided by the validation step.
_DECIDED = {
    "config": str,
    "machine_type": str,
    "accelerator_type": str,
    "accelerator_count": int,
    "tuning_location": str,
    "run_directory": str,
    "run_name": str,
}
# Output parameters of each step, all text except the number of accelerators.
OUTPUTS: dict[str, dict[str, type]] = {
    "validate": {
        # A step cannot have an input and an output with the same name.
        "resolved_reward_model_config": str,
        "resolved_ppo_config": str,
        "resolved_inference_config": str,
        "resolved_output_prediction_gcs_path": str,
        **{f"resolved_{name}": type_ for name, type_ in _DECIDED.items() if name != "config"},
    },
    "reward_model": {"reward_model_path": str},
    "ppo": {
        "output_model_path": str,
        "output_adapter_path": str,
        "model_resource_name": str,
        "endpoint_resource_name": str,
    },
    "inference": {"output_prediction_gcs_path": str},
}


class PipelineOutputs(NamedTuple):
    """Outputs of the pipeline; text that does not apply is empty."""

    output_model_path: str
    output_adapter_path: str
    output_prediction_gcs_path: str
    model_resource_name: str
    endpoint_resource_name: str


def payload(
    stage: str,
    given: dict[str, Any],
    machine: dict[str, Any],
    extra: dict[str, Any],
    arguments: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the CustomJob that a step requests from Vertex.

    The launcher drops whatever renders as '', 0, false or {}, so nothing here is conditional.
    """
    return {
        "display_name": f"{given['run_name']}-{stage}",
        "job_spec": {
            "worker_pool_specs": [
                {
                    "machine_spec": machine,
                    "replica_count": 1,
                    "disk_spec": {
                        "boot_disk_type": given["boot_disk_type"],
                        "boot_disk_size_gb": given["boot_disk_size_gb"],
                    },
                    "container_spec": {
                        "image_uri": given["image"],
                        # KFP escapes the executor input, so free text in it cannot break the JSON.
                        "args": [
                            "job",
                            stage,
                            "--executor_input={{$.json_escape[1]}}",
                            *arguments,
                        ],
                    },
                }
            ],
            "scheduling": {
                "timeout": given["timeout"],
                "restart_job_on_worker_restart": given["restart_job_on_worker_restart"],
                "strategy": given["strategy"],
                "max_wait_duration": given["max_wait_duration"],
            },
            "service_account": given["service_account"],
            "network": given["network"],
            **extra,
        },
        "labels": given["labels"],
        "encryption_spec": {"kms_key_name": given["encryption_spec_key_name"]},
    }


def _validation_job(given: dict[str, Any]) -> dsl.ContainerSpec:
    # Neither Spot nor the GPU queue: CPUs are always available.
    on_demand = given | {"strategy": "STANDARD", "max_wait_duration": ""}
    on_demand["boot_disk_type"] = "pd-ssd"  # the only kind that every machine supports
    return build_serverless_customjob_container_spec(
        project=given["project"],
        location=given["location"],
        custom_job_payload=payload(
            "validate",
            on_demand,
            {"machine_type": VALIDATION_MACHINE},
            {},
            # These give an unnamed run a name that no other use of the pipeline has: a step's
            # number is unique even in a loop or in a nested pipeline.
            [
                f"--pipeline_job={dsl.PIPELINE_JOB_NAME_PLACEHOLDER}",
                f"--pipeline_task={dsl.PIPELINE_TASK_ID_PLACEHOLDER}",
            ],
        ),
        gcp_resources=given["gcp_resources"],
    )


def _gpu_job(stage: str, given: dict[str, Any]) -> dsl.ContainerSpec:
    machine = {
        name: given[name] for name in ("machine_type", "accelerator_type", "accelerator_count")
    }
    extra = {
        "tensorboard": given["tensorboard_resource_id"],
        "base_output_directory": {"output_uri_prefix": f"{given['run_directory']}/vertex/{stage}"},
    }
    return build_serverless_customjob_container_spec(
        project=given["project"],
        location=given["tuning_location"],
        custom_job_payload=payload(stage, given, machine, extra),
        gcp_resources=given["gcp_resources"],
    )


def _component(
    stage: str, inputs: Sequence[Parameter], text: str, job: Callable[[dict[str, Any]], Any]
) -> Any:
    """Create a container component from a list of inputs and the outputs of its stage."""

    def step(*values: Any) -> Any:
        return job(dict(zip(step.__signature__.parameters, values, strict=True)))  # type: ignore[attr-defined]

    parameters = [_argument(parameter, default=False) for parameter in inputs]
    for name, annotation in (
        ("metrics", dsl.Output[dsl.Metrics]),
        ("summary", dsl.Output[dsl.Markdown]),
        ("gcp_resources", dsl.OutputPath(str)),
        *((name, dsl.OutputPath(type_)) for name, type_ in OUTPUTS[stage].items()),
    ):
        if not (stage == "validate" and name == "metrics"):
            parameters.append(_positional(name, annotation))
    step.__name__ = stage
    step.__doc__ = text
    step.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return dsl.container_component(step)


def _positional(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> Any:
    return inspect.Parameter(
        name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation, default=default
    )


def _argument(parameter: Parameter, *, default: bool) -> inspect.Parameter:
    value = _AT_RUN_TIME.get(parameter.name, parameter.default)
    if value is REQUIRED or not default:
        return _positional(parameter.name, parameter.type)
    return _positional(parameter.name, parameter.type, value)


def _inputs(names: Sequence[str]) -> list[Parameter]:
    """Return the inputs of a GPU job: the validation's decisions, and unchanged parameters."""
    own = [Parameter(name, type_, REQUIRED, "") for name, type_ in _DECIDED.items()]
    return [*own, *(PARAMETERS[name] for name in names)]


validate = _component(
    "validate",
    list(PARAMETERS.values()),
    "Checks parameters, rows, base models and output folder on a CPU, and chooses the machine.",
    _validation_job,
)
_STAGES = {
    stage: _component(stage, _inputs(names), text, partial(_gpu_job, stage))
    for stage, names, text in (
        ("reward_model", _OF_GPU_JOBS, "Trains a reward model on preference pairs."),
        (
            "ppo",
            (*_OF_GPU_JOBS, "serving_container_image", "model_display_name", "deploy_model"),
            "Tunes the policy with PPO against the reward model.",
        ),
        ("inference", _OF_GPU_JOBS, "Generates with the tuned and the untuned model and compares."),
    )
}


def _dag(*values: Any) -> PipelineOutputs:
    given = dict(zip(PARAMETERS, values, strict=True))

    def run(stage: str, title: str) -> Any:
        component = _STAGES[stage]
        decided = {
            name: checked.outputs[f"resolved_{name}"] for name in _DECIDED if name != "config"
        }
        wanted = set(component.component_spec.inputs)
        task = component(
            config=checked.outputs[f"resolved_{stage}_config"],
            **decided,
            **{name: value for name, value in given.items() if name in wanted - set(decided)},
        )
        task.set_caching_options(False)
        return task.set_display_name(title)

    checked = validate(**given).set_caching_options(False).set_display_name("Validate")
    reward = run("reward_model", "Reward model")
    tuned = run("ppo", "PPO").after(reward)
    with dsl.If(given["eval_dataset"] != "", name="with-eval-dataset"):
        run("inference", "Inference").after(tuned)
    return PipelineOutputs(
        output_prediction_gcs_path=checked.outputs["resolved_output_prediction_gcs_path"],
        **{name: tuned.outputs[name] for name in OUTPUTS["ppo"]},
    )


def _with_signature(function: Any) -> Any:
    function.__signature__ = inspect.Signature(
        [_argument(parameter, default=True) for parameter in PARAMETERS.values()],
        return_annotation=PipelineOutputs,
    )
    lines = [f"    {name}: {description(PARAMETERS[name])}" for name in PARAMETERS]
    function.__doc__ = "\n".join(
        [
            "Reward model, PPO and inference for T5 and LLaMA models, from files in a bucket.",
            "",
            "Args:",
            *lines,
        ]
    )
    return function


rlhf_pipeline = dsl.pipeline(
    name=PIPELINE_NAME,
    description="Reinforcement learning from human feedback for T5 and LLaMA models.",
)(_with_signature(_dag))


def compile_pipeline(path: str) -> None:
    """Write the pipeline as YAML for Vertex AI and KFP.

    Args:
        path: Output file, ending in .yaml.
    """
    compiler.Compiler().compile(rlhf_pipeline, path)
