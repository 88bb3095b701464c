"""Every command and every Python block of README and docs runs as it is written.

Names of Hub models stand for tiny checkpoints, and long runs are cut to one step, both by the
test: nothing else of a command is changed.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import make_tokenizer, tiny_model

import rlhf
from rlhf.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHORT = {
    "run": ["--reward_model.train_steps", "1", "--ppo.train_steps", "1", "--batch_size", "2",
            "--target_sequence_length", "4", "--prompt_sequence_length", "64"],
}  # fmt: skip
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


def localised(text: str, folder: Path) -> str:
    text = text.replace("google/flan-t5-small", str(folder / "t5"))
    return text.replace("meta-llama/Llama-3.2-1B", str(folder / "llama"))


def run(command: str, folder: Path) -> None:
    words = shlex.split(localised(command, folder))
    assert words[0] == "rlhf", command
    arguments = [*words[1:], *SHORT.get(words[1], [])]
    assert main(arguments) == 0, command


@pytest.mark.slow
def test_readme_from_top_to_bottom(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    for command in commands(ROOT / "README.md"):
        if command.startswith("rlhf "):
            run(command, workplace)
    for number, block in enumerate(blocks(ROOT / "README.md", "python")):
        code = localised(block, workplace)
        short = r"\1 train_steps=2, target_sequence_length=4, prompt_sequence_length=64,"
        code = re.sub(r"(output_dir=\"[^\"]+\",)", short, code)
        script = workplace / f"block{number}.py"
        script.write_text(code)
        env = os.environ | {"PYTHONPATH": str(Path(rlhf.__file__).parents[1])}
        subprocess.run([sys.executable, str(script)], check=True, cwd=workplace, env=env)
    for page in PAGES[1:]:
        for command in commands(page):
            if command.startswith("rlhf "):
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
        ".venv/bin/rlhf quickstart", ".venv/bin/python -m pytest",
    )  # fmt: skip
    for page in PAGES:
        for command in commands(page):
            assert command.startswith(known), f"{page.name}: {command} is run by no test"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINKS.findall(page.read_text()):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_metric_of_ppo_is_explained(tmp_path: Path) -> None:
    from test_ppo import make_trainer

    text = (ROOT / "docs" / "metrics.md").read_text()
    metrics = make_trainer("llama", tmp_path).step()
    for name in metrics:
        shown = re.sub(r"^(time/|train/grad_norm_).*", r"\1", name)
        assert f"`{shown}" in text, name


def test_every_metric_of_inference_is_explained(tmp_path: Path) -> None:
    from rlhf.predictions import Prediction, prediction_metrics

    text = (ROOT / "docs" / "metrics.md").read_text()
    row = Prediction("in", "a b", "a c", "a b", 1.0, 0.5, 0.1, 0.1, 3, 2, 2, "eos", "eos")
    for name in prediction_metrics([row] * 3):
        plain = re.sub(r"^baseline_|_(low|high)$", "", name)
        plain = re.sub(r"^tokens_.*", "tokens_mean", plain)
        assert f"`{plain}`" in text or plain == "rows", name
