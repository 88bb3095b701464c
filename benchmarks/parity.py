"""Compare one step of our PPO and RLOO with TRL 1.12.0's, quantity by quantity.

    python benchmarks/parity.py            # two minutes; writes results/parity.json, docs/parity.md

TRL samples and computes in its own environment, and hooks read what it computes
(workers/trl_parity.py). Our trainer gets the same weights, tokens and scores. Everything is float32
on the CPU.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

import machine
from environments import prepare
from parity_cases import CASES, Case, Found, Quantity, compare
from parity_sides import make_trainer, named_as_ours, our_step, save_weights
from report import insert, table_lines
from rounds import HERE, environment, log_tail

RESULTS = HERE / "results" / "parity.json"
PAGE = HERE.parent / "docs" / "parity.md"
PEER = "trl-1.12.0"


def run_theirs(folder: Path, spec: dict[str, Any]) -> Found:
    """Run TRL in its environment and return what it computed.

    Raises:
        RuntimeError: It failed; the message is the end of its output.
    """
    interpreter, log = prepare(PEER), folder / "theirs.log"
    command = [interpreter.python, str(HERE / "workers" / "trl_parity.py"), str(folder)]
    variables = environment(torch.get_num_threads()) | {"PYTHONPATH": str(interpreter.packages)}
    with log.open("w") as output:
        done = subprocess.run(
            [*command, json.dumps(spec)], stdout=output, stderr=subprocess.STDOUT, env=variables
        )
    if done.returncode:
        raise RuntimeError("\n".join(log_tail(log)))
    found: Found = torch.load(folder / "theirs.pt")
    return found


def run(case: Case) -> list[Quantity]:
    """Run both sides of a case."""
    with tempfile.TemporaryDirectory(prefix="rlhf-parity-") as name:
        folder = Path(name)
        trainer = make_trainer(case, folder)
        save_weights(trainer, folder)
        rows = trainer.next_prompts()
        prompts = trainer.codec.prompts([row.prompt for row in rows]).tolists()
        theirs = run_theirs(folder, case.spec(prompts, [row.prompt.text for row in rows]))
        critic = trainer.critic
        weights = (
            {n: p.detach().clone() for n, p in critic.role.named_trainable("")} if critic else {}
        )
        peers = named_as_ours(theirs, weights)
        return compare(our_step(trainer, theirs), peers, case.differ)


HEADER = ["quantity", "ours", "TRL", "largest difference", ""]


def rows(quantities: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """Return a row per quantity of the results."""
    return [
        [
            one["name"],
            f"{one['ours']:.6g}",
            f"{one['theirs']:.6g}",
            f"{one['difference']:.1e}",
            one["why"] or "agrees",
        ]
        for one in quantities
    ]


def markdown(results: Mapping[str, Any]) -> str:
    """Return the tables of all cases."""
    blocks = [f"Measured on {results['device']} ({results['instructions']})."]
    for name, case in results["cases"].items():
        table = table_lines(HEADER, rows(case["quantities"]))
        blocks += [f"### {case['title']} (`{name}`)", "\n".join(table)]
    return "\n\n".join(blocks)


def main() -> int:
    """Compare all cases, write the results; return 1 if anything is not as expected."""
    cases: dict[str, Any] = {}
    surprises = []
    for name, case in CASES.items():
        found = run(case)
        surprises += [f"{name}: {one}" for one in found if not one.as_expected]
        cases[name] = {"title": case.title, "quantities": [vars(one) for one in found]}
    results = {"device": machine.processor(), "instructions": machine.instructions()}
    results |= {"peer": PEER, "cases": cases}
    text = markdown(results)
    print("\n".join([text, *surprises]))
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(insert(PAGE.read_text(), "parity", text))
    return int(bool(surprises))


if __name__ == "__main__":
    sys.exit(main())
