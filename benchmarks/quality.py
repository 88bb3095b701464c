"""What each method gains on the built-in corpus: gold reward and KL against seconds.

    python benchmarks/quality.py                             # everything: both families, 3 seeds
    python benchmarks/quality.py --arch t5 --seeds 0 --only 'ppo_*' rloo
    python benchmarks/quality.py --report                    # only the tables
    python benchmarks/quality.py --quick                     # does it run? Keeps no figures

Data, base, settings and figures are the quickstart's (`rlhf.quickstart`): gold reward over the
held-out prompts, in standard deviations of the untuned policy's. Per family and seed one reward
model is trained, which all methods share, and every method samples equally many responses.
Seconds are the process's CPU seconds in training steps, which other processes hardly disturb. Best
of n trains nothing: it samples n times whenever it is used, and its KL is an upper bound. DPO
samples nothing: it reads the preferences once, in the batches that the reward model reads.

Each finished run is one line of the results file. Runs that have their line are skipped, so the
command may be stopped and repeated, or run twice at once with other families, seeds or methods.
"""

import argparse
import fnmatch
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast, get_args

import torch
from filelock import FileLock

import machine
from report import table_lines
from rlhf import run_inference, train_dpo, train_ppo, train_reward_model
from rlhf.config import InferenceConfig, PipelineConfig
from rlhf.data.prompts import PromptRenderer
from rlhf.data.reading import load_prompts
from rlhf.errors import InputError
from rlhf.inference.predictions import read_predictions
from rlhf.ppo.experience import evaluate_rollout
from rlhf.ppo_trainer import PPOTrainer
from rlhf.quickstart import corpus
from rlhf.quickstart.run import Arch, quickstart_config, summarize

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "quality.jsonl"
FOLDER = HERE.parent / "runs" / "quality"
SEEDS = (0, 1, 2)
CURVE_POINTS = 5
CURVE_PROMPTS = 256
Figures = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """A family and a seed, which share a corpus and a reward model.

    Attributes:
        arch: "t5" or "llama".
        seed: Seed of the corpus and of every stage.
        folder: Folder for the corpus, the reward model, and each method's policy.
        quick: Whether sizes should only show that it runs.
    """

    arch: Arch
    seed: int
    folder: Path
    quick: bool = False

    def config(self) -> PipelineConfig:
        """Return the quickstart's configuration."""
        config = quickstart_config(self.arch, self.folder, self.seed)
        if not self.quick:
            return config
        values = config.model_dump(exclude_unset=True) | {"batch_size": 8}
        values["reward_model"] |= {"train_steps": 2, "batch_size": 4, "warmup_steps": 0}
        values["ppo"] |= {"train_steps": 2, "micro_batch_size": 8}
        return PipelineConfig.model_validate(values)

    def stage(self, name: str, folder: str, **fields: Any) -> Any:
        """Return a stage's configuration with other fields and another folder."""
        config = self.config().stage_config(name)
        given = config.model_dump(exclude_unset=True)
        return type(config).model_validate(
            given | {"output_dir": str(self.folder / folder)} | fields
        )

    def prepare(self) -> Figures:
        """Write the corpus and train the reward model, unless that is done; return its metrics."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / "prepare.lock"):
            if not (self.folder / "data").is_dir():
                part = self.folder / "data.part"
                sizes = corpus.CorpusSizes(64, 64, 64, 16) if self.quick else None
                corpus.write_corpus(part, self.seed, sizes)
                part.rename(self.folder / "data")
            return dict(train_reward_model(self.stage("reward_model", "reward_model")).metrics)


@dataclass(frozen=True)
class Method:
    """A way to get better responses.

    Attributes:
        run: Takes the setting, a folder's name and `fields`; returns the figures.
        fields: Fields of its configuration that differ from the quickstart's.
    """

    run: Callable[[Setting, str, Mapping[str, Any]], Figures]
    fields: Mapping[str, Any] = field(default_factory=dict)


class Curve:
    """A callback of the trainer: gold reward and KL on held-out prompts, a few times.

    Only the training steps cost seconds, not these looks.

    Args:
        setting: Where the held-out rows are.

    Attributes:
        points: Per look its `step`, `seconds`, `gold` reward, `score` and `kl`.
        seconds: CPU seconds of all steps.
        wall_seconds: The same by the clock.
    """

    def __init__(self, setting: Setting) -> None:
        self._path = setting.folder / "data" / "eval.jsonl"
        self.points: list[Figures] = []
        self.seconds = self.wall_seconds = 0.0
        self._mark = time.process_time()

    def __call__(
        self, trainer: Any, step: int, metrics: Mapping[str, float], _: Sequence[Any]
    ) -> None:
        """Look at the policy if it is time to."""
        # The first step's includes loading, and several threads add up.
        self.seconds += min(time.process_time() - self._mark, metrics["time/step"])
        self.wall_seconds += metrics["time/step"]
        due = step % max(1, trainer.total_steps // CURVE_POINTS) == 0
        if due and isinstance(trainer, PPOTrainer):
            self.points.append({"step": step, "seconds": self.seconds} | self._look(trainer))
        self._mark = time.process_time()

    def _look(self, trainer: PPOTrainer) -> Figures:
        renderer = PromptRenderer.for_tokenizer(trainer.policy.lm.tokenizer)
        prompts = load_prompts(str(self._path), renderer=renderer)
        rows = [prompts[i] for i in range(min(CURVE_PROMPTS, len(prompts)))]
        with torch.no_grad():
            rollout = trainer.rollout(rows, evaluation=True)
            scores = trainer.score(rollout)
            found = evaluate_rollout(
                rollout, trainer.policy, trainer.reference, None, trainer.config
            )
        gold = [
            corpus.gold_reward(r.input_text, t) for r, t in zip(rows, rollout.texts, strict=True)
        ]
        kl = float(found.kl("k1").sum(1).mean())
        return {"gold": statistics.fmean(gold), "score": float(scores.mean()), "kl": kl}


def reinforce(setting: Setting, folder: str, fields: Mapping[str, Any]) -> Figures:
    """Tune with `rlhf ppo`, and evaluate."""
    curve = Curve(setting)
    config = setting.stage("ppo", folder, **fields)
    train_ppo(config, callbacks=[curve])
    seen = {"steps": config.train_steps, "responses": config.train_steps * config.batch_size}
    seen |= {"seconds": curve.seconds, "wall_seconds": curve.wall_seconds}
    figures = evaluate(setting, folder) | seen
    before, spread = figures["gold_reward_before"], figures["gold_reward_std_before"]
    for point in curve.points:
        point["gold_gain"] = (point.pop("gold") - before) / spread
    return figures | {"curve": curve.points}


def prefer(setting: Setting, folder: str, fields: Mapping[str, Any]) -> Figures:
    """Tune with `rlhf dpo`, and evaluate."""
    clock = Curve(setting)
    # As in the other stages, held-out rows choose no weights.
    given: dict[str, Any] = {"eval_dataset": None}
    if setting.quick:
        given |= {"train_steps": 2, "batch_size": 4, "warmup_steps": 0}
    config = setting.stage("dpo", folder, **{**fields, **given})
    train_dpo(config, callbacks=[clock])
    seen = {"steps": config.train_steps, "pairs": config.train_steps * config.batch_size}
    seen |= {"seconds": clock.seconds, "wall_seconds": clock.wall_seconds}
    return evaluate(setting, folder) | seen


def evaluate(setting: Setting, folder: str) -> Figures:
    """Run inference on the held-out prompts; return the quickstart's figures."""
    path = setting.folder / folder
    config: InferenceConfig = setting.stage(
        "inference", f"{folder}/inference", policy_path=str(path)
    )
    result = run_inference(config)
    rows = corpus.read_rows(setting.folder / "data" / "eval.jsonl")
    return summarize(list(read_predictions(Path(result.predictions))), result.metrics, rows)


def best_of(setting: Setting, folder: str, fields: Mapping[str, Any]) -> Figures:
    """Let the reward model choose among samples of the untuned policy."""
    base = setting.config().base_model
    config = setting.stage("inference", folder, base_model=base, policy_path=base, **fields)
    start = time.process_time()
    result = run_inference(config)
    spent = time.process_time() - start
    chosen = [
        replace(row, prediction=row.best_of_n, tokens=row.best_of_n_tokens)
        for row in read_predictions(Path(result.predictions))
    ]
    metrics = dict(result.metrics)
    metrics |= {name: metrics[f"best_of_n_{name}"] for name in ("reward", "rougeL")}
    metrics |= {"kl": metrics["best_of_n_kl_bound"]}
    rows = corpus.read_rows(setting.folder / "data" / "eval.jsonl")
    return summarize(chosen, metrics, rows) | {"inference_seconds": spent}


METHODS: dict[str, Method] = {
    **{f"ppo_n{n}": Method(reinforce, {"responses_per_prompt": n}) for n in (1, 4, 8)},
    **{
        name: Method(reinforce, {"advantage": name, "responses_per_prompt": 4})
        for name in ("rloo", "grpo", "reinforce_pp", "reinforce_pp_baseline")
    },
    "dpo": Method(
        prefer,
        # Rate and beta were chosen on a seed of their own: at 0.001 and 0.1 LLaMA falls apart.
        {
            "batch_size": 16,
            "train_steps": 240,
            "learning_rate": 0.0005,
            "warmup_steps": 10,
            "beta": 0.5,
        },
    ),
    "best_of_16": Method(best_of, {"best_of": 16}),
}


def main() -> int:
    """Run what the command line asks for; return 1 if a run failed."""
    options = parse()
    torch.set_num_threads(options.threads)
    names = [n for n in METHODS if any(fnmatch.fnmatch(n, p) for p in options.only)]
    if not names:
        sys.exit(f"--only: expected some of {', '.join(METHODS)}")
    if options.quick:
        with tempfile.TemporaryDirectory(prefix="rlhf-quality-") as folder:
            options.results, options.folder = Path(folder, "results.jsonl"), Path(folder)
            failed = run_all(names, options)
            show(options.results)
            return failed
    failed = 0 if options.report else run_all(names, options)
    show(options.results)
    return failed


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", nargs="+", choices=get_args(Arch), default=get_args(Arch))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, metavar="SEED")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="NAME", help="* matches all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON Lines to add to")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="for corpora and models")
    parser.add_argument("--quick", action="store_true", help="a few rows, 2 steps, no figures")
    parser.add_argument("--report", action="store_true", help="print the tables, run nothing")
    return parser.parse_args()


def run_all(names: Sequence[str], options: argparse.Namespace) -> int:
    """Run the methods that have no line yet, seed by seed; return 1 if one failed."""
    failed = 0
    for seed in options.seeds:
        for arch in options.arch:
            folder = options.folder / f"{arch}-{seed}"
            setting = Setting(cast(Arch, arch), seed, folder, options.quick)
            for name in names:
                try:
                    run(setting, name, options)
                except InputError as error:
                    print(f"{arch} {seed} {name}: {error}", file=sys.stderr)
                    failed = 1
    return failed


def run(setting: Setting, name: str, options: argparse.Namespace) -> None:
    """Run one method and add its line, unless there is one for the same fields.

    Raises:
        InputError: Its configuration is wrong.
    """
    method = METHODS[name]
    key = {"arch": setting.arch, "seed": setting.seed, "method": name, "fields": method.fields}
    key = json.loads(json.dumps(key))
    if any(key.items() <= row.items() for row in read(options.results)):
        return
    start = time.perf_counter()
    prepared = setting.prepare()
    shutil.rmtree(setting.folder / name, ignore_errors=True)  # of a run that was stopped
    figures = method.run(setting, name, method.fields)
    line = key | figures | {"reward_model_seconds": prepared["seconds"]}
    line |= {"total_seconds": time.perf_counter() - start, "threads": options.threads}
    line |= {"device": machine.processor(), "instructions": machine.instructions()}
    line |= {"date": datetime.now(UTC).date().isoformat()}
    options.results.parent.mkdir(parents=True, exist_ok=True)
    with options.results.open("a") as file:
        file.write(json.dumps(line) + "\n")


def read(path: Path) -> list[Figures]:
    """Return the lines of a results file."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines]


HEADER = ["family", "method", "seeds", "gold reward, sd", "proxy reward", "KL, nats", "CPU seconds"]


def rows(found: Iterable[Figures]) -> list[list[str]]:
    """Return one row per family and method: means over seeds, and lowest to highest."""
    groups: dict[tuple[str, str], dict[int, Figures]] = {}
    for line in found:  # a later line replaces an earlier one
        groups.setdefault((line["arch"], line["method"]), {})[line["seed"]] = line
    order = [(arch, method) for arch in get_args(Arch) for method in METHODS]
    result = []
    for arch, method in order:
        if lines := list(groups.get((arch, method), {}).values()):
            gain = _mean(lines, "gold_gain", "+.2f", spread=True)
            proxy, kl = _mean(lines, "reward_after", ".2f"), _mean(lines, "kl", ".1f")
            seconds = _mean(lines, "seconds", ".0f")
            result.append([arch, method, str(len(lines)), gain, proxy, kl, seconds])
    return result


CURVE_HEADER = ["family", "method", "gold reward (KL) at CPU seconds, mean over seeds"]


def curve_rows(found: Iterable[Figures]) -> list[list[str]]:
    """Return one row per family and method: gold reward and KL on the way."""
    groups: dict[tuple[str, str], dict[int, list[Figures]]] = {}
    for line in found:
        groups.setdefault((line["arch"], line["method"]), {})[line["seed"]] = line.get("curve", [])
    result = []
    for (arch, method), curves in sorted(groups.items()):
        points = zip(*curves.values(), strict=False)
        shown = [
            f"{_mean(point, 'gold_gain', '+.2f')} ({_mean(point, 'kl', '.1f')}) "
            f"at {_mean(point, 'seconds', '.0f')} s"
            for point in points
        ]
        if shown:
            result.append([arch, method, ", ".join(shown)])
    return result


def _mean(lines: Sequence[Figures], name: str, form: str, *, spread: bool = False) -> str:
    values = [line[name] for line in lines if name in line]
    if not values:
        return ""
    text = format(statistics.fmean(values), form)
    if spread and len(values) > 1:
        text += f" ({min(values):{form}} to {max(values):{form}})"
    return text


def show(path: Path) -> None:
    """Print the tables in Markdown."""
    found = read(path)
    for header, body in ((HEADER, rows(found)), (CURVE_HEADER, curve_rows(found))):
        print("\n".join(["", *table_lines(header, body)]))


if __name__ == "__main__":
    sys.exit(main())
