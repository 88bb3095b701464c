"""Scorers that are not ours: what classifiers read, and what callables may answer."""

import json
import random
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny import make_tokenizer, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    CamembertConfig,
    DebertaV2Config,
    EsmConfig,
    LlamaConfig,
    MPNetConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    XLMRobertaConfig,
)

from rlhf.config import StageConfig
from rlhf.data.schema import PromptText
from rlhf.errors import InputError
from rlhf.models.classifiers import SequenceClassifier, _longest
from rlhf.models.loading import load_language_model, read_model_config
from rlhf.models.reward_functions import RewardFn
from rlhf.models.saving import save_merged

WORDS = ["the", "cat", "sat", "on", "a", "mat"]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
POSITIONS = 20


def words_tokenizer(sep: str | None, after: str | None = "</s>") -> PreTrainedTokenizerFast:
    vocab = {word: id_ for id_, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["<s>", "$A", *([after] if after else [])],
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        pad_token="<pad>", sep_token=sep, cls_token="<s>" if sep else None,
    )  # fmt: skip


def small(kind: type, **fields: Any) -> Any:
    sizes = {
        "vocab_size": len(SPECIAL) + len(WORDS), "hidden_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 16, "num_labels": 1, "pad_token_id": 1,
        "max_position_embeddings": POSITIONS,
    }  # fmt: skip
    return kind(**sizes | fields)


CLASSES = {
    # configuration, most tokens: positions that count from PAD + 1 lose PAD + 1 of them
    "roberta": (lambda: small(RobertaConfig), POSITIONS - 2),
    "roberta, PAD 3": (lambda: small(RobertaConfig, pad_token_id=3), POSITIONS - 4),
    "xlm-roberta": (lambda: small(XLMRobertaConfig), POSITIONS - 2),
    "camembert": (lambda: small(CamembertConfig), POSITIONS - 2),
    "mpnet": (lambda: small(MPNetConfig), POSITIONS - 2),
    "esm": (
        lambda: small(EsmConfig, mask_token_id=4, position_embedding_type="absolute"),
        POSITIONS - 2,
    ),
    "bert": (lambda: small(BertConfig), POSITIONS),
    "deberta": (
        lambda: small(
            DebertaV2Config, relative_attention=True, max_relative_positions=-1,
            pos_att_type=["c2p"], position_biased_input=False,
        ),
        POSITIONS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
def test_long_rows_lose_as_much_as_the_positions_ask(name: str, tmp_path: Path) -> None:
    make, limit = CLASSES[name]
    torch.manual_seed(0)
    config = make()
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer = words_tokenizer("</s>")
    if config.pad_token_id == 3:
        tokenizer.pad_token = "<unk>"
    tokenizer.save_pretrained(tmp_path)
    scorer = SequenceClassifier(str(tmp_path))
    assert scorer.limit == limit
    text = "cat sat on a mat the " * 8
    scores = scorer.score([PromptText(text, ()), PromptText("a ", ())], ["the cat", "mat"])
    own = tokenizer(text + "the cat", add_special_tokens=False).input_ids
    whole = torch.tensor([[0, *own[2 - limit :], 2]])
    assert whole.shape == (1, limit)
    expected = model(whole, attention_mask=torch.ones_like(whole)).logits[0, 0].detach()
    torch.testing.assert_close(scores[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [LlamaConfig, RobertaConfig, BertConfig])
def test_scores_in_bfloat16_are_told_apart(kind: type, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(small(kind, hidden_size=64))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("score.weight", "classifier.weight", "out_proj.weight")):
                weight.normal_()
    model.save_pretrained(tmp_path)
    words_tokenizer("</s>").save_pretrained(tmp_path)
    generator = random.Random(1)
    texts = {" ".join(generator.choices(WORDS, k=12)) for _ in range(300)}
    prompts = [PromptText("the ", ())] * len(texts)
    exact, scores = (
        SequenceClassifier(str(tmp_path), dtype=dtype).score(prompts, sorted(texts))
        for dtype in (torch.float32, torch.bfloat16)
    )
    # Rounded to bfloat16 at most half of them are different.
    assert len(exact.bfloat16().unique()) < 0.5 * len(texts)
    assert len(scores.unique()) > 0.95 * len(texts)


def test_a_model_without_positions_has_no_limit() -> None:
    config = small(
        DebertaV2Config, relative_attention=True, pos_att_type=["c2p"], position_biased_input=False
    )
    model = AutoModelForSequenceClassification.from_config(config)
    model.config.max_position_embeddings = -1
    assert _longest(model, words_tokenizer("</s>")) is None


@pytest.mark.parametrize("sep", [None, "</s>"])
def test_a_cut_response_gets_no_eos_but_its_separator(tmp_path: Path, sep: str | None) -> None:
    torch.manual_seed(1)
    kind, fields = (LlamaConfig, {"eos_token_id": 2, "bos_token_id": 0}) if sep is None else (
        RobertaConfig, {}
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(small(kind, **fields)).eval()
    model.save_pretrained(tmp_path)
    tokenizer = words_tokenizer(sep)
    tokenizer.save_pretrained(tmp_path)
    prompts, answers = [PromptText("the cat", ())] * 3, [" sat", " sat", " on a mat"]
    scores = SequenceClassifier(str(tmp_path)).score(
        prompts, answers, finished=[True, False, False]
    )
    for prompt, answer, ended, score in zip(prompts, answers, [1, 0, 0], scores, strict=True):
        ids = tokenizer(prompt.text + answer).input_ids
        assert ids[-1] == 2
        if sep is None and not ended:
            ids = ids[:-1]
        expected = model(torch.tensor([ids])).logits[0, 0].detach()
        torch.testing.assert_close(score, expected, rtol=0, atol=1e-5)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    config = small(BertConfig, vocab_size=8)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    words_tokenizer("</s>").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="ids up to 10, the model only 8 embeddings"):
        SequenceClassifier(str(tmp_path))


# --- special ids without an embedding ------------------------------------------------------------


@pytest.mark.parametrize("field", ["eos_token_id", "bos_token_id", "pad_token_id"])
@pytest.mark.parametrize("where", ["config", "generation_config"])
@pytest.mark.parametrize("value", [120, 10**6, [2, 500], -5])
def test_ids_outside_the_vocabulary_are_named(
    arch: str, field: str, where: str, value: Any, tmp_path: Path
) -> None:
    if field != "eos_token_id" and isinstance(value, list):
        value = 500
    model, tokenizer = tiny_model(arch), make_tokenizer(arch)
    setattr(getattr(model, where), field, value)
    config = StageConfig(base_model="tiny", output_dir="unused", device="cpu")
    wrong = value[1] if isinstance(value, list) else value
    message = rf"{where}: {field} is {wrong}, expected a token id from 0 to 119"
    with pytest.raises(InputError, match=message):
        load_language_model(config, trainable=False, model=model, tokenizer=tokenizer)


def test_ids_outside_the_vocabulary_are_named_before_weights(arch: str, tmp_path: Path) -> None:
    model = tiny_model(arch)
    model.generation_config.eos_token_id = [1, 999]
    if arch == "t5":
        model.config.decoder_start_token_id = 4000
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError) as caught:
        read_model_config(str(tmp_path))
    said = "\n".join(caught.value.problems)
    assert "generation_config.json: eos_token_id is 999" in said
    assert ("config.json: decoder_start_token_id is 4000" in said) == (arch == "t5")


def test_old_llama_configurations_have_minus_one_for_none(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    for name in ("config.json", "generation_config.json"):
        file = tmp_path / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token_id": -1}))
    make_tokenizer("llama").save_pretrained(tmp_path)
    assert read_model_config(str(tmp_path)).pad_token_id == -1
    config = StageConfig(base_model=str(tmp_path), output_dir="unused", device="cpu")
    lm = load_language_model(config, trainable=False)
    save_merged(lm, None, tmp_path / "merged")
    assert read_model_config(str(tmp_path / "merged")).pad_token_id == -1


# --- callables -----------------------------------------------------------------------------------


class Awkward:
    def __float__(self) -> float:
        raise RuntimeError("no number today")


def fails(prompts: list[str], responses: list[str]) -> list[float]:
    return [1 / len(text.strip()) for text in responses]


def late() -> Iterator[float]:
    yield 1.0
    raise KeyError("later")


GOOD: dict[str, Any] = {
    "numbers": [1, 2.5],
    "bools": [True, False],
    "tuple": (0.5, -1),
    "array": np.array([0.5, -1.0], np.float16),
    "tensor": torch.tensor([0.5, -1.0], requires_grad=True),
    "column": torch.tensor([[0.5], [-1.0]]),
    "tensors": [torch.tensor(0.5), torch.tensor(-1)],
    "generator": (x for x in (0.5, -1.0)),
}
BAD: dict[str, tuple[Any, str]] = {
    "huge": ([1.0, 10**400], "a number of hundreds of digits for response 1, 'second'"),
    "beyond float32": ([1e39, 1.0], r"returned 1e\+39 for response 0, 'first'"),
    "nan": (np.array([np.nan, 1.0]), "returned nan for response 0"),
    "infinite": (torch.tensor([0.0, -torch.inf]), "returned -inf for response 1"),
    "none": ([None, 1.0], "expected a list of numbers, got NoneType for response 0"),
    "text": (["1.5", "2"], "expected a list of numbers, got str for response 0"),
    "one text": ("12", "expected a list of numbers, got str"),
    "bytes": (b"12", "expected a list of numbers, got bytes"),
    "mapping": ({"a": 1.0, "b": 2.0}, "expected a list of numbers, got dict"),
    "set": ({1.0, 2.0}, "expected a list of numbers, got set"),
    "nothing": (None, "expected a list of numbers, got NoneType"),
    "a scalar": (torch.tensor(1.0), "got a single one of type Tensor"),
    "a matrix": (torch.ones(2, 3), "expected a list of numbers, got Tensor for response 0"),
    "complex": ([1j, 1.0], "expected a list of numbers, got complex for response 0"),
    "objects": ([Awkward(), 1.0], "expected a list of numbers, got Awkward for response 0"),
    "too few": ([1.0], "returned 1 scores for 2 responses"),
    "too many": ([1.0] * 3, "returned more scores for 2 responses"),
    "no end": (count(), "returned more scores for 2 responses"),
    "late error": (late(), r"raised KeyError: 'later' \(line \d+ of .*test_scorers.py, in late\)"),
}


def ask(function: Any) -> torch.Tensor:
    return RewardFn(function).score([PromptText("a", ()), PromptText("b", ())], ["first", "second"])


@pytest.mark.parametrize("kind", GOOD)
def test_what_a_reward_function_may_return(kind: str) -> None:
    expected = {"numbers": [1.0, 2.5], "bools": [1.0, 0.0]}.get(kind, [0.5, -1.0])
    assert ask(lambda prompts, responses: GOOD[kind]).tolist() == expected


@pytest.mark.parametrize("kind", BAD)
def test_what_a_reward_function_may_not_return(kind: str) -> None:
    answer, message = BAD[kind]

    def scorer(prompts: list[str], responses: list[str]) -> Any:
        return answer

    with pytest.raises(InputError, match=f"reward_fn scorer: .*{message}"):
        ask(scorer)


def test_an_error_in_a_reward_function_is_named_with_its_place() -> None:
    with pytest.raises(InputError) as caught:
        RewardFn(fails).score([PromptText("a", ())], [" "])
    assert "reward_fn fails: raised ZeroDivisionError: division by zero" in str(caught.value)
    assert "test_scorers.py, in " in str(caught.value)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
