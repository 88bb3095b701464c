"""The reward model as a role, and what can stand in for it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.reward_models import RANK, load, make_reward, slow_raw_scores
from support.tiny import make_tokenizer, randomize_lora, tiny_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForSequenceClassification

from rlhf.config import LoRAConfig
from rlhf.data.batching import TokenBatch
from rlhf.data.prompts import PromptRenderer
from rlhf.data.schema import PromptText
from rlhf.errors import InputError
from rlhf.models.classifiers import SequenceClassifier
from rlhf.models.heads import ScalarHead
from rlhf.models.language_model import LanguageModel
from rlhf.models.reward_functions import RewardFn
from rlhf.models.reward_model import (
    RewardModel,
    check_reward_model,
    load_reward_model,
    value_from_reward,
)
from rlhf.models.sequence_classifier import save_sequence_classifier

PROMPTS = ["the cat sat", "a post", "the dog ran to the cat and sat", "x", "to 12:30!"]
# A blank one, unlike lengths, and one that the limit cuts, so that it has no EOS.
RESPONSES = [" a dog", "", " the cat sat and ran", " 9", " and and and and and and and and and"]


def whole(text: str) -> PromptText:
    return PromptText(text, ((0, len(text)),))


@pytest.fixture
def lm(tiny_checkpoint: Path) -> LanguageModel:
    return load(tiny_checkpoint)


@pytest.fixture
def reward(lm: LanguageModel) -> RewardModel:
    return make_reward(lm)


@pytest.fixture
def tokens(reward: RewardModel) -> tuple[TokenBatch, TokenBatch]:
    prompts = reward.codec.prompts([whole(text) for text in PROMPTS])
    responses = reward.codec.responses(RESPONSES).tolists()
    assert [len(row) for row in responses][1] == 1  # EOS alone
    assert responses[4][-1] not in reward.lm.layout.eos_ids
    # PAD may be sampled like any token, even as the last one before the limit.
    responses[2][1] = responses[4][-1] = reward.lm.tokenizer.pad_token_id
    return prompts, TokenBatch.from_lists(responses)


def test_score_is_read_after_the_last_token(
    reward: RewardModel, arch: str, tokens: tuple[TokenBatch, TokenBatch]
) -> None:
    rows = zip(*(side.tolists() for side in tokens), strict=True)
    expected = (torch.tensor(slow_raw_scores(reward, arch, rows)) - 0.3) / 1.7
    torch.testing.assert_close(reward.score_tokens(*tokens), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.1


def test_texts_score_as_their_ids(reward: RewardModel) -> None:
    prompts = [whole(text) for text in PROMPTS]
    ids = reward.codec.prompts(prompts), reward.codec.responses(RESPONSES)
    torch.testing.assert_close(reward.score(prompts, RESPONSES), reward.score_tokens(*ids))


def test_batch_order_and_padding_do_not_matter(
    reward: RewardModel, tokens: tuple[TokenBatch, TokenBatch]
) -> None:
    expected = reward.score_tokens(*tokens, batch_size=1)
    for size in (2, 3, 32):
        torch.testing.assert_close(reward.score_tokens(*tokens, batch_size=size), expected)
    order = [3, 0, 4, 2, 1]
    shuffled = reward.score_tokens(*(side.select_rows(order) for side in tokens), batch_size=2)
    torch.testing.assert_close(shuffled, expected[order])
    eos = reward.lm.layout.eos_id
    padded = []
    for side in tokens:
        ids = torch.nn.functional.pad(side.ids, (0, 6), value=0)
        ids[~TokenBatch(ids, side.lengths).mask] = eos  # any filler
        padded.append(TokenBatch(ids, side.lengths))
    torch.testing.assert_close(reward.scores(*padded), expected)


def test_scoring_leaves_other_roles_alone(
    reward: RewardModel, tokens: tuple[TokenBatch, TokenBatch]
) -> None:
    reward.lm.add_adapter("policy", LoRAConfig(rank=2), seed=1)
    randomize_lora(reward.lm, "policy", seed=8, std=1.0)
    expected = reward.score_tokens(*tokens)
    with reward.lm.using("policy"):
        torch.testing.assert_close(reward.score_tokens(*tokens), expected)
        assert reward.lm.adapters.active == "policy"
    assert all(p.requires_grad for _, p in reward.lm.named_trainable("policy"))


def test_dropout_acts_in_training_only(
    lm: LanguageModel, tokens: tuple[TokenBatch, TokenBatch], tmp_path: Path
) -> None:
    lm.add_adapter("noisy", LoRAConfig(rank=RANK, dropout=0.5))
    randomize_lora(lm, "noisy", std=1.0)
    noisy = make_reward(lm, None)
    noisy.adapter = "noisy"
    first, second = (noisy.raw_scores(*tokens) for _ in range(2))
    assert not torch.equal(first, second)
    torch.testing.assert_close(noisy.scores(*tokens), noisy.scores(*tokens), rtol=0, atol=0)
    assert not torch.equal(*(noisy.raw_scores(*tokens) for _ in range(2)))
    noisy.save(tmp_path)
    loaded = load_reward_model(str(tmp_path), device="cpu")
    assert isinstance(loaded, RewardModel)
    value_from_reward(loaded, "value")
    for adapter in ("reward", "value"):
        with loaded.lm.using(adapter):
            first, second = (loaded.lm.response_states(*tokens) for _ in range(2))
        assert torch.equal(first, second)


def test_values_start_as_normalized_scores(
    reward: RewardModel, tokens: tuple[TokenBatch, TokenBatch]
) -> None:
    head = value_from_reward(reward, "value")
    with reward.lm.using("value"):
        states = reward.lm.response_states(*tokens)
    last = states[torch.arange(len(states)), tokens[1].lengths]
    torch.testing.assert_close(head(last), reward.scores(*tokens))
    assert [name for name, _ in head.named_parameters()] == ["weight"]
    head(last).sum().backward()
    assert all(p.grad is not None for _, p in reward.lm.named_trainable("value"))
    assert all(p.grad is None for _, p in reward.lm.named_trainable("reward"))


def test_head_computes_in_fp32() -> None:
    head = ScalarHead(2048, seed=4)
    states = torch.randn(3, 2, 2048).bfloat16()
    expected = states.double() @ head.weight[0].double()
    torch.testing.assert_close(head(states).double(), expected, rtol=1e-5, atol=1e-5)
    assert head.weight.std().item() == pytest.approx(2049**-0.5, rel=0.05)
    assert torch.equal(head.weight, ScalarHead(2048, seed=4).weight)
    assert ScalarHead(8, init_std=0.0)(torch.randn(5, 8)).abs().max() == 0


FRESH = """
import json, sys
from rlhf.data.schema import PromptText
from rlhf.models.reward_model import load_reward_model
folder, prompts, responses = json.loads(sys.argv[1])
scorer = load_reward_model(folder, device="cpu", dtype="float32")
texts = [PromptText(text, ((0, len(text)),)) for text in prompts]
print(json.dumps(scorer.score(texts, responses).tolist()))
"""

PLAIN = """
import json, sys, torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
folder, base, seq2seq, rows = json.loads(sys.argv[1])
auto = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
model = PeftModel.from_pretrained(auto.from_pretrained(base), folder + "/adapter").eval()
head = load_file(folder + "/head.safetensors")["weight"]
scores = []
for prompt, response in rows:
    if seq2seq:
        inputs = {"input_ids": [prompt], "decoder_input_ids": [[0, *response]]}
    else:
        inputs = {"input_ids": [prompt + response]}
    inputs = {name: torch.tensor(ids) for name, ids in inputs.items()}
    output = model(**inputs, output_hidden_states=True)
    states = (output.decoder_hidden_states if seq2seq else output.hidden_states)[-1]
    scores.append(float(head[0] @ states[0, -1]))
assert "rlhf" not in sys.modules
print(json.dumps(scores))
"""

CLASSIFIER = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder, rows = json.loads(sys.argv[1])
model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
assert tokenizer.pad_token_id == model.config.pad_token_id
ids = {"input_ids": [prompt + response for prompt, response in rows]}
batch = tokenizer.pad(ids, padding_side="right", return_tensors="pt")
assert "rlhf" not in sys.modules
print(json.dumps(model(**batch).logits[:, 0].tolist()))
"""


def fresh(code: str, *arguments: Any) -> Tensor:
    """Runs code in a process of its own; what it prints last is a list of scores."""
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.tensor(json.loads(done.stdout.splitlines()[-1]))


def test_saved_model_scores_the_same_in_a_fresh_process(
    reward: RewardModel, tmp_path: Path
) -> None:
    expected = reward.score([whole(text) for text in PROMPTS], RESPONSES)
    reward.save(tmp_path)
    torch.testing.assert_close(fresh(FRESH, str(tmp_path), PROMPTS, RESPONSES), expected)


def test_full_model_is_saved_whole(tiny_checkpoint: Path, tmp_path: Path) -> None:
    lm = load(tiny_checkpoint, trainable=True)
    with torch.no_grad():
        for _, parameter in lm.named_trainable(None):
            parameter.mul_(1.01)
    reward = make_reward(lm, None)
    reward.save(tmp_path)
    assert not (tmp_path / "adapter").exists()
    expected = reward.score([whole(text) for text in PROMPTS], RESPONSES)
    loaded = load_reward_model(str(tmp_path), device="cpu", policy_lm=load(tiny_checkpoint))
    assert not loaded.shares_base
    torch.testing.assert_close(loaded.score([whole(t) for t in PROMPTS], RESPONSES), expected)


def test_adapter_and_head_are_plain(
    reward: RewardModel,
    arch: str,
    tiny_checkpoint: Path,
    tokens: tuple[TokenBatch, TokenBatch],
    tmp_path: Path,
) -> None:
    reward.save(tmp_path)
    rows = list(zip(*(side.tolists() for side in tokens), strict=True))
    scores = fresh(PLAIN, str(tmp_path), str(tiny_checkpoint), arch == "t5", rows)
    torch.testing.assert_close((scores - 0.3) / 1.7, reward.score_tokens(*tokens))


def test_sequence_classifier_is_plain(
    reward: RewardModel, arch: str, tokens: tuple[TokenBatch, TokenBatch], tmp_path: Path
) -> None:
    written = save_sequence_classifier(reward.lm, "reward", reward.head, tmp_path / "classifier")
    assert written == (arch == "llama") == (tmp_path / "classifier").exists()
    if not written:
        return
    rows = list(zip(*(side.tolists() for side in tokens), strict=True))
    scores = fresh(CLASSIFIER, str(tmp_path / "classifier"), rows)
    torch.testing.assert_close(scores, reward.raw_scores(*tokens).detach())


@pytest.mark.parametrize(
    ("specials", "pad"),
    [
        ({"pad_token": "<unk>"}, "<s>"),
        ({"pad_token": "</s>"}, "<s>"),
        ({"pad_token": "a"}, "a"),
        ({"pad_token": None, "bos_token": None}, "<unk>"),
        ({"pad_token": "</s>", "bos_token": None, "unk_token": None}, None),
    ],
)
def test_classifier_pads_with_what_ends_no_response(
    checkpoints: dict[str, Path], tmp_path: Path, specials: dict[str, str | None], pad: str | None
) -> None:
    lm = load(checkpoints["llama"])
    for name, token in specials.items():
        setattr(lm.tokenizer, name, token)
    assert save_sequence_classifier(lm, None, ScalarHead(lm.hidden_size), tmp_path)
    scorer = load_reward_model(str(tmp_path), device="cpu")
    assert isinstance(scorer, SequenceClassifier)
    assert scorer.tokenizer.pad_token == pad
    assert scorer.can_pad == (pad is not None)


def test_policy_and_scorer_share_a_base(
    reward: RewardModel, lm: LanguageModel, tmp_path: Path
) -> None:
    reward.save(tmp_path)
    prompts = [whole(text) for text in PROMPTS]
    expected = reward.score(prompts, RESPONSES)
    policy = load(Path(lm.base_name))
    policy.add_adapter("policy", LoRAConfig(rank=2))
    randomize_lora(policy, "policy")
    shared = load_reward_model(str(tmp_path), policy_lm=policy)
    assert isinstance(shared, RewardModel)
    assert shared.shares_base
    assert shared.lm is policy
    with policy.using("policy"):
        torch.testing.assert_close(shared.score(prompts, RESPONSES), expected)
    assert not any(p.requires_grad for _, p in policy.named_trainable("reward"))


def test_scorer_of_the_other_family(
    checkpoints: dict[str, Path], arch: str, tmp_path: Path
) -> None:
    other = {"t5": "llama", "llama": "t5"}[arch]
    reward = make_reward(load(checkpoints[arch]))
    reward.save(tmp_path)
    scorer = load_reward_model(str(tmp_path), device="cpu", policy_lm=load(checkpoints[other]))
    assert not scorer.shares_base
    prompts = [whole(text) for text in PROMPTS]
    torch.testing.assert_close(scorer.score(prompts, RESPONSES), reward.score(prompts, RESPONSES))


def test_a_policy_that_is_trained_itself_is_not_shared(
    reward: RewardModel, lm: LanguageModel, tmp_path: Path
) -> None:
    reward.save(tmp_path)
    policy = load(Path(lm.base_name), trainable=True)
    scorer = load_reward_model(str(tmp_path), device="cpu", policy_lm=policy)
    assert not scorer.shares_base


def test_changed_base_is_refused(reward: RewardModel, arch: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_model(arch, seed=1).save_pretrained(base)
    make_tokenizer(arch).save_pretrained(base)
    reward.record = replace(reward.record, base_model=str(base))
    reward.save(tmp_path / "reward")
    with pytest.raises(InputError, match="use the same base"):
        load_reward_model(str(tmp_path / "reward"), device="cpu")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "reward_model.json").write_text("{"), "not the record of a reward model"),
        (lambda f: (f / "reward_model.json").write_text("[1]"), "not the record of a reward model"),
        (lambda f: (f / "reward_model.json").write_text("{}"), "missing 10 required"),
        (lambda f: (f / "head.safetensors").unlink(), "not a reward head"),
        (lambda f: (f / "head.safetensors").write_bytes(b"x"), "not a reward head"),
        (lambda f: save_file({"weight": torch.ones(1, 8)}, f / "head.safetensors"), r"\(1, 32\)"),
        (
            lambda f: save_file({"weight": torch.full((1, 32), torch.nan)}, f / "head.safetensors"),
            "NaN",
        ),
        (lambda f: (f / "reward_model.json").unlink(), "has its training finished"),
    ],
)
def test_damaged_folder_is_an_input_error(
    checkpoints: dict[str, Path], tmp_path: Path, damage: Any, message: str
) -> None:
    make_reward(load(checkpoints["llama"])).save(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=message):
        load_reward_model(str(tmp_path), device="cpu")


def test_missing_base_is_named(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    gone = str(tmp_path / "gone" / "base")
    make_reward(load(checkpoints["t5"]), base_model=gone).save(tmp_path / "reward")
    with pytest.raises(InputError, match=r"reward_model_path: .*its base_model: .*gone"):
        load_reward_model(str(tmp_path / "reward"), device="cpu")
    with pytest.raises(InputError, match="there is no folder"):
        load_reward_model(str(tmp_path / "nothing"), device="cpu")


def test_other_prompting_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    renderer = PromptRenderer("Summarise:")
    lm = load(checkpoints["t5"])
    make_reward(lm, instruction="Summarise:", prompting=renderer.identity).save(tmp_path)
    check_reward_model(str(tmp_path), renderer)
    with pytest.raises(InputError, match="instruction 'Summarise:', but instruction is ''"):
        check_reward_model(str(tmp_path), PromptRenderer())
    chat = PromptRenderer("Summarise:", "{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(InputError, match="another chat template"):
        check_reward_model(str(tmp_path), chat)
    check_reward_model(str(tmp_path), chat, conversations=False)
    other = classifier_folder(tmp_path / "classifier", 0)
    check_reward_model(str(other), chat)  # not ours: says nothing of its prompts
    with pytest.raises(InputError, match="sequence classifier, got T5ForConditionalGeneration"):
        check_reward_model(str(checkpoints["t5"]), chat)
    with pytest.raises(InputError, match="there is no folder"):
        check_reward_model(str(tmp_path / "nothing"), chat)


def test_reward_function_gets_texts() -> None:
    scorer = RewardFn(
        lambda prompts, responses: [
            len(p) + len(r) for p, r in zip(prompts, responses, strict=True)
        ]
    )
    assert scorer.score([whole("ab"), whole("c")], ["d", ""]).tolist() == [3.0, 1.0]
    assert RewardFn(lambda p, r: torch.ones(2)).score([whole("a")] * 2, ["", ""]).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0], "1 scores for 2 responses"),
        ([1.0, float("nan")], "nan for response 1, 'second'"),
        ([float("inf"), 1.0], "inf for response 0"),
        (None, "expected a list of numbers"),
        (["good", "bad"], "expected a list of numbers"),
        (3.0, "expected a list of numbers"),
    ],
)
def test_bad_reward_function_is_an_input_error(answer: Any, message: str) -> None:
    def scorer(prompts: list[str], responses: list[str]) -> Any:
        return answer

    with pytest.raises(InputError, match=f"reward_fn scorer: .*{message}"):
        RewardFn(scorer).score([whole("a"), whole("b")], ["first", "second"])


def classifier_folder(folder: Path, pad: int | None, labels: int = 1) -> Path:
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=120, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, pad_token_id=pad, num_labels=labels,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    model.save_pretrained(folder)
    make_tokenizer("llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pad", [0, None, 7])
def test_foreign_classifier_does_not_depend_on_the_batch(tmp_path: Path, pad: int | None) -> None:
    folder = classifier_folder(tmp_path / "model", pad)
    scorer = load_reward_model(str(folder), device="cpu")
    assert isinstance(scorer, SequenceClassifier)
    assert not scorer.shares_base
    prompts = [whole(text) for text in [*PROMPTS, "the cat " * 50]]
    responses = [*RESPONSES, " sat"]
    scores = scorer.score(prompts, responses)
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = make_tokenizer("llama")
    for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids = tokenizer(prompt.text + response).input_ids[-64:]
        expected = model(torch.tensor([ids])).logits[0, 0]
        torch.testing.assert_close(scores[number], expected.detach(), rtol=1e-4, atol=1e-5)
    for size in (1, 2, 3):
        torch.testing.assert_close(scorer.score(prompts, responses, batch_size=size), scores)


def test_what_is_no_classifier_is_refused(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    two = classifier_folder(tmp_path / "two", 0, labels=2)
    with pytest.raises(InputError, match=r"has 2 labels; choose .*: 0 \(LABEL_0\), 1 \(LABEL_1\)"):
        load_reward_model(str(two), device="cpu")
    with pytest.raises(InputError, match="sequence classifier, got LlamaForCausalLM"):
        load_reward_model(str(checkpoints["llama"]), device="cpu")
    headless = classifier_folder(tmp_path / "headless", 0)
    model = LlamaForSequenceClassification.from_pretrained(headless)
    state = {name: t for name, t in model.state_dict().items() if "score" not in name}
    save_file(state, headless / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks weights: score\.weight"):
        load_reward_model(str(headless), device="cpu")
    (headless / "model.safetensors").rename(headless / "weights.bin")
    with pytest.raises(InputError, match="not a sequence classifier that loads"):
        load_reward_model(str(headless), device="cpu")
