"""What stands around a prompt is what its tokenizer adds, so plain transformers continues alike."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.tiny import make_tokenizer, randomize_lora, tiny_model
from tokenizers import pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from rlhf.config import InferenceConfig, LoRAConfig, StageConfig
from rlhf.data.prompt_codec import PromptCodec
from rlhf.data.prompts import PromptRenderer
from rlhf.data.schema import Message, PromptFields
from rlhf.data.special_tokens import added_ids, save_tokenizer
from rlhf.inference.before_and_after import load_models
from rlhf.models.families import FAMILIES
from rlhf.models.generation import generate
from rlhf.models.loading import load_language_model
from rlhf.models.policy_folder import find_policy
from rlhf.models.saving import save_adapter, save_merged

TEXTS = ["the cat sat", "post: a dog ran [summary", "x"]
NEW_TOKENS = 8


def around(arch: str, before: str = "", after: str = "") -> PreTrainedTokenizerFast:
    """A tokenizer that puts these tokens around a text by its post-processor."""
    tokenizer = make_tokenizer(arch)
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (before, after) if token]
    single = [token for token in (before, "$A", after) if token]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=ids
    )
    return tokenizer


def flagged(**flags: bool) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer("llama")
    for name, value in flags.items():
        setattr(tokenizer, name, value)
    return tokenizer


def without_bos() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer("llama")
    tokenizer.bos_token = None
    return tokenizer


KINDS: dict[str, tuple[str, Any, tuple[int, ...]]] = {
    # family, tokenizer, ids before a prompt
    "llama adds BOS": ("llama", lambda: around("llama", "<s>"), (1,)),
    "llama names BOS and adds none": ("llama", lambda: make_tokenizer("llama"), ()),
    "llama has no BOS": ("llama", without_bos, ()),
    "llama add_bos_token": ("llama", lambda: flagged(add_bos_token=True), (1,)),
    "llama adds EOS": ("llama", lambda: around("llama", "", "</s>"), ()),
    "llama adds both": (
        "llama",
        lambda: flagged(add_bos_token=True, add_eos_token=True),
        (1,),
    ),
    "t5 adds EOS": ("t5", lambda: around("t5", "", "</s>"), ()),
    "t5 adds nothing": ("t5", lambda: make_tokenizer("t5"), ()),
    "t5 adds both": ("t5", lambda: around("t5", "<unk>", "</s>"), (2,)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_plain_transformers_continues_as_inference_does(kind: str, tmp_path: Path) -> None:
    arch, build, prefix = KINDS[kind]
    base = tmp_path / "base"
    model = tiny_model(arch)
    model.generation_config.eos_token_id = [model.config.eos_token_id, 40]
    model.save_pretrained(base)
    build().save_pretrained(base)
    # A checkpoint's own habits of sampling are not what was trained.
    habits = {"repetition_penalty": 5.0, "do_sample": True, "top_k": 3, "temperature": 5.0}
    path = base / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | habits))
    save_policy(base, tmp_path / "policy")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"input_text": text}) + "\n" for text in TEXTS))
    config = InferenceConfig(
        policy_path=str(tmp_path / "policy"), base_model=str(base), eval_dataset=str(data),
        output_dir=str(tmp_path / "out"), device="cpu", dtype="float32",
        prompt_sequence_length=48, target_sequence_length=NEW_TOKENS,
    )  # fmt: skip
    models = load_models(config, find_policy(config.policy_path))
    assert models.codec.layout.prefix_ids == prefix
    # The five lines of the README.
    auto = AutoModelForSeq2SeqLM if arch == "t5" else AutoModelForCausalLM
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy" / "merged")
    plain = auto.from_pretrained(tmp_path / "policy" / "merged")
    renderer = PromptRenderer()
    for text in TEXTS:
        prompt = models.codec.prompts([renderer.render(PromptFields(text, (), None))])
        with models.tuned.using(models.adapter):
            ours = generate(models.tuned, prompt, max_new_tokens=NEW_TOKENS, temperature=0.0)
        ids = tokenizer(text, return_tensors="pt").input_ids
        assert ids[0].tolist() == prompt.tolists()[0]
        output = plain.generate(ids, max_new_tokens=NEW_TOKENS)[0].tolist()
        expected = output[1:] if arch == "t5" else output[ids.shape[1] :]
        assert ours.responses.tolists()[0] == expected


def save_policy(base: Path, folder: Path) -> None:
    """Adapter and merged model, with the base's own tokenizer and generation configuration."""
    config = StageConfig(base_model=str(base), output_dir="unused", device="cpu", dtype="float32")
    lm = load_language_model(config, trainable=False)
    lm.add_adapter("policy", LoRAConfig(rank=4))
    randomize_lora(lm, "policy", std=0.3)
    save_adapter(lm, "policy", folder / "adapter")
    save_merged(lm, "policy", folder / "merged")


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_adds_what_it_is_told(kind: str, tmp_path: Path) -> None:
    _, build, _ = KINDS[kind]
    tokenizer = build()
    eos = tokenizer.eos_token_id
    before = tokenizer("the cat").input_ids
    for prefix, suffix in (((), ()), ((2,), ()), ((), (eos,)), ((2,), (eos,))):
        folder = tmp_path / f"{len(prefix)}{len(suffix)}"
        save_tokenizer(tokenizer, prefix, suffix, folder)
        loaded = AutoTokenizer.from_pretrained(folder)
        bare = tokenizer("the cat", add_special_tokens=False).input_ids
        assert loaded("the cat").input_ids == [*prefix, *bare, *suffix]
        assert added_ids(loaded) == (prefix, suffix)
        assert loaded.eos_token_id == eos
    assert tokenizer("the cat").input_ids == before  # the one given stays as it was


TURNS = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}:"
WITH_BOS = "{{ bos_token }}" + TURNS


def scheme_first() -> PreTrainedTokenizerFast:
    """As Mistral's: a space before the text's beginning only, and what follows BOS is none."""
    tokenizer = make_tokenizer("llama")
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.add_bos_token = True
    return tokenizer


@pytest.mark.parametrize("template", [TURNS, WITH_BOS])
@pytest.mark.parametrize(
    "build", [*(build for arch, build, _ in KINDS.values() if arch == "llama"), scheme_first]
)
def test_conversations_are_what_apply_chat_template_makes(template: str, build: Any) -> None:
    tokenizer = build()
    if tokenizer.bos_token is None and template == WITH_BOS:
        return
    tokenizer.chat_template = template
    renderer = PromptRenderer.for_tokenizer(tokenizer)
    turns = (Message("user", "the cat sat"), Message("assistant", "a"), Message("user", "dog <s>?"))
    prompt = renderer.render(PromptFields(None, turns, None))
    layout = FAMILIES["llama"].prompt_layout(tokenizer)
    messages = [{"role": turn.author, "content": turn.content} for turn in turns]
    messages[-1]["content"] = "dog ?"  # special tokens of the user's are text with us alone
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True).input_ids
    messages = [Message(turn.author, turn.content.replace(" <s>", " ")) for turn in turns]
    plain = renderer.render(PromptFields(None, tuple(messages), None))
    codec = PromptCodec(tokenizer, layout, 64, 8)
    assert codec.prompt_ids(plain) == expected
    bos = tokenizer.bos_token_id
    ids = codec.prompt_ids(prompt)
    assert ids.count(bos) == (template == WITH_BOS)
    # A shortened one keeps its BOS and its scaffolding, and no more than fits.
    limit = len(ids) - 5
    short = PromptCodec(tokenizer, layout, limit, 8).prompt_ids(prompt)
    assert len(short) == limit
    assert short.count(bos) == (template == WITH_BOS)
    assert codec.prompt_lengths([prompt]) == [len(ids)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompt_without_bos_is_never_shortened_to_nothing(side: str) -> None:
    tokenizer = make_tokenizer("llama")  # spells "3" as a space and a digit over one character
    layout = FAMILIES["llama"].prompt_layout(tokenizer)
    prompt = PromptRenderer().render(PromptFields("3", (), None))
    own = tokenizer("3").input_ids
    assert len(own) == 2
    kept = own[1:] if side == "left" else own[:1]
    assert PromptCodec(tokenizer, layout, 1, 8, side).prompt_ids(prompt) == kept
