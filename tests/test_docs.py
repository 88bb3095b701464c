"""Every command and every Python block of README and docs runs as it is written.

Names of Hub models stand for tiny checkpoints, and long runs are cut to one step, both by the
test: nothing else of a command is changed.
"""

import dataclasses
import json
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google.auth
import pytest
from google.auth.exceptions import DefaultCredentialsError
from support import doc_tables
from support.object_store import running_store
from support.tiny import make_tokenizer, tiny_model

import rlhf
from rlhf import pipeline
from rlhf.cli import main
from rlhf.inference.predictions import Prediction
from rlhf.vertex import machines
from rlhf.vertex.conversion import to_config
from rlhf.vertex.failure import Failure

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SHORT = {
    "run": ["--reward_model.train_steps", "1", "--ppo.train_steps", "1", "--batch_size", "4",
            "--target_sequence_length", "4", "--prompt_sequence_length", "64"],
    "dpo": ["--train_steps", "1", "--batch_size", "2", "--target_sequence_length", "4",
            "--prompt_sequence_length", "64"],
}  # fmt: skip
VERTEX = ROOT / "docs" / "vertex.md"
# What no test runs, and why. Their syntax, variables and files are looked at all the same.
NOT_RUN = {
    "gcloud ": "needs Google Cloud and changes it",
    "printf %s": "is piped into gcloud",
    "docker ": "needs Docker",
    "vllm ": "is another program, for GPUs",
    "git clone ": "needs the network",
    "hf download ": "needs the network; only its flags are looked at",
    "tensorboard ": "serves until it is stopped",
    "python benchmarks/parity.py": "needs TRL",
}
SET_BY_THE_READER = {"HF_TOKEN", "PWD"}
LINKS = re.compile(r"\]\((?!https?:)([^)#]+)[^)]*\)")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.S | re.M)


def commands(page: Path) -> list[str]:
    lines = "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the pages mention."""
    folder = tmp_path_factory.mktemp("docs")
    for arch in ("t5", "llama"):
        tiny_model(arch).save_pretrained(folder / arch)
        make_tokenizer(arch).save_pretrained(folder / arch)
    readme = ROOT / "README.md"
    shown = [json.loads(line) for line in "".join(blocks(readme, "json")).splitlines()]
    kinds = dict(zip(("preferences", "prompts", "demonstrations", "eval"), shown, strict=True))
    hh = {"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Hi\n\nAssistant: b"}
    tldr = {"info": {"post": "p"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0}
    for name, row in (kinds | {"hh": hh, "comparisons": tldr}).items():
        rows = [row] * 6
        if name == "preferences":
            rows = [{**row, "input_text": f"{i} {row['input_text']}"} for i in range(6)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def localized(text: str, folder: Path) -> str:
    text = text.replace("google/flan-t5-small", str(folder / "t5"))
    return text.replace("meta-llama/Llama-3.2-1B", str(folder / "llama"))


def run(command: str, folder: Path) -> None:
    words = shlex.split(localized(command, folder))
    assert words[0] == "rlhf", command
    arguments = [*words[1:], *SHORT.get(words[1], [])]
    assert main(arguments) == 0, command


@pytest.mark.slow
def test_readme_from_top_to_bottom(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    for command in commands(ROOT / "README.md"):
        if command.startswith("rlhf ") and not command.startswith("rlhf vertex "):
            run(command, workplace)
    for number, block in enumerate(blocks(ROOT / "README.md", "python")):
        code = localized(block, workplace)
        short = r"\1 train_steps=2, target_sequence_length=4, prompt_sequence_length=64,"
        code = re.sub(r"(output_dir=\"[^\"]+\",)", short, code)
        script = workplace / f"block{number}.py"
        script.write_text(code)
        env = os.environ | {"PYTHONPATH": str(Path(rlhf.__file__).parents[1])}
        subprocess.run([sys.executable, str(script)], check=True, cwd=workplace, env=env)
    for page in PAGES[1:]:
        if page.name == "rewards.md":
            continue  # its command needs its files: test_the_rewards_that_are_shown_run
        for command in commands(page):
            if command.startswith("rlhf ") and not command.startswith("rlhf vertex "):
                run(command, workplace)


def test_make_targets_that_the_pages_name_exist() -> None:
    targets = {
        words[1] for page in PAGES for command in commands(page)
        if (words := command.split())[0] == "make"
    }  # fmt: skip
    assert {"quickstart", "test"} <= targets
    for target in targets:
        subprocess.run(["make", "-n", target], check=True, cwd=ROOT, capture_output=True)


def test_other_commands_are_known() -> None:
    known = (
        "rlhf ", "make ", "export PIP_EXTRA_INDEX_URL=", "python -m venv .venv",
        ".venv/bin/python -m pip install -c constraints.txt -e '.[dev]'",
        ".venv/bin/rlhf quickstart", ".venv/bin/python -m pytest", "export ",
        "python -m pip install -c constraints.txt '.[vertex]'", *NOT_RUN,
    )  # fmt: skip
    for page in PAGES:
        for command in commands(page):
            assert command.startswith(known), f"{page.name}: {command} is run by no test"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINKS.findall(page.read_text()):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_metric_of_ppo_is_explained(tmp_path: Path) -> None:
    from support.ppo import make_trainer

    text = (ROOT / "docs" / "metrics.md").read_text()
    metrics = make_trainer("llama", tmp_path).step()
    for name in metrics:
        shown = re.sub(r"^(time/|train/grad_norm_).*", r"\1", name)
        assert f"`{shown}" in text, name


def test_the_rewards_that_are_shown_run(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The configuration, the functions, the command and the script of docs/rewards.md."""
    from support.classifiers import save_classifier
    from support.rewards import save_reward

    page = ROOT / "docs" / "rewards.md"
    [config], [rules, script] = blocks(page, "yaml"), blocks(page, "python")
    [command] = commands(page)
    row = {"input_text": "the cat sat", "target_words": 3}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row) + "\n")
    for name in ("reward_model", "other_reward_model"):
        save_reward("t5", tmp_path, f"out/{name}", 5)
    save_classifier("t5", tmp_path).rename(tmp_path / "models")
    (tmp_path / "models" / "hate-speech").mkdir()
    for file in [path for path in (tmp_path / "models").iterdir() if path.is_file()]:
        file.rename(tmp_path / "models" / "hate-speech" / file.name)
    small = {"train_steps": 1, "batch_size": 4, "prompt_sequence_length": 24,
             "target_sequence_length": 4, "device": "cpu"}  # fmt: skip
    fields = "".join(f"{name}: {value}\n" for name, value in small.items())
    base = str(tmp_path / "base")
    (tmp_path / "ppo.yaml").write_text(config.replace("google/flan-t5-small", base) + fields)
    (tmp_path / "rules.py").write_text(rules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "rules", raising=False)
    assert main(shlex.split(command)[1:]) == 0
    metrics = json.loads((tmp_path / "runs" / "ppo" / "metrics.json").read_text())
    weights = {"reward_model": 1, "hate-speech": 0.5, "helpful": 0.25, "near_length": 0.1,
               "polite": 1}  # fmt: skip
    total = sum(weight * metrics[f"ppo/reward_{name}"] for name, weight in weights.items())
    assert metrics["ppo/score"] == pytest.approx(total, abs=1e-4)
    given = "".join(f"{name}={value!r}, " for name, value in small.items())
    code = script.replace("google/flan-t5-small", base)
    code = code.replace("    ),\n    reward_fn", f"        {given}\n    ),\n    reward_fn")
    exec(compile(code, "script of rewards.md", "exec"), {})
    metrics = json.loads((tmp_path / "runs" / "rules" / "metrics.json").read_text())
    assert {"ppo/reward_reward_model", "ppo/reward_polite", "ppo/reward_length"} <= set(metrics)


def test_every_metric_of_several_rewards_is_explained(tmp_path: Path) -> None:
    from support.ppo import count_letters, make_trainer

    text = (ROOT / "docs" / "metrics.md").read_text()
    rewards = [count_letters, rlhf.Reward(count_letters, name="twice")]
    trainer = make_trainer("llama", tmp_path, reward_fn=rewards)
    trainer.eval_prompts = trainer.prompts
    found = {name for name in {**trainer.step(), **trainer.evaluate()} if "/reward_" in name}
    assert found == {f"{kind}/reward_{name}" for kind in ("ppo", "eval")
                     for name in ("count_letters", "twice")}  # fmt: skip
    assert "`ppo/reward_<name>`" in text
    assert "`eval/reward_<name>`" in text


def test_every_metric_of_dpo_is_explained(workplace: Path, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    config = rlhf.DPOConfig(
        base_model=str(workplace / "llama"), output_dir=str(tmp_path / "dpo"), train_steps=1,
        preference_dataset=str(workplace / "preferences.jsonl"), prompt_sequence_length=64,
        target_sequence_length=8,
    )  # fmt: skip
    metrics = rlhf.train_dpo(config).metrics
    assert "eval/margin" in metrics
    for name in metrics:
        shown = re.sub(r"^(time/|train/grad_norm_).*", r"\1", name)
        shown = re.sub(r"longer_accuracy_(low|high)$", "longer_accuracy", shown)
        assert f"`{shown}" in text or "/" not in name or shown == "eval/pairs", name


def test_every_metric_of_inference_is_explained(tmp_path: Path) -> None:
    from rlhf.inference.metrics import prediction_metrics
    from rlhf.inference.predictions import Prediction

    text = (ROOT / "docs" / "metrics.md").read_text()
    row = Prediction("in", "a b", "a c", "a b", 1.0, 0.5, 0.1, 0.1, 3, 2, 2, "eos", "eos")
    row = dataclasses.replace(
        row, best_of_n="a", best_of_n_reward=2.0, best_of_n_tokens=2, best_of_n_finish_reason="eos"
    )
    for name in prediction_metrics([row] * 3, best_of=4):
        plain = name if name == "best_of_n_kl_bound" else re.sub(r"^best_of_n_", "", name)
        plain = re.sub(r"^baseline_|_(low|high)$", "", plain)
        plain = re.sub(r"^tokens_.*", "tokens_mean", plain)
        assert f"`{plain}`" in text or plain == "rows", name


def exported(page: Path) -> dict[str, str]:
    """What the page's `export` lines set; what a command would answer is empty."""
    values: dict[str, str] = {}
    for command in commands(page):
        if command.startswith("export ") and "$(" not in command:
            for word in shlex.split(command)[1:]:
                name, _, value = word.partition("=")
                values[name] = string.Template(value).substitute(values)
    return values


def vertex_commands() -> list[str]:
    """`rlhf vertex` commands of the pages and of the configurations' own comments."""
    found: list[str] = []
    for page in PAGES:
        found += [
            string.Template(command).substitute(exported(page))
            for command in commands(page)
            if command.startswith("rlhf vertex ")
        ]
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        found += re.findall(r"^#   (rlhf vertex .*)$", path.read_text(), re.M)
    return found


def own_commands() -> list[str]:
    """`rlhf vertex` commands of the page on Vertex AI."""
    return [
        string.Template(command).substitute(exported(VERTEX))
        for command in commands(VERTEX)
        if command.startswith("rlhf vertex ")
    ]


def test_every_command_goes_to_the_readers_region() -> None:
    regional = ("gcloud ai ", "gcloud artifacts ", "gcloud kms ", "gcloud builds submit",
                "gcloud storage buckets create", "docker push", "rlhf vertex submit")  # fmt: skip
    found = [command for command in commands(VERTEX) if command.startswith(regional)]
    assert {command.split()[1] for command in found} >= {"ai", "artifacts", "builds", "vertex"}
    for command in found:
        assert "$LOCATION" in command, command


@pytest.fixture(scope="module")
def cloud(workplace: Path) -> Iterator[Path]:
    """A folder with configs/, a bucket with the data that they name, Hub models, nobody's key.

    Weights are never read by a dry run. Tokenizers are the tiny ones; configurations have the real
    sizes, so that the machines are those that a real run gets.
    """
    with pytest.MonkeyPatch.context() as patch, running_store(workplace, patch) as store:
        folder = workplace / "submit"
        folder.mkdir()
        shutil.copytree(ROOT / "configs", folder / "configs")
        patch.chdir(folder)
        store.bucket("vertex-ai")
        data = json.loads((ROOT / "configs" / "vertex_tldr.json").read_text())
        for name, rows in (
            ("preference_dataset", "preferences"),
            ("prompt_dataset", "prompts"),
            ("eval_dataset", "eval"),
        ):
            content = (workplace / f"{rows}.jsonl").read_bytes()
            store.write(data[name].replace("*", "shard-0"), content)

        def size(name: str) -> str:
            return "t5-large" if "t5-large" in name else "llama-2-7b"

        def tokenizer(name: str, revision: str | None) -> Any:
            return make_tokenizer("t5" if "t5" in size(name) else "llama")

        def shape(name: str, revision: str | None) -> Any:
            return doc_tables.SHAPES[size(name)]

        def no_credentials(**_: Any) -> None:
            raise DefaultCredentialsError

        patch.setattr(pipeline, "load_tokenizer", tokenizer)
        patch.setattr(pipeline, "read_model_config", shape)
        patch.setattr(machines, "read_model_config", shape)
        patch.setattr(google.auth, "default", no_credentials)
        yield folder


@pytest.mark.parametrize("command", vertex_commands())
def test_vertex_commands_make_the_request(
    command: str, cloud: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is sent without --dry_run is what a dry run prints; only sending is left out."""
    words = [word for word in shlex.split(command)[1:] if word != "--wait"]
    if words[1] == "submit" and "--dry_run" not in words:
        words.append("--dry_run")
    assert main(words) == 0, capsys.readouterr().err
    shown = capsys.readouterr()
    if words[1] == "compile":
        assert (cloud / words[2]).read_text() == (ROOT / "kfp" / "rlhf_pipeline.yaml").read_text()
        return
    request = json.loads(shown.out)
    sent = request["runtimeConfig"]["parameterValues"]
    t5 = "t5" in command
    assert ("t5" in sent["large_model_reference"]) == t5
    assert sent["reinforcement_learning_train_steps"] == 320
    assert ("g2-standard-12" if t5 else "a2-ultragpu-1g") in shown.err
    place = words[words.index("--vertex.location") + 1] if "--vertex.location" in words else ""
    if command in own_commands():
        # Nothing of a run may lie in another region than the reader's.
        del request["pipelineSpec"]
        assert place == exported(VERTEX)["LOCATION"] != "us-central1"
        assert sent["location"] == place
        assert sent["image"].startswith(f"{place}-docker.pkg.dev/")
        assert "us-central1" not in json.dumps(request)
    if "--output_dir" in words:
        target = words[words.index("--output_dir") + 1]
        assert target == f"{sent['output_directory']}/{sent['run_name']}"


def test_commands_that_nobody_runs_are_at_least_shell() -> None:
    for page in PAGES:
        subprocess.run(["bash", "-n"], input="\n".join(blocks(page, "sh")), text=True, check=True)
        known = set(SET_BY_THE_READER)
        for command in commands(page):
            if command.startswith("export "):
                known |= set(re.findall(r"\b(\w+)=", command.replace("--", "")))
                continue
            used = set(re.findall(r"\$\{?(\w+)", command))
            assert used <= known, f"{page.name}: {command}: {used - known} set nowhere"
            for path in re.findall(r"\b(?:configs|containers|kfp)/\S+", command):
                assert (ROOT / path).exists(), f"{page.name}: {path}"


def test_flags_of_hf_download_exist() -> None:
    program = Path(sys.executable).parent / "hf"
    shown = subprocess.run(
        [program, "download", "--help"], capture_output=True, text=True, check=True
    )
    for command in commands(VERTEX):
        if command.startswith("hf download "):
            for flag in re.findall(r"--[a-z-]+", command):
                assert flag in shown.stdout


def test_the_image_of_the_pages_is_the_one_that_jobs_look_for() -> None:
    text = VERTEX.read_text()
    tags = set(re.findall(r"rlhf/rlhf:(\d[\d.]*\d)", text))
    assert tags == {rlhf.__version__}
    variant = re.search(r"^VARIANT \?= (\w+)", (ROOT / "Makefile").read_text(), re.M)
    assert variant
    assert f"docker tag rlhf:{variant[1]} " in text
    assert f"_TAG: {rlhf.__version__}\n" in (ROOT / "containers" / "cloudbuild.yaml").read_text()


def flags_of(command: str) -> dict[str, str]:
    """Flags of a command with their values, as `--name=value`."""
    words = [word for word in shlex.split(command) if word.startswith("--")]
    return dict(word.removeprefix("--").partition("=")[::2] for word in words)


def uploads() -> dict[str, dict[str, str]]:
    """Flags of the commands that upload a model, by the model's name."""
    found = [flags_of(c) for c in commands(VERTEX) if c.startswith("gcloud ai models upload")]
    return {flags["display-name"]: flags for flags in found}


def test_servers_are_uploaded_with_all_that_vertex_asks() -> None:
    assert set(uploads()) == {"rlhf-llama-1", "rlhf-t5-1"}
    for flags in uploads().values():
        for name in ("args", "ports", "health-route", "predict-route", "image-uri"):
            assert flags[f"container-{name}"], name
    llama = uploads()["rlhf-llama-1"]
    arguments = llama["container-args"].split(",")
    assert f"--port={llama['container-ports']}" in arguments
    assert any(word.startswith("--model=gs://") and word.endswith("/merged") for word in arguments)
    assert not [c for c in commands(VERTEX) if "text-generation-inference" in c]


def test_the_t5_recipe_is_what_the_image_does() -> None:
    from rlhf.vertex import serve

    flags = uploads()["rlhf-t5-1"]
    word, *arguments = flags["container-args"].split(",")
    assert f"\n{word})\n" in (ROOT / "containers" / "entrypoint.sh").read_text()
    options = {option for parameter in serve.serve_command.params for option in parameter.opts}
    assert {argument.partition("=")[0] for argument in arguments} <= options
    source = Path(serve.__file__).read_text()
    for route in ("health", "predict"):
        assert f'"{flags[f"container-{route}-route"]}"' in source
    assert f'"AIP_HTTP_PORT", "{flags["container-ports"]}"' in source


def test_the_requests_that_are_shown_are_answered() -> None:
    from rlhf.quickstart.run import ASSETS
    from rlhf.vertex.serve import Predictor

    [request] = [json.loads(b) for b in blocks(VERTEX, "json") if '"instances"' in b]
    predictor = Predictor(str(ASSETS / "toy_t5"), 128, 64)
    assert len(predictor.predict(request)) == len(request["instances"])


def test_keys_builds_and_restarts_are_explained() -> None:
    text = VERTEX.read_text()
    keys = [c for c in commands(VERTEX) if c.startswith("gcloud kms keys add-iam-policy-binding")]
    assert len(keys) == 2
    for agent, command in zip(("aiplatform", "aiplatform-cc"), keys, strict=True):
        flags = flags_of(command)
        assert flags["role"] == "roles/cloudkms.cryptoKeyEncrypterDecrypter"
        assert f"@gcp-sa-{agent}.iam.gserviceaccount.com" in flags["member"]
    [build] = [c for c in commands(VERTEX) if "containers/cloudbuild.yaml" in c]
    flags = flags_of(build)
    assert flags["service-account"] == "projects/$PROJECT/serviceAccounts/$BUILDER"
    assert "_REVISION=$(git rev-parse HEAD)" in build
    granted = {
        flags_of(c)["role"] for c in commands(VERTEX)
        if "add-iam-policy-binding" in c and "serviceAccount:$BUILDER" in c
    }  # fmt: skip
    assert granted == {
        "roles/artifactregistry.writer", "roles/logging.logWriter", "roles/storage.objectViewer",
    }  # fmt: skip
    told, unobserved = text.split("## What was not observed")
    assert "up to five times" in told.replace("\n", " ")
    assert "up to three times" in told.replace("\n", " ")
    assert "How often" not in unobserved


def test_tables_of_vertex_are_what_the_code_gives() -> None:
    text = VERTEX.read_text()
    assert doc_tables.with_tables(text) == text, "python tests/support/doc_tables.py"


def test_the_failure_that_is_explained_is_the_one_that_is_written() -> None:
    text = VERTEX.read_text()
    names = [field.name for field in dataclasses.fields(Failure)]
    shown = [json.loads(block) for block in blocks(VERTEX, "json") if '"cause"' in block]
    assert [list(failure) for failure in shown] == [names]
    rows = text.split("| field | meaning |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", rows, re.M) == names


def test_parameters_shown_as_json_are_valid() -> None:
    required = {
        "preference_dataset": "gs://bucket/a.jsonl",
        "prompt_dataset": "gs://bucket/b.jsonl",
        "large_model_reference": "t5-small",
        "output_directory": "gs://bucket/runs",
        "run_name": "one",
    }
    shown = [json.loads(block) for block in blocks(VERTEX, "json") if "ppo_config" in block]
    assert len(shown) == 2
    rates = to_config(required | shown[0])
    reward, ppo = rates.stage_config("reward_model"), rates.stage_config("ppo")
    assert (reward.effective_learning_rate, reward.lora.rank) == (1e-4, 4)
    assert (ppo.effective_learning_rate, ppo.lora.rank, ppo.lr_scheduler) == (5e-4, 1, "constant")
    assert to_config(required | shown[1]).stage_config("ppo").kl_target


def test_predictions_can_be_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    row = Prediction("in", "a b", "a c", "a b", 1.0, 0.5, 0.1, 0.1, 3, 2, 2, "eos", "eos")
    (tmp_path / "predictions.jsonl").write_bytes(row.line() * 2)
    (code,) = blocks(VERTEX, "python")
    exec(code, {})
    assert [json.loads(line) for line in (tmp_path / "google.jsonl").open()] == [
        {
            "inputs": {"inputs_pretokenized": "Summarize in less than 50 words\n\nin"},
            "prediction": "a b",
        }
    ] * 2


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_files_that_a_page_names_are_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:[\w-]+/)*\w+\.(?:py|md|yaml))`", text))
    assert len(named) > 10
    named = {name for name in named if "NAME" not in name}
    library = ROOT / "src" / "rlhf"
    places = (ROOT, library, library / "vertex")
    missing = [name for name in named if not any((place / name).exists() for place in places)]
    assert missing == []
