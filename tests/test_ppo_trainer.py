"""PPO from the outside: exact optima, invariances, and that only what should change does."""

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from support.language_models import LORA
from support.numerics import assert_same_gradients
from support.ppo import count_letters, make_config, make_trainer, randomize_roles
from support.tiny import make_tokenizer, randomize_lora, tiny_model
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel, T5ForConditionalGeneration

from rlhf import ppo_trainer
from rlhf.data.batching import TokenBatch
from rlhf.data.prompts import PromptRenderer
from rlhf.errors import InputError
from rlhf.models.content import tokenizer_fingerprint
from rlhf.models.families import FAMILIES
from rlhf.models.generation import generate_in_chunks
from rlhf.models.heads import ScalarHead
from rlhf.models.reward_model import RewardModel
from rlhf.models.reward_record import RewardRecord
from rlhf.models.saving import save_merged
from rlhf.ppo.experience import Experience, Rollout
from rlhf.ppo_trainer import PPOTrainer, train_ppo
from rlhf.training.trainer import TrainingDiverged


def ragged_rollout(trainer: PPOTrainer) -> Rollout:
    """Given responses of mixed lengths: EOS first, PAD sampled, cut by the limit."""
    rows = trainer.next_prompts()
    eos = trainer.policy.lm.layout.eos_id
    responses = TokenBatch.from_lists(
        [[20, 21, 0, 22, eos], [eos], [23, 0], [0, 0, eos], [30, 31, 32, 33, 34, 35],
         [40, eos], [0], [50, 51, 52, eos]]
    )  # fmt: skip
    finished = torch.tensor([eos in row for row in responses.tolists()])
    answers = trainer.codec.decode_rows(responses.tolists())
    prompts = trainer.codec.prompts([row.prompt for row in rows])
    groups = torch.arange(len(responses)) // (len(responses) // len(rows))
    return Rollout(rows, prompts, responses, finished, answers, groups)


def load_weights(arch: str, folder: Path) -> PreTrainedModel:
    kind = {"t5": T5ForConditionalGeneration, "llama": LlamaForCausalLM}[arch]
    return kind.from_pretrained(folder, dtype=torch.float32)


def save_reward_model(arch: str, folder: Path, scorer: str | None = None) -> Path:
    """A reward model with random weights on the tiny base of `scorer` (default: `arch`)."""
    scorer = scorer or arch
    base = folder / f"base-{scorer}"
    tiny_model(scorer).save_pretrained(base)
    tokenizer = make_tokenizer(scorer)
    tokenizer.save_pretrained(base)
    lm = FAMILIES[scorer](tiny_model(scorer), tokenizer, base_name=str(base))
    lm.add_adapter("reward", LORA)
    randomize_lora(lm, "reward", 7)
    record = RewardRecord(
        base_model=str(base), revision=None, fingerprint=lm.fingerprint, dtype="float32",
        tokenizer=tokenizer_fingerprint(tokenizer), prompt_sequence_length=24,
        target_sequence_length=6, truncation_side="left", instruction="",
        prompting=PromptRenderer.for_tokenizer(tokenizer, "").identity, shift=0.3, scale=2.0,
    )  # fmt: skip
    RewardModel(lm, "reward", ScalarHead(lm.hidden_size, seed=3), record).save(folder / "reward")
    return folder / "reward"


# --- the exact optimum ---------------------------------------------------------------------------


def letter_value(text: str) -> float:
    return (sum(ord(c) * (i + 7) for i, c in enumerate(text)) * 37 % 100) / 50 - 1


def first_token_distribution(trainer: PPOTrainer) -> Tensor:
    with trainer.policy.active() as lm, torch.no_grad():
        prompts = trainer.codec.prompts([trainer.prompts[0].prompt])
        _, hidden = lm.prefill(prompts, 4)
        return lm.policy_logits(hidden, torch.zeros(1), 1.0, 0).softmax(-1)[0]


def bandit(
    arch: str, folder: Path, steps: int, **options: Any
) -> tuple[PPOTrainer, Tensor, Tensor]:
    """Trains on one-token responses. Returns the trainer, the start and the exact optimum."""
    config = make_config(
        folder, batch_size=128, micro_batch_size=128, train_steps=steps, kl_coeff=0.5,
        target_sequence_length=1, **options,
    )  # fmt: skip
    Path(config.prompt_dataset).write_text('{"input_text": "the cat sat"}\n')
    trainer = PPOTrainer(
        config,
        reward_fn=lambda prompts, responses: [letter_value(text) for text in responses],
        model=tiny_model(arch),
        tokenizer=make_tokenizer(arch),
    )
    start = first_token_distribution(trainer)
    rewards = torch.tensor(
        [letter_value(trainer.codec.decode([token])) for token in range(len(start))]
    )
    optimum = (start.log() + rewards / 0.5).softmax(0)
    return trainer, start, optimum


def total_variation(p: Tensor, q: Tensor) -> float:
    return float((p - q).abs().sum() / 2)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "critic"), [("t5", "adapter"), ("llama", "head")])
def test_bandit_reaches_the_exact_optimum_over_the_whole_vocabulary(
    arch: str, critic: str, tmp_path: Path
) -> None:
    rate = 3e-3 if arch == "t5" else 1e-3
    trainer, start, optimum = bandit(
        arch, tmp_path, 150, lora={"rank": 0}, critic=critic, learning_rate=rate,
        critic_learning_rate=rate,
    )  # fmt: skip
    assert total_variation(start, optimum) > 0.3
    for _ in range(150):
        trainer.step()
    final = first_token_distribution(trainer)
    assert total_variation(final, optimum) < 0.02
    for token in (0, trainer.policy.lm.layout.eos_id):  # PAD and EOS like any other
        assert final[token] == pytest.approx(optimum[token].item(), rel=0.25)


# Expected gradients are compared exactly, for all of them and both families, in ppo/test_bandit.py.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("t5", "rloo"), ("llama", "grpo"), ("t5", "reinforce_pp"),
        ("llama", "reinforce_pp_baseline"),
    ],
)  # fmt: skip
def test_bandit_reaches_the_exact_optimum_without_a_critic(
    arch: str, name: str, tmp_path: Path
) -> None:
    rate = 3e-3 if arch == "t5" else 1e-3
    trainer, start, optimum = bandit(
        arch, tmp_path, 120, lora={"rank": 0}, learning_rate=rate, critic_learning_rate=None,
        advantage=name, responses_per_prompt=4,
    )  # fmt: skip
    assert total_variation(start, optimum) > 0.3
    for _ in range(120):
        trainer.step()
    assert total_variation(first_token_distribution(trainer), optimum) < 0.05


@pytest.mark.slow
def test_bandit_with_lora_reaches_what_its_rank_can_express(arch: str, tmp_path: Path) -> None:
    trainer, _, optimum = bandit(arch, tmp_path, 150, lora={"rank": 8}, learning_rate=1e-2)
    # The best that this adapter can do, by exact gradients of the same objective.
    exact, _, _ = bandit(arch, tmp_path, 150, lora={"rank": 8}, learning_rate=1e-2)
    parameters = [p for _, p in exact.policy.named_trainable("policy")]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 300)
    for _ in range(300):
        with exact.policy.active() as lm:
            prompt = exact.codec.prompts([exact.prompts[0].prompt])
            first = lm.response_states(prompt, TokenBatch.from_lists([[]]))[:, 0]
            log_p = lm.policy_logits(first, torch.zeros(1), 1.0, 0).log_softmax(-1)[0]
            (log_p.exp() * (log_p - optimum.log())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    for _ in range(150):
        trainer.step()

    def objective(p: Tensor) -> float:  # KL to the optimum is what PPO minimizes, times kl_coeff
        return float((p * (p / optimum).log()).sum())

    reached, best = (objective(first_token_distribution(t)) for t in (trainer, exact))
    assert reached < best + 0.03


@pytest.mark.slow
def test_multi_token_share_of_a_chosen_token(arch: str, tmp_path: Path) -> None:
    """Reward 1 per "z" (one token of 120) in four tokens.

    At 0.05 per nat the optimum multiplies that token's odds by exp(20) at every position, so its
    share is 1 but for 1e-6.
    """
    rate = 3e-3 if arch == "t5" else 2e-3
    config = make_config(
        tmp_path, batch_size=64, micro_batch_size=64, train_steps=60, kl_coeff=0.05,
        target_sequence_length=4, learning_rate=rate, critic_learning_rate=rate, lora={"rank": 0},
    )  # fmt: skip
    Path(config.prompt_dataset).write_text('{"input_text": "the cat sat"}\n')
    trainer = PPOTrainer(
        config,
        reward_fn=lambda prompts, responses: [float(text.count("z")) for text in responses],
        model=tiny_model(arch),
        tokenizer=make_tokenizer(arch),
    )
    for _ in range(60):
        metrics = trainer.step()
    assert metrics["ppo/score"] / 4 >= 0.9


def test_lora_in_the_decoder_runs_the_encoder_once_per_batch(tmp_path: Path) -> None:
    trainer = make_trainer("t5", tmp_path, lora={"rank": 4, "where": "decoder"}, ppo_epochs=2)
    runs: list[int] = []
    trainer.policy.lm.module.encoder.register_forward_hook(
        lambda module, inputs, output: runs.append(len(output.last_hidden_state))
    )
    metrics = trainer.step()
    assert sum(runs) == trainer.config.batch_size
    assert metrics["ppo/ratio_first"] < 1e-4


# --- the experience against a slow reference -----------------------------------------------------


def plain_token_logprobs(
    arch: str, model: torch.nn.Module, prompt: list[int], response: list[int], temperature: float
) -> Tensor:
    with torch.no_grad():
        if arch == "t5":
            logits = model(
                input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[0, *response]])
            ).logits[0, :-1]
        else:
            ids = torch.tensor([[*prompt, *response]])
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        logprobs = (logits.double() / temperature).log_softmax(-1)
    return logprobs[torch.arange(len(response)), torch.tensor(response)]


def test_experience_against_row_by_row_float64(arch: str, tmp_path: Path) -> None:
    trainer = make_trainer(arch, tmp_path, temperature=0.7, kl_coeff=0.3, whiten_rewards=False)
    rollout = ragged_rollout(trainer)
    scores = trainer.score(rollout)
    experience, stats = trainer.make_experience(rollout, scores)
    assert scores.tolist() == pytest.approx(
        count_letters([p.text for p in rollout.prompt_texts], list(rollout.texts))
    )
    reference = tiny_model(arch).eval()
    advantages: list[Tensor] = []
    prompts, responses = rollout.prompts.tolists(), rollout.responses.tolists()
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        n = len(response)
        ref = plain_token_logprobs(arch, reference, prompt, response, 0.7)
        with trainer.policy.active() as lm:
            own = plain_token_logprobs(arch, lm.module, prompt, response, 0.7)
        torch.testing.assert_close(experience.logprobs[i, :n].double(), own, atol=1e-5, rtol=1e-4)
        rewards = -0.3 * (own - ref)
        rewards[-1] += scores[i].double()
        values = experience.values[i, :n].double()
        following = torch.cat([values[1:], torch.zeros(1).double()])
        deltas = rewards + following - values
        advantage = [sum((0.95 ** (k - t)) * deltas[k] for k in range(t, n)) for t in range(n)]
        advantages.append(torch.stack([torch.as_tensor(a) for a in advantage]))
        torch.testing.assert_close(
            experience.returns[i, :n].double(), advantages[-1] + values, atol=1e-4, rtol=1e-4
        )
        assert not experience.advantages[i, n:].any()
        assert float(stats.kl[i].sum()) == pytest.approx(float((own - ref).sum()), abs=1e-4)
    flat = torch.cat(advantages)
    whitened = (flat - flat.mean()) / flat.std()
    torch.testing.assert_close(
        experience.advantages[rollout.responses.mask].double(), whitened, atol=1e-4, rtol=1e-4
    )


def test_values_are_the_critics_at_the_state_before_each_token(arch: str, tmp_path: Path) -> None:
    for critic in ("adapter", "head"):
        trainer = make_trainer(arch, tmp_path, critic=critic)
        rollout = ragged_rollout(trainer)
        experience, _ = trainer.make_experience(rollout, trainer.score(rollout))
        adapter = "value" if critic == "adapter" else "policy"
        for i, response in enumerate(rollout.responses.tolists()):
            prompt = rollout.prompts.select_rows([i])
            one = rollout.responses.select_rows([i])
            with trainer.policy.lm.using(adapter), torch.no_grad():
                states = trainer.policy.lm.response_states(prompt, one)[0]
            expected = states[: len(response)] @ trainer.critic.head.weight.flatten()
            torch.testing.assert_close(
                experience.values[i, : len(response)], expected, atol=1e-5, rtol=1e-4
            )


# --- invariances ---------------------------------------------------------------------------------


def gradients(trainer: PPOTrainer, experience: Experience) -> dict[str, Tensor]:
    trainer.optimizer.zero_grad()
    trainer.accumulate_gradients(experience)
    return {n: p.grad.clone() for n, p in trainer.parameters.items() if p.grad is not None}


def moved(trainer: PPOTrainer) -> tuple[Rollout, Experience]:
    """A rollout's experience, after which the policy moved so that ratios are not 1."""
    rollout = ragged_rollout(trainer)
    experience, _ = trainer.make_experience(rollout, trainer.score(rollout))
    for seed, name in enumerate(trainer.policy.lm.adapters.names):
        randomize_lora(trainer.policy.lm, name, seed + 20, std=0.12)
    return rollout, experience


@pytest.mark.parametrize("critic", ["adapter", "head"])
def test_micro_batches_and_order_change_no_gradient(arch: str, critic: str, tmp_path: Path) -> None:
    trainer = make_trainer(arch, tmp_path, critic=critic, entropy_coef=0.1)
    _, experience = moved(trainer)
    assert len(set(experience.responses.lengths.tolist())) > 1
    expected = gradients(trainer, experience)
    for size, tokens in ((1, 4096), (2, 4096), (8, 4096), (8, 30), (8, 1)):
        trainer.config.micro_batch_size = size
        trainer.config.max_tokens_per_micro_batch = tokens
        shuffled = experience.select_rows([5, 2, 7, 0, 1, 6, 3, 4])
        assert_same_gradients(gradients(trainer, shuffled), expected)


@pytest.mark.parametrize("critic", ["adapter", "head"])
def test_gradient_checkpointing_changes_no_gradient(arch: str, critic: str, tmp_path: Path) -> None:
    """Recomputation happens in backward, and must see the adapter that forward saw."""
    plain = make_trainer(arch, tmp_path, critic=critic)
    recomputing = make_trainer(arch, tmp_path, critic=critic, gradient_checkpointing=True)
    (_, experience), _ = moved(plain), moved(recomputing)
    expected = gradients(plain, experience)
    assert_same_gradients(gradients(recomputing, experience), expected)


def test_micro_batches_change_no_experience(arch: str, tmp_path: Path) -> None:
    trainer = make_trainer(arch, tmp_path)
    rollout = ragged_rollout(trainer)
    scores = trainer.score(rollout)
    expected, _ = trainer.make_experience(rollout, scores)
    for size in (1, 8):
        trainer.config.micro_batch_size = size
        actual, _ = trainer.make_experience(rollout, scores)
        for field in ("logprobs", "values", "advantages", "returns"):
            torch.testing.assert_close(
                getattr(actual, field), getattr(expected, field), atol=2e-5, rtol=1e-4
            )


def test_rollout_chunks_change_no_response(arch: str, tmp_path: Path) -> None:
    trainer = make_trainer(arch, tmp_path)
    whole = trainer.rollout(trainer.next_prompts())
    trainer.generator = partial(generate_in_chunks, chunk_size=3)
    assert trainer.rollout(trainer.next_prompts()).texts == whole.texts


def test_loss_against_token_by_token_float64(arch: str, tmp_path: Path) -> None:
    trainer = make_trainer(arch, tmp_path)
    _, experience = moved(trainer)
    minibatch = trainer.accumulate_gradients(experience)
    total, count = 0.0, 0
    for i, response in enumerate(experience.responses.tolists()):
        prompt = experience.prompts.tolists()[i]
        with trainer.policy.active() as lm:
            new = plain_token_logprobs(arch, lm.module, prompt, response, 1.0)
        for t in range(len(response)):
            ratio = (new[t] - experience.logprobs[i, t].double()).exp()
            advantage = experience.advantages[i, t].double()
            total -= float(min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage))
            count += 1
    assert minibatch.policy_loss == pytest.approx(total / count, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("rank", [4, 0])
def test_first_ratio_is_one(arch: str, rank: int, tmp_path: Path) -> None:
    trainer = make_trainer(arch, tmp_path, lora={"rank": rank}, temperature=0.7)
    for _ in range(2):
        assert trainer.step()["ppo/ratio_first"] < 1e-4


@pytest.mark.parametrize("rank", [4, 0])
def test_decoding_and_update_see_the_same_policy(
    arch: str, rank: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(arch, tmp_path, lora={"rank": rank}, temperature=0.7)
    for _ in range(2):
        assert trainer.step()["ppo/decode_deviation"] < 1e-4
    assert "decode_deviation" not in capsys.readouterr().err


def test_a_fold_that_changes_the_embedding_too_is_seen(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As when an adapter sits on an LM head that is tied: the update does not see the change."""
    trainer = make_trainer(arch, tmp_path)
    lm = trainer.policy.lm
    folded, embedding = lm.adapters.folded, lm.module.get_input_embeddings()

    @contextmanager
    def fold_too_much() -> Iterator[None]:
        before = embedding.weight.data
        embedding.weight.data = before + 0.1 * torch.linspace(-1, 1, before.shape[1])
        try:
            with folded():
                yield
        finally:
            embedding.weight.data = before

    monkeypatch.setattr(lm.adapters, "folded", fold_too_much)
    metrics = trainer.step()
    assert metrics["ppo/ratio_first"] < 1e-4
    assert metrics["ppo/decode_deviation"] > 1e-2
    assert "sampled from another distribution" in capsys.readouterr().err


# --- roles ---------------------------------------------------------------------------------------


def snapshot(*modules: torch.nn.Module) -> dict[str, Tensor]:
    return {
        f"{i}.{n}": p.detach().clone()
        for i, module in enumerate(modules)
        for n, p in module.named_parameters()
    }


@pytest.mark.parametrize("critic", ["adapter", "head"])
def test_only_policy_and_critic_change(arch: str, critic: str, tmp_path: Path) -> None:
    path = save_reward_model(arch, tmp_path)
    config = make_config(
        tmp_path, base_model=str(tmp_path / f"base-{arch}"), reward_model_path=str(path),
        critic=critic,
    )  # fmt: skip
    trainer = PPOTrainer(config)
    reward = trainer.rewards.scorers["reward_model"]
    assert reward.shares_base
    lm = trainer.policy.lm
    randomize_roles(trainer)
    before = snapshot(lm.module, trainer.critic.head, reward.head)
    trainer.step()
    changed = {
        n for n, p in snapshot(lm.module, trainer.critic.head, reward.head).items()
        if not torch.equal(p, before[n])
    }  # fmt: skip
    roles = {"policy"} | ({"value"} if critic == "adapter" else set())
    expected = {f"0.{n}" for role in roles for n, _ in lm.named_trainable(role)} | {"1.weight"}
    assert changed == expected


def test_each_role_gets_only_its_own_gradients(arch: str, tmp_path: Path) -> None:
    trainer = make_trainer(arch, tmp_path)
    _, experience = moved(trainer)
    trainer.config.vf_coef = 0.0
    only_policy = gradients(trainer, experience)
    assert all(not g.any() for n, g in only_policy.items() if n.startswith("critic"))
    trainer.config.vf_coef = 0.1
    both = gradients(trainer, experience)
    for name, gradient in both.items():
        if name.startswith("policy"):
            torch.testing.assert_close(gradient, only_policy[name])
        else:
            assert gradient.any()


def test_critic_starts_as_the_normalized_reward_model(arch: str, tmp_path: Path) -> None:
    path = save_reward_model(arch, tmp_path)
    base = str(tmp_path / f"base-{arch}")
    trainer = PPOTrainer(make_config(tmp_path, base_model=base, reward_model_path=str(path)))
    rollout = ragged_rollout(trainer)
    # The score is the text's: its ids as the tokenizer spells them, and one EOS.
    responses = trainer.codec.responses(rollout.texts, rollout.finished.tolist())
    with trainer.critic.role.active() as lm, torch.no_grad():
        states = lm.response_states(rollout.prompts, responses)
    last = states[torch.arange(len(states)), responses.lengths]
    torch.testing.assert_close(trainer.critic.head(last), trainer.score(rollout))


@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_under_full_fine_tuning_the_critic_starts_as_the_reward_model_too(
    arch: str, kind: str, tmp_path: Path
) -> None:
    path = save_reward_model(arch, tmp_path)
    base = str(tmp_path / f"base-{arch}")
    if kind == "full":  # the same scores from weights that were all trained
        merged = PPOTrainer(make_config(tmp_path, base_model=base, reward_model_path=str(path)))
        reward = merged.rewards.scorers["reward_model"]
        assert isinstance(reward, RewardModel)
        shutil.rmtree(path)
        save_merged(reward.lm, reward.adapter, path / "merged")
        reward.adapter = None  # writes head, tokenizer and record, then the base as "merged"
        reward.lm = FAMILIES[arch](
            load_weights(arch, path / "merged"), make_tokenizer(arch), base_name=base
        )
        reward.save(path)
    config = make_config(
        tmp_path, base_model=base, reward_model_path=str(path), lora={"rank": 0},
        learning_rate=1e-3, output_dir=str(tmp_path / "full"),
    )  # fmt: skip
    trainer = PPOTrainer(config)
    rollout = ragged_rollout(trainer)
    with trainer.critic.role.active() as lm, torch.no_grad():
        states = lm.response_states(rollout.prompts, rollout.responses)
    last = states[torch.arange(len(states)), rollout.responses.lengths]
    reward = trainer.rewards.scorers["reward_model"]
    assert isinstance(reward, RewardModel)
    scores = reward.score_tokens(rollout.prompts, rollout.responses)
    assert scores.std() > 0.01
    torch.testing.assert_close(trainer.critic.head(last).detach(), scores, rtol=1e-4, atol=1e-4)
    trainer.step()  # trains a copy
    again = reward.score_tokens(rollout.prompts, rollout.responses)
    assert torch.equal(again, scores)


def test_without_a_reward_model_a_critic_of_its_own_starts_at_zero(
    arch: str, tmp_path: Path
) -> None:
    config = make_config(tmp_path, lora={"rank": 0})
    trainer = PPOTrainer(
        config, reward_fn=count_letters, model=tiny_model(arch), tokenizer=make_tokenizer(arch)
    )
    assert not trainer.critic.head.weight.any()


def test_a_scorer_of_the_other_family(arch: str, tmp_path: Path) -> None:
    scorer = {"t5": "llama", "llama": "t5"}[arch]
    path = save_reward_model(arch, tmp_path, scorer)
    trainer = PPOTrainer(
        make_config(tmp_path, reward_model_path=str(path)),
        model=tiny_model(arch), tokenizer=make_tokenizer(arch),
    )  # fmt: skip
    assert not trainer.rewards.scorers["reward_model"].shares_base
    rollout = ragged_rollout(trainer)
    scores = trainer.score(rollout)
    rows = zip(rollout.prompt_texts, rollout.texts, rollout.finished.tolist(), scores, strict=True)
    for prompt, text, ended, score in rows:
        alone = trainer.rewards.scorers["reward_model"].score([prompt], [text], finished=[ended])
        assert float(score) == pytest.approx(float(alone[0]), abs=1e-5)
    trainer.step()


def test_without_kl_nobody_computes_a_reference(arch: str, tmp_path: Path) -> None:
    trainer = make_trainer(arch, tmp_path, kl_coeff=0.0)
    assert trainer.reference is None
    seen: list[str | None] = []
    original = trainer.policy.lm.response_states

    def spy(*arguments: Any) -> Tensor:
        seen.append(trainer.policy.lm.adapters.active)
        return original(*arguments)

    trainer.policy.lm.response_states = spy  # type: ignore[method-assign]
    metrics = trainer.step()
    assert set(seen) == {"policy", "value"}
    assert "ppo/kl" not in metrics


def test_full_fine_tuning_keeps_the_reference(arch: str, tmp_path: Path) -> None:
    model = tiny_model(arch)
    untouched = copy.deepcopy(model)
    trainer = make_trainer(arch, tmp_path, model=model, lora={"rank": 0}, learning_rate=1e-2)
    for _ in range(2):
        metrics = trainer.step()
    assert metrics["ppo/kl"] > 0
    assert trainer.reference is not None
    for (name, a), (_, b) in zip(
        trainer.reference.lm.module.named_parameters(), untouched.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
    policy = dict(trainer.policy.lm.module.named_parameters())
    assert any(not torch.equal(policy[n], p) for n, p in untouched.named_parameters())


# --- rules and guards ----------------------------------------------------------------------------


def test_the_controller_gets_its_kl_whatever_is_logged(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(arch, tmp_path, kl_target=1e-3, kl_horizon=16)
    whole = ppo_trainer.rollout_metrics

    def without_kl(*arguments: Any) -> dict[str, float]:
        return {name: m for name, m in whole(*arguments).items() if name != "ppo/kl"}

    monkeypatch.setattr(ppo_trainer, "rollout_metrics", without_kl)
    trainer.step()  # the random policy is far beyond the target: +20 % for 8 of 16 episodes
    assert trainer.kl_controller.value == pytest.approx(0.1 * 1.1)


def test_adaptive_kl_needs_a_coefficient_to_adapt(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="kl_target, kl_coeff"):
        make_config(tmp_path, kl_target=6.0, kl_coeff=0.0)


def test_the_optimizer_belongs_to_the_run(arch: str, tmp_path: Path) -> None:
    class OtherTrainer(PPOTrainer):
        betas = (0.9, 0.99)

    identities = [
        kind(
            make_config(tmp_path), reward_fn=count_letters, model=tiny_model(arch),
            tokenizer=make_tokenizer(arch),
        ).run.identity["fields"]
        for kind in (PPOTrainer, OtherTrainer)
    ]  # fmt: skip
    changed = {name for name in identities[0] if identities[0][name] != identities[1][name]}
    assert changed == {"optimizer (content)"}


def test_evaluations_draw_their_own_numbers(arch: str, tmp_path: Path) -> None:
    trainer = make_trainer(arch, tmp_path, temperature=3.0)
    rows = trainer.next_prompts()
    training, evaluation = trainer.rollout(rows), trainer.rollout(rows, evaluation=True)
    assert training.texts != evaluation.texts
    trainer.step_index = 5
    assert trainer.rollout(rows, evaluation=True).texts == evaluation.texts


def test_missing_eos(arch: str, tmp_path: Path) -> None:
    plain = make_trainer(arch, tmp_path, temperature=4.0, target_sequence_length=40, batch_size=16)
    rollout = plain.rollout(plain.next_prompts())
    assert 0 < rollout.finished.sum() < 16
    scores = plain.score(rollout)
    plain.config.missing_eos_penalty = 2.5
    penalized = plain.score(rollout)
    plain.config.missing_eos_penalty = None
    plain.config.missing_eos_score = -9.0
    replaced = plain.score(rollout)
    torch.testing.assert_close(penalized, scores - 2.5 * (~rollout.finished).float())
    assert torch.equal(replaced[rollout.finished], scores[rollout.finished])
    assert (replaced[~rollout.finished] == -9.0).all()


def test_early_stop_on_kl_to_the_rollout(arch: str, tmp_path: Path) -> None:
    free = make_trainer(arch, tmp_path, learning_rate=0.03, ppo_epochs=6)
    bound = make_trainer(arch, tmp_path, learning_rate=0.03, ppo_epochs=6, target_kl=1e-4)
    assert free.step()["ppo/stopped_early"] == 0.0
    assert bound.step()["ppo/stopped_early"] == 1.0


def test_an_exploding_ratio_is_skipped_and_then_ends_the_run(arch: str, tmp_path: Path) -> None:
    trainer = make_trainer(arch, tmp_path)
    rollout = trainer.rollout(trainer.next_prompts())
    experience, _ = trainer.make_experience(rollout, trainer.score(rollout))
    broken = replace(experience, logprobs=experience.logprobs - 5.0)
    before = snapshot(trainer.policy.lm.module)
    trainer.optimize(broken)
    assert trainer.skipped_updates == trainer.config.ppo_epochs
    after = snapshot(trainer.policy.lm.module)
    assert all(torch.equal(after[n], before[n]) for n in before)
    with pytest.raises(TrainingDiverged, match="ratio"):
        trainer.optimize(broken)


@pytest.mark.parametrize(
    ("answer", "message"),
    [([1.0], "one per response"), ([float("nan")] * 8, "finite"), ("no", "numbers|one per")],
)
def test_a_bad_reward_function_is_named(
    arch: str, answer: Any, message: str, tmp_path: Path
) -> None:
    trainer = make_trainer(arch, tmp_path, reward_fn=lambda prompts, responses: answer)
    with pytest.raises(InputError, match=message):
        trainer.step()


def test_a_run_without_any_reward_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="reward_model_path: give it, or rewards, or a reward_fn"):
        train_ppo(make_config(tmp_path))


# --- the whole stage -----------------------------------------------------------------------------


def run(
    arch: str, folder: Path, callbacks: Sequence[Callable[..., None]] = (), **options: Any
) -> Any:
    return train_ppo(
        make_config(folder, **options), reward_fn=count_letters, model=tiny_model(arch),
        tokenizer=make_tokenizer(arch), callbacks=callbacks,
    )  # fmt: skip


def test_train_ppo_writes_its_artifacts(arch: str, tmp_path: Path) -> None:
    steps: list[int] = []
    result = run(
        arch, tmp_path, [lambda trainer, step, metrics, samples: steps.append(step)],
        eval_dataset=str(tmp_path / "prompts.jsonl"), eval_every=1,
    )  # fmt: skip
    folder = tmp_path / "ppo"
    assert steps == [1, 2]
    for name in (
        "config.yaml", "metrics.json", "metrics.jsonl", "samples.jsonl", "README.md",
        "adapter/adapter_model.safetensors", "adapter/rlhf.json", "merged/config.json",
        "merged/model.safetensors", "merged/tokenizer.json",
    ):  # fmt: skip
        assert (folder / name).is_file(), name
    sample = json.loads((folder / "samples.jsonl").read_text().splitlines()[0])
    assert {"prompt", "response", "score", "kl", "prompt_tokens", "response_tokens"} <= set(sample)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    best = max(lines, key=lambda line: line["eval/objective"])
    assert result.metrics["best_step"] == best["step"]
    assert result.metrics["eval/score"] == pytest.approx(best["eval/score"])
    assert abs(result.metrics["ppo/kl_merged_adapter"]) < 1e-5
    again = run(arch, tmp_path, eval_dataset=str(tmp_path / "prompts.jsonl"), eval_every=1)
    assert again.metrics == json.loads((folder / "metrics.json").read_text())


def without_times(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if not k.startswith(("time/", "perf/"))} for line in lines
    ]


def test_stopped_and_resumed_is_never_stopped(arch: str, tmp_path: Path) -> None:
    import os
    import signal

    from safetensors.torch import load_file

    from rlhf.errors import StoppedBySignal

    options = {
        "train_steps": 3, "kl_target": 0.5, "kl_horizon": 50, "save_every": 3,
        "num_minibatches": 2, "lr_scheduler": "cosine", "warmup_steps": 1,
        "responses_per_prompt": 2,
    }  # fmt: skip
    (tmp_path / "whole").mkdir()
    run(arch, tmp_path / "whole", **options)
    for stop in (1, 2):
        folder = tmp_path / f"stopped-{stop}"
        folder.mkdir()

        def stop_here(
            trainer: PPOTrainer, step: int, metrics: object, samples: object, stop: int = stop
        ) -> None:
            if step == stop:
                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(StoppedBySignal):
            run(arch, folder, [stop_here], **options)
        run(arch, folder, **options)
        a, b = tmp_path / "whole" / "ppo", folder / "ppo"
        assert without_times(a / "metrics.jsonl") == without_times(b / "metrics.jsonl")
        assert (a / "samples.jsonl").read_text() == (b / "samples.jsonl").read_text()
        for name in ("adapter/adapter_model.safetensors", "merged/model.safetensors"):
            one, other = load_file(a / name), load_file(b / name)
            assert all(torch.equal(one[key], other[key]) for key in one)


def test_compiled_decoding_changes_no_response(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_compiler = torch.compile

    def without(function: Callable[..., Tensor], mode: str, **options: bool) -> Any:
        assert mode == "reduce-overhead"
        return with_compiler(function, backend="eager", **options)

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", without)
    for name in ("plain", "compiled"):
        (tmp_path / name).mkdir()
    plain = make_trainer(arch, tmp_path / "plain", rollout_batch_size=5)
    compiled = make_trainer(arch, tmp_path / "compiled", rollout_batch_size=5, compile_decode=True)
    for _ in range(2):  # the second time with an adapter that has been trained
        expected, actual = (t.rollout(t.next_prompts()).texts for t in (plain, compiled))
        assert actual == expected
        metrics = [trainer.step() for trainer in (plain, compiled)]
        assert metrics[1]["ppo/kl"] == pytest.approx(metrics[0]["ppo/kl"], rel=1e-3)
        assert metrics[1]["ppo/ratio_first"] < 1e-4
