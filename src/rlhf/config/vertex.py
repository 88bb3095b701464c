"""What only a run on Vertex AI needs: project, image, machines, identity. Nothing of the training.

Names are those of Google's `rlhf_pipeline` and of Vertex's CustomJob where they have the same
thing. No field changes a result.
"""

import json
import re
from typing import Annotated, Any, Literal

from pydantic import StringConstraints, field_validator

from rlhf.config.common import Schema, option
from rlhf.config.describe import nearest

# Labels of Google Cloud: lower case, digits, - and _; at most 63 characters.
_LABEL = re.compile(r"[a-z0-9_-]{0,63}")
_TENSORBOARD = re.compile(r"projects/[^/]+/locations/[^/]+/tensorboards/[^/]+")
_KEY = re.compile(r"projects/[^/]+/locations/[^/]+/keyRings/[^/]+/cryptoKeys/[^/]+")
_SECRET = re.compile(r"[A-Za-z0-9_-]+|projects/[^/]+/secrets/[^/]+(/versions/[^/]+)?")

# Vertex's names, those of its TPUs apart; a test compares them with its client library's.
ACCELERATORS = (
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

Seconds = Annotated[str, StringConstraints(pattern=r"^\d+s$")]


def cloud(default: Any, description: str, **bounds: Any) -> Any:
    """Declare a field that says where and on what a run is made, never what it gives."""
    return option(default, description, affects_result=False, **bounds)


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
    deploy_model: bool = cloud(
        False, "Only warns: an endpoint costs money until deleted. The docs have the command."
    )
    pipeline_root: str = cloud(
        "", "gs:// folder of the pipeline's own files. Default: OUTPUT_DIRECTORY/pipeline_root."
    )

    @field_validator("labels", mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        """A flag can only bring text."""
        try:
            labels = json.loads(value) if isinstance(value, str) else value
        except ValueError:
            raise ValueError(f'expected JSON such as {{"team": "nlp"}}, got {value!r}') from None
        for name, text in labels.items() if isinstance(labels, dict) else ():
            if not isinstance(text, str):
                raise ValueError(f"{name}: expected text, got {text!r:.200}; put it in quotes")
        return labels

    def cross_problems(self) -> list[str]:
        """Say what Vertex would refuse, or accept and then not do."""
        problems = []
        if self.accelerator_type.upper().startswith("TPU"):
            problems.append(
                f"accelerator_type: {self.accelerator_type} cannot be used, the code runs on GPU "
                "and CPU; give GPU, or an accelerator such as NVIDIA_L4"
            )
        elif self.accelerator_type not in ("GPU", "CPU", *ACCELERATORS):
            known = nearest(self.accelerator_type.upper(), ("GPU", "CPU", *ACCELERATORS))
            problems.append(
                f"accelerator_type: unknown accelerator {self.accelerator_type!r}{known}; "
                f"expected GPU, CPU or one of {', '.join(ACCELERATORS)}"
            )
        if self.accelerator_type == "CPU" and self.accelerator_count:
            problems.append("accelerator_count: a CPU job has none; leave it out")
        if self.tensorboard_resource_id and not self.service_account:
            problems.append("tensorboard_resource_id: needs a service_account, give one")
        for name, pattern, expected in (
            ("tensorboard_resource_id", _TENSORBOARD, "projects/P/locations/L/tensorboards/ID"),
            (
                "encryption_spec_key_name",
                _KEY,
                "projects/P/locations/L/keyRings/R/cryptoKeys/K",
            ),
            ("huggingface_token_secret", _SECRET, "NAME or projects/P/secrets/NAME/versions/V"),
        ):
            value = getattr(self, name)
            if value and not pattern.fullmatch(value):
                # A token pasted by mistake must not show up in an error either.
                shown = "" if name == "huggingface_token_secret" else f", got {value!r}"
                problems.append(f"{name}: expected {expected}{shown}")
        if self.huggingface_token_secret.startswith("hf_"):
            problems.append(
                "huggingface_token_secret: looks like a token; expected the name of a secret that "
                "holds it"
            )
        if self.pipeline_root and not self.pipeline_root.startswith("gs://"):
            problems.append(f"pipeline_root: expected gs://…, got {self.pipeline_root!r}")
        problems += [
            f"labels: {name}={value}: expected lower case letters, digits, - and _, at most 63"
            for name, value in self.labels.items()
            if not (name and _LABEL.fullmatch(name) and _LABEL.fullmatch(value))
        ]
        return problems
