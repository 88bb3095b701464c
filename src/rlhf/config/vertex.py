"""What only a run on Vertex AI needs: project, image, machines, identity. Nothing of the training.

Names are those of Google's `rlhf_pipeline` and of Vertex's CustomJob where they have the same
thing. No field changes a result.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, field_validator

from rlhf.config import cloud_names
from rlhf.config.common import Schema, option
from rlhf.config.describe import nearest
from rlhf.config.loading import unreadable_character
from rlhf.config.mappings import mapping_from_text

# Vertex's names, those of its TPUs apart; a test compares them with its client library's.
ACCELERATOR_NAMES = (
    "NVIDIA_L4",
    "NVIDIA_TESLA_A100",
    "NVIDIA_A100_80GB",
    "NVIDIA_H100_80GB",
    "NVIDIA_H100_MEGA_80GB",
    "NVIDIA_H200_141GB",
    "NVIDIA_B200",
    "NVIDIA_GB200",
    "NVIDIA_RTX_PRO_6000",
    "NVIDIA_TESLA_T4",
    "NVIDIA_TESLA_V100",
    "NVIDIA_TESLA_P100",
    "NVIDIA_TESLA_P4",
    "NVIDIA_TESLA_K80",
)

# A protobuf Duration holds 10 000 years; a longer one is no JSON that Vertex can read.
LONGEST = 315_576_000_000
WEEK = 7 * 24 * 3600


def _seconds(value: str) -> str:
    if not re.fullmatch(r"[0-9]{1,15}s", value):
        raise ValueError(f"expected whole seconds and an s, such as 3600s, got {value!r:.50}")
    return value


Seconds = Annotated[str, AfterValidator(_seconds)]
# Fields with a name whose form is known.
_SHAPED = (
    "project",
    "image",
    "service_account",
    "network",
    "encryption_spec_key_name",
    "tensorboard_resource_id",
    "huggingface_token_secret",
    "serving_container_image",
)


def cloud(default: Any, description: str, **bounds: Any) -> Any:
    """Declare a field that says where and on what a run is made, never what it gives."""
    return option(default, description, affects_result=False, **bounds)


def _place(name: str, resource: str) -> str:
    """Location of a resource; "" for none, and for what is no resource."""
    return "" if cloud_names.shape(name, resource) else cloud_names.region_of(resource)


class VertexConfig(Schema):
    """Where and on what the stages run on Vertex AI; ignored by `rlhf run`."""

    project: str = cloud("", "Google Cloud project. Default: that of the credentials.")
    location: str = cloud(
        "us-central1", "Region of the pipeline and of its CPU step.", min_length=1
    )
    tuning_location: str = cloud("", "Region of the GPU jobs. Default: location.")
    image: str = cloud(
        "", "Container image. Default: LOCATION-docker.pkg.dev/PROJECT/rlhf/rlhf:VERSION."
    )
    machine_type: str = cloud(
        "", "Machine of the training and inference jobs. Default: by the memory that they need."
    )
    accelerator_type: str = cloud(
        "GPU",
        "GPU (chosen with the machine), CPU, or an accelerator by its name, such as NVIDIA_L4.",
        min_length=1,
    )
    accelerator_count: int = cloud(0, "Accelerators of a machine; 0: as many as it has.", ge=0)
    boot_disk_type: Literal["pd-ssd", "pd-standard", "hyperdisk-balanced"] = cloud(
        "pd-ssd", "Kind of the boot disk."
    )
    boot_disk_size_gb: int = cloud(
        200, "Boot disk, GB: image, models and working copies.", ge=100, le=64_000
    )
    service_account: str = cloud(
        "", "Service account of all jobs. Default: the project's default account."
    )
    network: str = cloud("", "VPC network to peer with: projects/NUMBER/global/networks/NAME.")
    encryption_spec_key_name: str = cloud("", "Customer-managed encryption key of all resources.")
    tensorboard_resource_id: str = cloud(
        "", "projects/…/locations/…/tensorboards/…; needs service_account."
    )
    strategy: Literal["STANDARD", "SPOT", "FLEX_START"] = cloud(
        "STANDARD", "How GPUs are asked for: on demand, Spot, or queued (FLEX_START)."
    )
    max_wait_duration: Seconds = cloud(
        "86400s", "How long a job may queue with FLEX_START, seconds; others ignore it."
    )
    timeout: Seconds = cloud("604800s", "Longest time of a job, seconds.")
    restart_job_on_worker_restart: bool = cloud(
        True, "Restart a job whose machine was lost; it continues from its last checkpoint."
    )
    labels: dict[str, str] = cloud(
        {}, 'Labels of pipeline and jobs; as a flag JSON, {"team": "nlp"}.'
    )
    huggingface_token_secret: str = cloud(
        "",
        "Name of a Secret Manager secret with a Hugging Face token: NAME or "
        "projects/P/secrets/NAME[/versions/V]. Read by the jobs, never written anywhere.",
    )
    model_display_name: str = cloud("", "Name in the Model Registry. Default: the run's name.")
    serving_container_image: str = cloud(
        "", "Image that serves merged/. With it, the tuned model goes to the Model Registry."
    )
    check_inputs: Literal["here", "job"] = cloud(
        "here",
        "Where rows, base models and the bucket are checked before a run. here: on the submitting "
        "machine, and again in the validation job. job: in the validation job only, so the "
        "submitter needs no access to them.",
    )
    deploy_model: bool = cloud(
        False, "Only warns: an endpoint costs money until deleted. The docs have the command."
    )
    pipeline_root: str = cloud(
        "", "gs:// folder of the pipeline's own files. Default: OUTPUT_DIRECTORY/pipeline_root."
    )

    @field_validator("labels", mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        """Turn the text that a flag gives into a value."""
        labels = mapping_from_text(value, '{"team": "nlp"}')
        for name, text in labels.items() if isinstance(labels, dict) else ():
            if not isinstance(text, str):
                raise ValueError(f"{name}: expected text, got {text!r:.200}; put it in quotes")
            if bad := unreadable_character(f"{name}{text}"):
                raise ValueError(f"expected text, got a text with {bad}")
        return labels

    def cross_problems(self) -> list[str]:
        """Say what Vertex would refuse, or accept and then not do."""
        problems = self._accelerator_problems()
        for name in ("location", "tuning_location"):
            value = getattr(self, name)
            if value and (wrong := cloud_names.region(value)):
                problems.append(f"{name}: {wrong}")
        for name in _SHAPED:
            value = getattr(self, name)
            if value and (wrong := cloud_names.shape(name, value)):
                problems.append(f"{name}: {wrong}")
        if self.huggingface_token_secret.startswith("hf_"):
            problems.append(
                "huggingface_token_secret: looks like a token; expected the name of a secret that "
                "holds it"
            )
        if self.pipeline_root and not self.pipeline_root.startswith("gs://"):
            problems.append(f"pipeline_root: expected gs://…, got {self.pipeline_root!r}")
        elif wrong := cloud_names.address(self.pipeline_root, written=True):
            problems.append(f"pipeline_root: {wrong}")
        if len(self.model_display_name) > 128:
            problems.append("model_display_name: expected at most 128 characters")
        problems += [f"labels: {wrong}" for wrong in cloud_names.labels(self.labels)]
        return problems + self._region_problems() + self._time_problems()

    def _accelerator_problems(self) -> list[str]:
        known = ("GPU", "CPU", *ACCELERATOR_NAMES)
        if self.accelerator_type.upper().startswith("TPU"):
            return [
                f"accelerator_type: {self.accelerator_type} cannot be used, the code runs on GPU "
                "and CPU; give GPU, or an accelerator such as NVIDIA_L4"
            ]
        if self.accelerator_type not in known:
            return [
                f"accelerator_type: unknown accelerator {self.accelerator_type!r}"
                f"{nearest(self.accelerator_type.upper(), known)}; "
                f"expected GPU, CPU or one of {', '.join(ACCELERATOR_NAMES)}"
            ]
        if self.accelerator_type == "CPU" and self.accelerator_count:
            return ["accelerator_count: a CPU job has none; leave it out"]
        return []

    def _region_problems(self) -> list[str]:
        """Check that a key and a TensorBoard are in the region of the jobs."""
        problems = []
        gpus = self.tuning_location or self.location
        key = _place("encryption_spec_key_name", self.encryption_spec_key_name)
        elsewhere = [region for region in dict.fromkeys((self.location, gpus)) if region != key]
        if key and elsewhere:
            problems.append(
                f"encryption_spec_key_name: the key is in {key}, but jobs run in "
                f"{' and '.join(elsewhere)}; a key serves its own region only, so location and "
                "tuning_location have to be the key's"
            )
        board = _place("tensorboard_resource_id", self.tensorboard_resource_id)
        if board and board != gpus:
            problems.append(
                f"tensorboard_resource_id: the TensorBoard is in {board}, the GPU jobs in {gpus}; "
                f"make one there: gcloud ai tensorboards create --region={gpus}"
            )
        if self.tensorboard_resource_id and not self.service_account:
            problems.append("tensorboard_resource_id: needs a service_account, give one")
        return problems

    def _time_problems(self) -> list[str]:
        problems = []
        seconds = int(self.timeout[:-1])
        if not 0 < seconds <= LONGEST:
            problems.append(
                f"timeout: expected at least 1s, at most {LONGEST}s, got {self.timeout}"
            )
        elif self.strategy == "FLEX_START" and seconds > WEEK:
            problems.append(
                f"timeout: FLEX_START gives machines for at most seven days, {WEEK}s, got "
                f"{self.timeout}"
            )
        if int(self.max_wait_duration[:-1]) > LONGEST:
            problems.append(f"max_wait_duration: expected at most {LONGEST}s")
        return problems
