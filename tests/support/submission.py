"""Shared parts of the tests of `rlhf vertex submit`: a run, and a fake of Vertex's API for it."""

from collections.abc import Iterator

import pytest
from google.auth.credentials import AnonymousCredentials
from google.cloud.aiplatform import initializer
from support.fake_vertex import FakeVertex
from support.vertex_models import SHAPES
from transformers import AutoConfig

from rlhf.vertex import follow, submit

YAML = """
base_model: google/flan-t5-base
preference_dataset: gs://bkt/pairs.jsonl
prompt_dataset: [gs://bkt/1.jsonl, gs://bkt/2.jsonl]
eval_dataset: gs://bkt/eval.jsonl
output_dir: gs://bkt/runs/First.run
seed: 3
lora: {rank: 4}
instruction: "Say \\"it\\",\\nbriefly: 要約"
reward_model: {train_steps: 7}
ppo: {num_epochs: 2, temperature: 0.7}
vertex:
  accelerator_type: CPU
  tuning_location: europe-west4
  service_account: tuner@p.iam.gserviceaccount.com
  network: projects/1/global/networks/vpc
  labels: {team: nlp}
"""


def fake_api(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeVertex]:
    """Provide the API, anonymous credentials, and files that are not checked."""
    fake = FakeVertex()
    settings = initializer.global_config
    for name in ("_project", "_location", "_credentials"):  # whatever a test sets them to
        monkeypatch.setattr(settings, name, getattr(settings, name))
    monkeypatch.setattr(settings, "_api_endpoint", fake.url)
    monkeypatch.setattr(settings, "_api_transport", "rest")
    credentials = (AnonymousCredentials(), "own-project")
    monkeypatch.setattr("google.auth.default", lambda **_: credentials)
    monkeypatch.setattr(submit, "check_inputs", lambda config: ["pairs: 9 rows"])
    monkeypatch.setattr(submit, "find_files", lambda *_: {})  # the bucket exists
    shape = dict(SHAPES["tiny"])
    tiny = AutoConfig.for_model(shape.pop("model_type"), **shape)
    monkeypatch.setattr("rlhf.vertex.machines.read_model_config", lambda *_: tiny)
    monkeypatch.setattr(follow, "POLL_SECONDS", 0)
    yield fake
    fake.close()
