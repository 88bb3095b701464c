"""The comparison with TRL: our half of it, and what was measured; TRL itself is not installed."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import parity
import parity_sides
from parity_cases import CASES, LORA, RESPONSE, Quantity, compare
from report import table_lines


def test_measured_quantities_agree_unless_a_reason_is_given() -> None:
    results = json.loads(parity.RESULTS.read_text())
    assert set(results["cases"]) == set(CASES)
    for name, case in results["cases"].items():
        quantities = [Quantity(**one) for one in case["quantities"]]
        assert all(one.as_expected for one in quantities)
        reasons = {one.name: one.why for one in quantities if one.why}
        assert reasons == CASES[name].differ
    assert parity.markdown(results) in parity.PAGE.read_text()


def test_differences_are_relative_to_the_largest_value_or_advantage() -> None:
    theirs = {"returns": torch.tensor([4.0, -8.0]), "policy loss": torch.tensor(0.0)}
    ours = {"returns": torch.tensor([4.0, -7.0]), "policy loss": torch.tensor(1.0)}
    theirs["advantages"] = torch.tensor([2.0, -4.0])
    returns, loss = compare(ours, theirs, {"policy loss": "a reason"})
    assert (returns.difference, loss.difference) == (1 / 8, 1 / 4)
    assert returns.theirs == pytest.approx(40**0.5)
    assert not returns.as_expected
    assert loss.as_expected
    row = table_lines(parity.HEADER, parity.rows([vars(loss)]))[-1]
    assert row == "| policy loss | 1 | 0 | 2.5e-01 | a reason |"


def test_gradient_of_whole_weights_is_projected_on_an_adapter() -> None:
    scale = LORA["alpha"] / LORA["rank"]
    source = torch.Generator().manual_seed(0)
    sizes = ((2, 5), (4, 2), (4, 5), (3, 5))
    a, b, whole, inputs = (torch.randn(size, generator=source).double() for size in sizes)
    module = "layers.0.self_attn.q_proj"
    critic = {f"x.{module}.lora_{n}.value.weight": p for n, p in (("A", a), ("B", b))}

    def loss(weight: Tensor) -> Tensor:
        return (inputs @ weight.T).square().sum()

    merged = (whole + scale * b @ a).requires_grad_()
    loss(merged).backward()
    theirs = {f"value_gradient/model.{module}.weight": merged.grad}
    parts = [part.clone().requires_grad_() for part in (a, b)]
    loss(whole + scale * parts[1] @ parts[0]).backward()
    expected = torch.cat([part.grad.flatten() for part in parts])
    torch.testing.assert_close(parity_sides.projected(theirs, critic), expected)


@pytest.mark.parametrize("name", ["ppo_eos", "rloo"])
def test_our_half_computes_what_is_compared(name: str, tmp_path: Path) -> None:
    """A rollout of our own stands for TRL's, and the policy stays as it is between updates."""
    trainer = parity_sides.make_trainer(CASES[name], tmp_path)
    rollout = trainer.rollout(trainer.next_prompts())
    count, width = len(rollout.responses), RESPONSE
    per_prompt = count // len(rollout.prompts)
    longest = int(rollout.prompts.lengths.max())
    queries = torch.full((len(rollout.prompts), longest), parity_sides.PAD)
    for row, ids in zip(queries, rollout.prompts.tolists(), strict=True):
        row[longest - len(ids) :] = torch.tensor(ids)
    mask = rollout.responses.mask
    theirs = {
        "queries": queries.repeat_interleave(per_prompt, 0),
        "responses": rollout.responses.ids,
        "past_end": ~mask,
        "scores": torch.linspace(-1, 1, count)[:, None],
    }
    adapter = trainer.policy.named_trainable("")
    theirs |= {f"adapter/{n}": p.detach().clone() for n, p in adapter}
    found = parity_sides.our_step(trainer, theirs)
    assert mask.shape[1] <= width
    torch.testing.assert_close(found["log-probabilities"], rollout.logprobs, rtol=1e-4, atol=1e-4)
    updates = [key for key in found if key.endswith(", second update")]
    assert len(updates) == 2
    for key in updates:
        first = found[key.removesuffix(", second update")]
        torch.testing.assert_close(found[key], first, rtol=1e-4, atol=1e-6)
    stored = json.loads(parity.RESULTS.read_text())["cases"][name]["quantities"]
    assert [one["name"] for one in stored] == list(found)
    assert all(float(values.abs().max()) > 0 for key, values in found.items() if "loss" not in key)
