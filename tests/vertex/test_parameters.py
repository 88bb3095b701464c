"""The table of parameters: Google's names and defaults, what is refused, and the way back."""

import inspect
import json
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct
from google_cloud_pipeline_components.preview.llm.rlhf.component import rlhf_pipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from support.vertex_parameters import NOTEBOOK

from rlhf.config import PipelineConfig, SourceEntry
from rlhf.errors import InputError
from rlhf.vertex.addresses import not_in_the_cloud
from rlhf.vertex.base_models import HUB_NAMES
from rlhf.vertex.conversion import to_config, to_parameters
from rlhf.vertex.parameters import PARAMETERS, REQUIRED, SECTIONS

PLACE = {"output_directory": "gs://bkt/runs", "run_name": "first"}
LEAST = {
    "prompt_dataset": "gs://bkt/prompts.jsonl",
    "preference_dataset": "gs://bkt/pairs.jsonl",
    "large_model_reference": "google/flan-t5-base",
    **PLACE,
}
STAGES = tuple(SECTIONS.values())
HERE = "projects/my-project/locations/us-central1"


def problems_of(**parameters: Any) -> list[str]:
    with pytest.raises(InputError) as caught:
        to_config(LEAST | parameters)
    return caught.value.problems


def refused(**fields: Any) -> list[str]:
    """Problems of a configuration that the pipeline cannot express."""
    with pytest.raises(InputError) as caught:
        to_parameters(run_config(**fields))
    return caught.value.problems


def run_config(**fields: Any) -> PipelineConfig:
    least = {
        "base_model": "google/flan-t5-base",
        "preference_dataset": "gs://bkt/pairs.jsonl",
        "output_dir": "gs://bkt/runs/first",
    }
    return PipelineConfig.model_validate(least | fields)


def test_names_and_defaults_are_googles():
    google = inspect.signature(rlhf_pipeline.pipeline_func).parameters
    run_time = {"project", "location"}  # placeholders there, and in the compiled pipeline
    assert len(google) == 19
    for name, theirs in google.items():
        default = PARAMETERS[name].default
        if theirs.default is inspect.Parameter.empty:
            assert default is REQUIRED, name
        elif name == "deploy_model":
            assert (theirs.default, default) == (True, False)
        elif name not in run_time:
            assert default == ("" if theirs.default is None else theirs.default), name
            assert type(default) is type(theirs.default or ""), name
    assert list(PARAMETERS)[:19] == list(google)


def test_the_notebooks_parameters_mean_what_they_meant():
    config = to_config(NOTEBOOK | PLACE)
    reward, tuned, inference = map(config.stage_config, STAGES)
    assert reward.base_model == tuned.base_model == "meta-llama/Llama-2-7b-hf"
    assert (reward.train_steps, tuned.train_steps, tuned.kl_coeff) == (1410, 320, 0.1)
    assert (reward.learning_rate_multiplier, tuned.learning_rate_multiplier) == (1, 1)
    assert reward.preference_dataset == NOTEBOOK["preference_dataset"]
    assert tuned.prompt_dataset == NOTEBOOK["prompt_dataset"]
    assert inference.eval_dataset == NOTEBOOK["eval_dataset"]
    assert {stage.instruction for stage in (reward, tuned, inference)} == {NOTEBOOK["instruction"]}
    assert {(s.prompt_sequence_length, s.target_sequence_length) for s in (reward, tuned)} == {
        (512, 64)
    }
    assert tuned.output_dir == "gs://bkt/runs/first/policy"


def test_steps_left_out_are_googles_and_zero_leaves_them_to_the_stage():
    assert to_config(LEAST).stage_config("ppo").train_steps == 1000
    config = to_config(LEAST | {"reinforcement_learning_train_steps": 0})
    assert config.stage_config("ppo").total_steps(rows=10) == 200
    epochs = {"reward_model_train_steps": 0, "reward_model_config": {"num_epochs": 2}}
    assert to_config(LEAST | epochs).stage_config("reward_model").num_epochs == 2


def test_null_counts_as_left_out_and_rest_writes_integers_as_doubles():
    nulls = {name: None for name in PARAMETERS if name not in LEAST}
    assert to_config(LEAST | nulls) == to_config(LEAST)
    doubles = {"prompt_sequence_length": 64.0, "reward_model_train_steps": 5.0, "kl_coeff": 0}
    config = to_config(LEAST | doubles | {"ppo_config": {"batch_size": 4.0, "lora": {"rank": 2.0}}})
    tuned = config.stage_config("ppo")
    assert (tuned.prompt_sequence_length, tuned.batch_size, tuned.lora.rank) == (64, 4, 2)
    assert config.stage_config("reward_model").train_steps == 5
    assert tuned.kl_coeff == 0


def test_all_problems_are_said_at_once_by_the_parameters_names():
    with pytest.raises(InputError) as caught:
        to_config(
            {
                "preference_dataset": "",
                "kl_coef": 0.1,
                "instruction": 5,
                "prompt_sequence_length": 64.5,
                "target_sequence_length": True,
                "deploy_model": "yes",
                "labels": "team",
                "boot_disk_size_gb": 1,
                "large_model_reference": "text-bison@001",
                "accelerator_type": "TPU",
                "output_directory": "bucket/runs",
                "run_name": "a run",
                "ppo_config": {"kl_coeff": 0.2, "gama": 1, "lora": {"rnk": 3}, "base_model": "x/y"},
                "inference_config": {"output_dir": "x"},
            }
        )
    problems = caught.value.problems
    expected = [
        "prompt_dataset: is required, but not given",
        "preference_dataset: is required, but empty",
        "kl_coef: unknown parameter; did you mean `kl_coeff`?",
        "instruction: expected text, got 5",
        "prompt_sequence_length: expected an integer, got 64.5",
        "target_sequence_length: expected an integer, got True",
        "deploy_model: expected true or false, got 'yes'",
        "labels: expected a JSON object, got 'team'",
        "large_model_reference: text-bison@001 cannot be tuned here",
        "output_directory: expected gs://BUCKET/FOLDER, got 'bucket/runs'",
        "run_name: expected letters, digits",
        "ppo_config: kl_coeff: is the parameter kl_coeff; give it there",
        "ppo_config: base_model: is the parameter large_model_reference; give it there",
        "ppo_config: gama: unknown field; did you mean `gamma`?",
        "ppo_config: lora.rnk: unknown field; did you mean `rank`?",
        "inference_config: output_dir: is set by the pipeline and cannot be given here",
        "boot_disk_size_gb: expected integer greater than or equal to 100, got 1",
    ]
    for start in expected:
        assert [p for p in problems if p.startswith(start)], (start, problems)
    assert len(problems) == len(expected), problems


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"kl_coeff": -1}, "kl_coeff: expected number greater than or equal to 0"),
        ({"kl_coeff": float("nan")}, "kl_coeff: "),
        ({"reinforcement_learning_train_steps": -3}, "reinforcement_learning_train_steps: "),
        ({"labels": {"team": 5}}, "labels: team: expected text, got 5"),
        ({"labels": {"Team": "nlp"}}, "labels: Team=nlp: expected lower case"),
        ({"eval_dataset": "[gs://bkt/x"}, "eval_dataset: expected an address, or a JSON list"),
        ({"eval_dataset": "[]"}, "eval_dataset: "),
        ({"accelerator_type": "NVIDIA_L5"}, "accelerator_type: unknown accelerator 'NVIDIA_L5'"),
        ({"tensorboard_resource_id": f"{HERE}/tensorboards/1"}, "needs a service_"),
        ({"encryption_spec_key_name": "key"}, "encryption_spec_key_name: expected projects/P/"),
        ({"huggingface_token_secret": "hf_secret"}, "looks like a token"),
        ({"timeout": "1h"}, "timeout: "),
        ({"timeout": "0s"}, "timeout: expected at least 1s"),
        ({"location": "us-centrall1"}, "location: 'us-centrall1' is no region of Vertex AI"),
        ({"network": "default"}, "network: expected projects/NUMBER/global/networks/NAME"),
        ({"service_account": "someone"}, "service_account: expected an address such as NAME@"),
        ({"output_directory": "file:///x"}, "output_directory: expected gs://BUCKET/FOLDER"),
        ({"output_directory": "/data"}, "output_directory: expected gs://BUCKET/FOLDER"),
        ({"output_directory": "s3://bkt/x"}, "output_directory: expected gs://BUCKET/FOLDER"),
        ({"output_directory": "gs://YOUR-BUCKET/x"}, "output_directory: gs://YOUR-BUCKET/x still"),
        ({"project": "YOUR_PROJECT"}, "project: YOUR_PROJECT still has the placeholder"),
        ({"strategy": "spot"}, "strategy: expected STANDARD | SPOT | FLEX_START"),
        ({"reward_model_revision": "main"}, "reward_model_revision: is for a reward_model_ref"),
        ({"reward_model_config": {"num_epochs": 1}}, "reward_model_train_steps has to be 0"),
        (
            {"ppo_config": {"learning_rate": 1e-4}, "reinforcement_learning_rate_multiplier": 2},
            "ppo_config: learning_rate: with it reinforcement_learning_rate_multiplier has to be 1",
        ),
        ({"ppo_config": {"num_minibatches": 3}}, "ppo_config: num_minibatches: 3 does not divide"),
        ({"ppo_config": {"dry_run": True}}, "ppo_config: dry_run: "),
        (
            {"inference_config": {"eval_dataset": "gs://bkt/x"}},
            "inference_config: eval_dataset: ",
        ),
    ],
)
def test_a_problem_names_the_parameter(parameters, said):
    [problem] = problems_of(**parameters)
    assert said in problem


def test_a_pasted_token_is_not_repeated():
    for token in ("hf_abcdefghijklmnop", "hf_abc/def ghi"):
        assert token not in "\n".join(problems_of(huggingface_token_secret=token))


@pytest.mark.parametrize(("name", "address"), HUB_NAMES.items())
def test_googles_model_names(name, address):
    assert to_config(LEAST | {"large_model_reference": name}).base_model == address
    upper = name.upper().replace("-", "_")  # Google's own components write LLAMA_2_7B
    assert to_config(LEAST | {"large_model_reference": upper}).base_model == address
    config = to_config(LEAST | {"reward_model_reference": name, "revision": "v2"})
    reward = config.stage_config("reward_model")
    assert (reward.base_model, reward.revision) == (address, None)
    assert config.stage_config("ppo").revision == "v2"


@pytest.mark.parametrize("address", ["gs://bkt/model", "/gcs/bkt/model", "meta-llama/Llama-3.2-1B"])
def test_addresses_are_taken_as_they_are(address):
    assert to_config(LEAST | {"large_model_reference": address}).base_model == address


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("text-bison@001", "its weights are not available; give one of t5-small"),
        ("chat-bison", "its weights are not available"),
        ("gemini-1.5-pro", "its weights are not available"),
        ("llama-2-7", "unknown model 'llama-2-7'; did you mean `llama-2-7b`?"),
        ("gpt2", "unknown model 'gpt2'"),
    ],
)
@pytest.mark.parametrize("parameter", ["large_model_reference", "reward_model_reference"])
def test_models_that_cannot_be_had(parameter, name, said):
    [problem] = problems_of(**{parameter: name})
    assert problem.startswith(f"{parameter}: ")
    assert said in problem


@pytest.mark.parametrize("kind", ["TPU", "TPU_V3", "tpu"])
def test_tpus_are_refused_with_the_alternative(kind):
    [problem] = problems_of(accelerator_type=kind)
    assert problem.startswith(f"accelerator_type: {kind} cannot be used")
    assert "NVIDIA_L4" in problem


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"sft_dataset": "gs://bkt/demos.jsonl"}, "sft_dataset"),
        ({"sft": {"dataset": "gs://bkt/demos.jsonl"}}, "sft_dataset"),
        ({"dpo": {"beta": 0.2}}, "dpo"),
        ({"ppo": {"instruction": "Be brief."}}, "ppo.instruction"),
        ({"reward_model": {"prompt_sequence_length": 9}}, "reward_model.prompt_sequence_length"),
        ({"ppo": {"prompt_dataset": "gs://bkt/x.jsonl"}}, "ppo.prompt_dataset"),
        ({"ppo": {"base_model": "a/b"}}, "ppo.base_model"),
        ({"inference": {"base_model": "a/b"}}, "inference.base_model"),
        (
            {"reward_model": {"preference_dataset": "gs://bkt/x"}},
            "reward_model.preference_dataset",
        ),
        ({"inference": {"eval_dataset": "gs://bkt/x.jsonl"}}, "inference.eval_dataset"),
        ({"base_model": "t5-small"}, "base_model"),  # another one on the Hub
        ({"reward_model": {"base_model": "t5-large"}}, "reward_model.base_model"),
        ({"base_model": "gpt2"}, "base_model"),
    ],
)
def test_what_the_pipeline_cannot_express_is_refused_by_the_fields_name(fields, named):
    [problem] = refused(**fields)
    assert problem.startswith(f"{named}: ")


def test_a_section_may_repeat_what_all_stages_have():
    config = run_config(ppo={"prompt_sequence_length": 512}, reward_model={"instruction": ""})
    assert "prompt_sequence_length" not in to_parameters(config)["ppo_config"]


def through_the_wire(parameters: dict[str, Any]) -> dict[str, Any]:
    """As parameters travel: in a protobuf Struct, which has only doubles, as JSON text."""
    struct = Struct()
    struct.update(parameters)
    return json.loads(json.dumps(_all_floats(MessageToDict(struct))))


def _all_floats(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _all_floats(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_all_floats(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("\"\n\\{}'"))
PATHS = st.sampled_from(
    ["gs://bkt/ü.jsonl", "/gcs/bkt/*.jsonl", ["gs://bkt/1.jsonl", 'gs://bkt/"2".jsonl']]
)
BASES = st.sampled_from(["google/flan-t5-base", "gs://bkt/model", "/gcs/bkt/model"])
LORA = st.fixed_dictionaries(
    {},
    optional={
        "rank": st.integers(0, 16),
        "alpha": st.floats(1, 64),
        "target_modules": st.sampled_from([None, ["q", "v"]]),
        "use_rslora": st.booleans(),
    },
)
STAGE = {
    "seed": st.integers(0, 99),
    "dtype": st.sampled_from(["auto", "float32"]),
    "batch_size": st.sampled_from([8, 64]),
    "on_bad_rows": st.sampled_from(["error", "skip"]),
    "resume": st.sampled_from(["auto", "never"]),
}
RATE = st.sampled_from(
    [{}, {"learning_rate": 1e-4}, {"learning_rate_multiplier": 2.5}, {"learning_rate": None}]
)
LENGTH = st.sampled_from([{}, {"train_steps": 7}, {"num_epochs": 0.5}, {"train_steps": None}])
TRAINING = STAGE | {
    "micro_batch_size": st.sampled_from([None, 4]),
    "weight_decay": st.sampled_from([0, 0.01]),
    "lora": LORA,
    "log_with": st.sampled_from([[], ["tensorboard"], "none"]),
    "save_every": st.sampled_from([None, 3]),
}
EVAL = {"eval_dataset": st.none() | PATHS}


def fields(some: dict[str, Any], *more: st.SearchStrategy[dict[str, Any]]) -> Any:
    return st.tuples(st.fixed_dictionaries({}, optional=some), *more).map(
        lambda parts: {name: value for part in parts for name, value in part.items()}
    )


@st.composite
def configurations(draw: st.DrawFn) -> PipelineConfig:
    top = draw(
        fields(
            TRAINING
            | EVAL
            | {
                "prompt_dataset": PATHS,
                "prompt_sequence_length": st.integers(1, 600),
                "target_sequence_length": st.integers(8, 90),
                "instruction": TEXT,
                "revision": st.sampled_from([None, "main"]),
            },
            RATE,
            LENGTH,
        )
    )
    top["preference_dataset"] = draw(PATHS)
    top["base_model"] = draw(BASES)
    scorer = {"base_model": BASES, "revision": st.sampled_from([None, "v1"])}
    top["reward_model"] = draw(
        fields(TRAINING | EVAL | scorer | {"normalization": st.just("none")}, RATE, LENGTH)
    )
    ppo = {
        "kl_coeff": st.sampled_from([0, 0.05, 1]),
        "temperature": st.sampled_from([0.7, 1]),
        "kl_target": st.sampled_from([None, 6]),
        "missing_eos_score": st.sampled_from([None, -1]),
        "critic": st.just("head"),
    }
    top["ppo"] = draw(fields(TRAINING | EVAL | ppo, RATE, LENGTH))
    if top["ppo"].get("kl_coeff") == 0:  # with which there is no KL to aim at
        top["ppo"].pop("kl_target", None)
    own_rows = {"eval_dataset": PATHS} if top.get("eval_dataset") else {}
    inference = {"temperature": st.just(0.5), "min_response_length": st.just(2)}
    top["inference"] = draw(fields(STAGE | own_rows | inference))
    top["vertex"] = draw(
        fields(
            {
                "labels": st.dictionaries(st.sampled_from(["team", "run-1"]), st.just("a_b")),
                "tuning_location": st.sampled_from(["", "europe-west4"]),
                "boot_disk_size_gb": st.integers(100, 900),
                "restart_job_on_worker_restart": st.booleans(),
                "accelerator_type": st.sampled_from(["GPU", "NVIDIA_L4", "CPU"]),
            }
        )
    )
    return run_config(**top)


@settings(max_examples=150, deadline=None)
@given(configurations())
def test_a_configuration_survives_the_way_through_the_parameters(config):
    parameters = to_parameters(config)
    assert set(parameters) <= set(PARAMETERS)
    back = to_config(through_the_wire(parameters))
    for stage in STAGES:
        assert back.stage_config(stage) == config.stage_config(stage), stage
    # What inference is given, and what it takes from the policy, is told apart by what was set.
    inherited = {"temperature", "min_response_length", "truncation_side"}
    assert (
        back.stage_config("inference").model_fields_set & inherited
        == config.stage_config("inference").model_fields_set & inherited
    )
    assert back.vertex == config.vertex
    assert (back.output_dir, back.eval_dataset) == (config.output_dir, config.eval_dataset)
    assert to_parameters(back) == to_parameters(to_config(to_parameters(back)))


def test_mixtures_travel_as_json():
    mixture = [{"path": "gs://bkt/a.jsonl", "weight": 2.0}, "user/set:train"]
    config = run_config(preference_dataset=mixture, eval_dataset={"path": "gs://b/e", "limit": 9})
    values = to_parameters(config)
    assert json.loads(values["preference_dataset"]) == mixture
    again = to_config(values)
    assert again.preference_dataset == config.preference_dataset == again.prompt_dataset
    assert again.eval_dataset == config.eval_dataset
    one = to_config(LEAST | {"preference_dataset": '{"path": "gs://bkt/a.jsonl", "limit": 3}'})
    assert one.preference_dataset == [SourceEntry(path="gs://bkt/a.jsonl", limit=3)]
    assert problems_of(preference_dataset='[{"path": "a", "wait": 2}]') == [
        "preference_dataset.0.wait: unknown field; did you mean `weight`?"
    ]
    given = run_config(preference_dataset=[{"input_text": "a"}])
    assert not_in_the_cloud(given)[0].startswith(
        "preference_dataset: (list given from Python), and the jobs are other processes"
    )
