"""The server of tuned models, over HTTP on loopback, against plain transformers."""

import http.client
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chats import THINKING, chat_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

import rlhf
from rlhf.errors import InputError
from rlhf.quickstart.corpus import make_post
from rlhf.quickstart.run import ASSETS
from rlhf.vertex.serve import LARGEST_REQUEST, Predictor, make_server

LIMIT = 12
# The quickstart's models: they answer with words, of which the likeliest is far ahead.
PROMPTS = [make_post(random.Random(number)).text for number in range(3)]


@pytest.fixture(params=["t5", "llama"])
def folder(request: pytest.FixtureRequest) -> Path:
    return ASSETS / f"toy_{request.param}"


@pytest.fixture
def server(folder: Path) -> Iterator[Any]:
    served = make_server(
        Predictor(str(folder), 200, LIMIT, dtype="float32"), ("127.0.0.1", 0), ("/h", "/p")
    )
    threading.Thread(target=served.serve_forever, args=(0.01,), daemon=True).start()
    yield served
    served.shutdown()
    served.server_close()


def ask(server: Any, method: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request(method, path, body)
    answer = connection.getresponse()
    content = json.loads(answer.read())
    connection.close()
    return answer.status, content


def predict(server: Any, *prompts: str, **parameters: Any) -> tuple[int, Any]:
    request = {"instances": [{"inputs": prompt} for prompt in prompts], "parameters": parameters}
    return ask(server, "POST", "/p", json.dumps(request).encode())


def by_transformers(folder: Path, prompt: str, limit: int) -> str:
    """Greedy decoding with nothing of ours: the model card's lines."""
    config = AutoConfig.from_pretrained(folder)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    made = model.generate(ids, max_new_tokens=limit, do_sample=False)[0]
    if config.is_encoder_decoder:
        return tokenizer.decode(made, skip_special_tokens=True)
    whole = tokenizer.decode(made, skip_special_tokens=True)
    return whole.removeprefix(tokenizer.decode(ids[0], skip_special_tokens=True))


def test_predictions_are_those_of_plain_transformers(server, folder):
    expected = [by_transformers(folder, prompt, LIMIT) for prompt in PROMPTS]
    assert len(set(expected)) > 1
    status, answer = predict(server, *PROMPTS)
    assert status == 200
    assert [text.strip() for text in answer["predictions"]] == [text.strip() for text in expected]
    _, shorter = predict(server, PROMPTS[0], max_new_tokens=3.0)  # JSON of gcloud may have doubles
    assert shorter["predictions"][0].strip() == by_transformers(folder, PROMPTS[0], 3).strip()


def test_sampling_follows_its_seed(server):
    _, one = predict(server, *PROMPTS, temperature=1.0, seed=1)
    _, same = predict(server, *PROMPTS, temperature=1.0, seed=1)
    others = [predict(server, *PROMPTS, temperature=1.0, seed=seed)[1] for seed in range(2, 6)]
    assert one == same
    assert any(other != one for other in others)


def test_health_and_strings_and_no_instances(server):
    assert ask(server, "GET", "/h") == (200, {})
    assert ask(server, "GET", "/x")[0] == ask(server, "POST", "/x", b"{}")[0] == 404
    assert predict(server) == (200, {"predictions": []})
    plain = json.dumps({"instances": [PROMPTS[0]]}).encode()
    assert ask(server, "POST", "/p", plain) == predict(server, PROMPTS[0])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "line 1"),
        (b"[" * 100_000, ""),
        (b"\xff", ""),
        (b"[]", "expected {"),
        (b'{"instances": "x"}', "expected {"),
        (b'{"instances": [{"inputs": ""}]}', "instances[0]: expected"),
        (b'{"instances": ["a", {"text": "b"}]}', "instances[1]: expected"),
        (b'{"instances": ["a"], "parameters": [1]}', "parameters: expected an object"),
        (b'{"instances": ["a"], "parameters": {"top_p": 1}}', "parameters: unknown top_p"),
        (b'{"instances": ["a"], "parameters": {"max_new_tokens": 13}}', "expected 1 to 12, got 13"),
        (b'{"instances": ["a"], "parameters": {"max_new_tokens": true}}', "expected 1 to 12"),
        (b'{"instances": ["a"], "parameters": {"max_new_tokens": NaN}}', "expected 1 to 12"),
        (b'{"instances": ["a"], "parameters": {"temperature": -1}}', "temperature: expected"),
        (b'{"instances": ["a"], "parameters": {"temperature": Infinity}}', "temperature: expected"),
        (b'{"instances": ["a"], "parameters": {"seed": 0.5}}', "seed: expected a whole number"),
    ],
)
@pytest.mark.parametrize("folder", ["t5"], indirect=True)
def test_a_wrong_request_is_named_and_the_server_goes_on(server, body, said):
    status, answer = ask(server, "POST", "/p", body)
    assert status == 400
    assert said in answer["error"]
    assert predict(server, PROMPTS[0])[0] == 200


@pytest.mark.parametrize("folder", ["t5"], indirect=True)
def test_a_request_that_is_too_large_is_not_read(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.putrequest("POST", "/p")
    connection.putheader("Content-Length", str(LARGEST_REQUEST + 1))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a LLaMA whose template, as Qwen3's, can write empty thoughts before an answer."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = chat_tokenizer(THINKING)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 8, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}])
def test_a_conversation_goes_through_the_chat_template(
    chat: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = Predictor(str(chat), 200, 4, dtype="float32")
    turns = [
        {"role": "system", "content": "the cat"},
        {"role": "user", "content": "is it a dog?"},
    ]
    plain = AutoTokenizer.from_pretrained(chat)
    expected = plain.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=False, **options,
    )  # fmt: skip
    seen = []
    generator = predictor.generator

    def watch(lm: Any, prompts: Any, **rest: Any) -> Any:
        seen.append(prompts.ids[0].tolist())
        return generator(lm, prompts, **rest)

    monkeypatch.setattr(predictor, "generator", watch)
    request = {"instances": [{"messages": turns}], "parameters": {"chat_template_options": options}}
    assert len(predictor.predict(request)) == 1
    assert seen == [expected]


@pytest.mark.parametrize(
    ("instance", "options", "said"),
    [
        ({"messages": "hi"}, {}, "instances[0]: messages: is the text"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, {}, "instances[0]: messages[0]"),
        ({"messages": [{"role": "user", "content": "a"}], "inputs": "a"}, {}, "got both"),
        ("a", {"thinking": False}, "did you mean `enable_thinking`"),
        ("a", [], "chat_template_options: expected an object"),
    ],
)
def test_a_wrong_conversation_is_named(chat: Path, instance: Any, options: Any, said: str) -> None:
    request = {"instances": [instance], "parameters": {"chat_template_options": options}}
    with pytest.raises(InputError) as caught:
        Predictor(str(chat), 200, 4).predict(request)
    assert said in str(caught.value)


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_what_goes_wrong_inside_is_answered_too(folder, monkeypatch, capsys):
    predictor = Predictor(str(folder), 200, LIMIT)

    def fails(_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(predictor, "predict", fails)
    served = make_server(predictor, ("127.0.0.1", 0), ("/h", "/p"))
    threading.Thread(target=served.serve_forever, args=(0.01,), daemon=True).start()
    assert predict(served, PROMPTS[0]) == (500, {"error": "OutOfMemoryError"})
    assert "CUDA out of memory" in capsys.readouterr().err
    served.shutdown()
    served.server_close()


@pytest.mark.parametrize("folder", ["t5"], indirect=True)
def test_the_command_serves_where_vertex_says_and_ends_when_asked(folder):
    env = {
        **os.environ,
        "PYTHONPATH": str(Path(rlhf.__file__).parents[1]),
        "AIP_STORAGE_URI": str(folder),
        "AIP_HTTP_PORT": "0",  # any free one; it is said
        "AIP_HEALTH_ROUTE": "/v1/health",
        "AIP_PREDICT_ROUTE": "/v1/predict",
    }
    command = [sys.executable, "-m", "rlhf.vertex.serve", "--target_sequence_length", "8"]
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = next(line for line in process.stderr if "serving" in line)
        port = int(said.split(" on port ")[1].split(",")[0])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/v1/health")
        assert connection.getresponse().status == 200
        connection.close()
        process.terminate()
        assert process.wait(60) == 0


def test_wrong_models_are_one_clear_error(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(Path(rlhf.__file__).parents[1])}
    env.pop("AIP_STORAGE_URI", None)
    for flags, said in (
        ([], "no AIP_STORAGE_URI"),
        (["--model", str(tmp_path)], str(tmp_path)),
        (["--model", "x", "--target_sequence_length", "0"], "target_sequence_length"),
    ):
        command = [sys.executable, "-m", "rlhf.vertex.serve", *flags]
        found = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert found.returncode == 2
        assert said in found.stderr
        assert "Traceback" not in found.stderr
