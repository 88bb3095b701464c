"""How models end their responses in conversations: decoding, training, scores, records."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chats import CHATML, THINKING, chat_tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from rlhf.config import RewardModelConfig, ScoreConfig, SFTConfig, StageConfig
from rlhf.data.batching import TokenBatch
from rlhf.data.prompts import PromptRenderer
from rlhf.data.schema import Message, PromptFields
from rlhf.errors import InputError
from rlhf.models.generation import generate
from rlhf.models.loading import load_language_model, load_tokenizer, prompt_layout
from rlhf.models.reward_model import RewardModel, check_reward_model, load_reward_model
from rlhf.models.reward_record import RECORD_FILE
from rlhf.models.saving import save_merged
from rlhf.reward_model import train_reward_model
from rlhf.score import run_score
from rlhf.sft import SFTTrainer, train_sft

CHAT = [{"author": "user", "content": "is it a cat?"}]
FIELDS = PromptFields(None, (Message("user", "is it a cat?"),), None)
TEXT = PromptFields("is it a cat?", (), None)
END = "<|im_end|>"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaMA whose generation config names an EOS of its own."""
    torch.manual_seed(0)
    tokenizer = chat_tokenizer(THINKING)
    config = LlamaConfig(
        vocab_size=max(tokenizer.get_vocab().values()) + 1, hidden_size=16, intermediate_size=32,
        num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|eot|>")]
    )
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def settings(base: Path, folder: Path, **fields: Any) -> dict[str, Any]:
    least = {
        "base_model": str(base), "output_dir": str(folder), "device": "cpu", "dtype": "float32",
        "batch_size": 2, "train_steps": 1, "prompt_sequence_length": 64,
        "target_sequence_length": 16, "log_with": [], "lora": {"rank": 2},
        "chat_template_options": {"enable_thinking": False},
    }  # fmt: skip
    return least | fields


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_decoding_ends_at_any_of_the_ends(base: Path, tmp_path: Path) -> None:
    lm = load_language_model(
        StageConfig(base_model=str(base), output_dir="x", device="cpu", dtype="float32"),
        trainable=False,
    )
    tokenizer = lm.tokenizer
    ends = [tokenizer.convert_tokens_to_ids(name) for name in ("<|end|>", "<|eot|>", END)]
    assert lm.layout.eos_ids == set(ends)
    assert (lm.layout.eos_id, lm.layout.turn_end_id) == (ends[0], ends[2])
    assert prompt_layout(lm.config, tokenizer).turn_end_id == ends[2]
    save_merged(lm, None, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sorted(plain.generation_config.eos_token_id) == sorted(ends)
    # Whichever token comes third is made the end of a turn, so that decoding must stop there.
    prompt = torch.tensor([tokenizer("the cat sat").input_ids])
    free = plain.generate(prompt, max_new_tokens=8, do_sample=False, min_new_tokens=8)[0]
    new = free[prompt.shape[1] :].tolist()
    third = next(id_ for id_ in new[2:] if id_ not in new[:2])
    with torch.no_grad():
        for weight in (lm.module.lm_head.weight, plain.lm_head.weight):
            weight[[third, ends[2]]] = weight[[ends[2], third]]
    expected = plain.generate(prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :]
    ours = generate(lm, TokenBatch.from_lists(prompt.tolist()), max_new_tokens=8, temperature=0.0)
    assert ours.responses.tolists()[0] == expected.tolist()
    assert expected[-1] == ends[2]
    assert ours.finished.tolist() == [True]


def test_demonstrations_end_as_the_chat_does(base: Path, tmp_path: Path, capsys: Any) -> None:
    rows = (
        {"messages": CHAT, "output_text": "Yes, it is."},
        {"input_text": "is it a cat?", "output_text": "Yes, it is."},
    )
    data = write(tmp_path / "rows.jsonl", *rows)
    trainer = SFTTrainer(SFTConfig(**settings(base, tmp_path / "a", dataset=data)))
    assert not any("warning" in line for line in trainer.describe())
    batch = trainer.next_batch()
    last = {row.tolist()[int(length) - 1] for row, length in zip(
        batch.responses.ids, batch.responses.lengths, strict=True
    )}  # fmt: skip
    assert last == {trainer.lm.layout.turn_end_id, trainer.lm.layout.eos_id}
    thinking = settings(base, tmp_path / "b", dataset=data, chat_template_options={})
    train_sft(SFTConfig(**thinking, eval_dataset=data, dry_run=True))
    said = capsys.readouterr().out
    assert said.count("warning: in 1 of the first 1 conversations") == 1
    wrong = settings(base, tmp_path / "c", dataset=data, chat_template_options={"thinking": False})
    with pytest.raises(InputError, match=r"chat_template_options\.thinking: .*enable_thinking"):
        train_sft(SFTConfig(**wrong))


def test_a_reward_model_scores_chats_as_it_was_trained(base: Path, tmp_path: Path) -> None:
    rows = [{"messages": CHAT, "chosen": "Yes.", "rejected": text} for text in ("No", "a", "the")]
    pairs = write(tmp_path / "pairs.jsonl", *rows)
    folder = tmp_path / "reward"
    config = RewardModelConfig(**settings(base, folder, preference_dataset=pairs))
    train_reward_model(config)
    record = json.loads((folder / RECORD_FILE).read_text())
    assert record["turn_end"] == END
    assert record["chat_template_options"] == {"enable_thinking": False}
    tokenizer = load_tokenizer(str(base))
    options = {"enable_thinking": False}
    renderer = PromptRenderer.for_tokenizer(tokenizer, None, options)
    check_reward_model(str(folder), renderer)
    with pytest.raises(
        InputError, match=r"chat_template_options \{'enable_thinking': False\}, but"
    ):
        check_reward_model(str(folder), PromptRenderer.for_tokenizer(tokenizer))
    check_reward_model(str(folder), PromptRenderer.for_tokenizer(tokenizer), conversations=False)

    def read_as(prompt: Any, text: str) -> float:
        """Score the ids that `apply_chat_template` gives, or those of plain text and EOS."""
        scorer = load_reward_model(str(folder), device="cpu", dtype="float32")
        assert isinstance(scorer, RewardModel)
        ids = (TokenBatch.from_lists([[tokenizer.convert_tokens_to_ids(t) for t in tokens]])
               for tokens in (tokenizer.tokenize(prompt), tokenizer.tokenize(text)))  # fmt: skip
        return float(scorer.score_tokens(*ids)[0])

    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "is it a cat?"}], tokenize=False, add_generation_prompt=True,
        **options,
    )  # fmt: skip
    prompts = [renderer.render(one) for one in (FIELDS, TEXT)]
    expected = [read_as(chat, f"Yes{END}"), read_as("is it a cat?", "Yes<|end|>")]
    classifier = load_reward_model(str(folder / "sequence_classifier"), device="cpu")
    for scorer in (load_reward_model(str(folder), device="cpu", dtype="float32"), classifier):
        found = scorer.score(prompts, ["Yes", "Yes"])
        if scorer is classifier:  # which knows no shift
            found = found - record["shift"]
        assert found.tolist() == pytest.approx(expected, abs=1e-5)
    cut = load_reward_model(str(folder), device="cpu").score(
        prompts, ["Yes"] * 2, finished=[False] * 2
    )
    assert cut.tolist() != pytest.approx(expected, abs=1e-5)
    rows = write(tmp_path / "rows.jsonl", {"messages": CHAT, "response": "Yes"})
    scored = ScoreConfig(
        reward_model_path=str(folder), dataset=rows, output=str(tmp_path / "scored"), device="cpu",
        dtype="float32",
    )  # fmt: skip
    run_score(scored)  # with the options of the training
    found = json.loads((tmp_path / "scored").read_text())["reward"]
    assert found == pytest.approx(expected[0], abs=1e-5)
    with pytest.raises(InputError, match=r"but they are \{'enable_thinking': True\}"):
        run_score(scored.model_copy(update={"chat_template_options": {"enable_thinking": True}}))
    # Trained before the end of a turn was recorded: chats ended in EOS.
    del record["turn_end"], record["chat_template_options"]
    (folder / RECORD_FILE).write_text(json.dumps(record))
    older = load_reward_model(str(folder), device="cpu", dtype="float32").score(
        prompts[:1], ["Yes"]
    )
    assert older.tolist() == pytest.approx([read_as(chat, "Yes<|end|>")], abs=1e-5)
    (folder / RECORD_FILE).write_text(json.dumps(record | {"turn_end": "<eot>"}))
    with pytest.raises(InputError, match="no token '<eot>'"):
        load_reward_model(str(folder), device="cpu")
    (folder / RECORD_FILE).write_text(json.dumps(record | {"chat_template_options": 3}))
    with pytest.raises(InputError, match="chat_template_options: expected a mapping"):
        load_reward_model(str(folder), device="cpu")


def test_a_template_without_an_end_leaves_everything_to_eos(base: Path) -> None:
    tokenizer = load_tokenizer(str(base))
    tokenizer.chat_template = CHATML.replace(END, "</turn>")
    config = StageConfig(base_model=str(base), output_dir="x", device="cpu")
    lm = load_language_model(config, trainable=False, tokenizer=tokenizer)
    assert lm.layout.turn_end_id is None
    assert tokenizer.convert_tokens_to_ids(END) not in lm.layout.eos_ids
