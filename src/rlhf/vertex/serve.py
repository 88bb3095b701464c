"""A small server for a tuned T5 or LLaMA model that follows Vertex AI's endpoint protocol.

    python -m rlhf.vertex.serve [--model FOLDER] [--prompt_sequence_length N] ...

Answers `{"instances": [{"inputs": PROMPT}, …], "parameters": {…}}` with `{"predictions": [TEXT,
…]}` at the address given by the AIP_* variables. An instance may also be a conversation,
`{"messages": [{"role": "user", "content": TEXT}, …]}`, which goes through the chat template.
Decodes like `rlhf infer`, one request at a time. Meant for T5, which vLLM does not serve. For many
users of a LLaMA, vLLM is faster.
"""

import json
import os
import secrets
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import click
import torch

from rlhf.config.common import StageConfig
from rlhf.console import say
from rlhf.data.prompt_codec import PromptCodec
from rlhf.data.prompts import PromptRenderer
from rlhf.data.row_checker import RowChecker
from rlhf.data.schema import PromptText
from rlhf.errors import InputError, StoppedBySignal
from rlhf.models.generation import Generator, generate_in_chunks, rollout_uniforms
from rlhf.models.loading import check_limits, load_language_model, read_model_config
from rlhf.process import exit_code, quiet_third_parties

# Vertex accepts requests of up to 1.5 MB.
LARGEST_REQUEST = 1_500_000
ROWS_AT_ONCE = 16


class Predictor:
    """A tuned model that answers prompts.

    Args:
        folder: merged/, local or gs://.
        prompt_limit: Maximum tokens of a prompt; a longer one loses its beginning.
        response_limit: Maximum tokens of a response.
        dtype: auto, float32 or bfloat16.
        generator: What decodes; our own engine by default.

    Raises:
        InputError: If the checkpoint or the limits are wrong.
    """

    def __init__(
        self,
        folder: str,
        prompt_limit: int,
        response_limit: int,
        dtype: str = "auto",
        generator: Generator | None = None,
    ) -> None:
        problems = check_limits(read_model_config(folder), prompt_limit, response_limit)
        if problems:
            raise InputError(problems)
        config = StageConfig.model_validate(
            {"base_model": folder, "output_dir": ".", "dtype": dtype}
        )
        self.lm = load_language_model(config, trainable=False)
        self.limit = response_limit
        self.generator = generator or partial(generate_in_chunks, chunk_size=ROWS_AT_ONCE)
        self.codec = PromptCodec(self.lm.tokenizer, self.lm.layout, prompt_limit, response_limit)
        self._one_at_a_time = threading.Lock()

    @torch.no_grad()
    def predict(self, request: Any) -> list[str]:
        """Return a response for each instance of a request.

        Raises:
            InputError: If the request does not have the form given in the module docstring.
        """
        if not isinstance(request, dict) or not isinstance(request.get("instances"), list):
            raise InputError('expected {"instances": [{"inputs": "…"}]}')
        given = request.get("parameters")
        limit, temperature, seed, renderer = self._parameters({} if given is None else given)
        prompts = [_prompt(n, one, renderer) for n, one in enumerate(request["instances"])]
        if not prompts:
            return []
        with self._one_at_a_time:
            made = self.generator(
                self.lm,
                self.codec.prompts(prompts).to(self.lm.device),
                max_new_tokens=limit,
                temperature=temperature,
                uniforms=rollout_uniforms(seed, 0, range(len(prompts)), limit, "serving"),
            )
        rows = zip(made.responses.ids.tolist(), made.responses.lengths.tolist(), strict=True)
        return self.codec.decode_rows([ids[:length] for ids, length in rows])

    def _parameters(self, given: Any) -> tuple[int, float, int, PromptRenderer]:
        """Return maximum tokens, temperature (0 is greedy), seed, and what renders prompts."""
        if not isinstance(given, Mapping):
            raise InputError("parameters: expected an object")
        known = {"max_new_tokens", "temperature", "seed", "chat_template_options"}
        if unknown := set(given) - known:
            raise InputError(f"parameters: unknown {', '.join(sorted(map(str, unknown)))}")
        limit = given.get("max_new_tokens", self.limit)
        temperature = given.get("temperature", 0.0)
        seed = given.get("seed", secrets.randbelow(2**31))
        if not _number(limit) or limit != int(limit) or not 1 <= limit <= self.limit:
            raise InputError(f"max_new_tokens: expected 1 to {self.limit}, got {limit!r:.50}")
        if not _number(temperature) or not 0 <= temperature <= 100:
            raise InputError(f"temperature: expected 0 to 100, got {temperature!r:.50}")
        if not _number(seed) or seed != int(seed) or not 0 <= seed < 2**31:
            raise InputError(f"seed: expected a whole number from 0 on, got {seed!r:.50}")
        options = given.get("chat_template_options", {})
        if not isinstance(options, Mapping):
            raise InputError("chat_template_options: expected an object")
        renderer = PromptRenderer.for_tokenizer(self.lm.tokenizer, options=options)
        return int(limit), float(temperature), int(seed), renderer


def _number(value: Any) -> bool:
    # NaN does not count as a number: every comparison with it is false, int() of it fails.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**53


def _prompt(number: int, instance: Any, renderer: PromptRenderer) -> PromptText:
    if isinstance(instance, Mapping) and "messages" in instance:
        if "inputs" in instance:
            raise InputError(f"instances[{number}]: expected inputs or messages, got both")
        row = RowChecker({"messages": instance["messages"]})
        fields = row.prompt()
        if row.problems:
            raise InputError([f"instances[{number}]: {problem}" for problem in row.problems])
        try:
            return renderer.render(fields)
        except ValueError as error:
            raise InputError(f"instances[{number}]: messages: {error}") from error
    return renderer.render_text(_text(number, instance))


def _text(number: int, instance: Any) -> str:
    text = instance.get("inputs") if isinstance(instance, dict) else instance
    if not isinstance(text, str) or not text:
        raise InputError(f'instances[{number}]: expected {{"inputs": "…"}} with some text')
    return text


def make_server(predictor: Predictor, address: tuple[str, int], routes: tuple[str, str]) -> Any:
    """Return a server that has not been started.

    Args:
        predictor: Produces the answers.
        address: Host and port; port 0 picks a free one.
        routes: Paths for health and for predictions.
    """
    health, predictions = routes

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 60

        def do_GET(self) -> None:
            self._answer(*((200, {}) if self.path == health else (404, {"error": "not found"})))

        def do_POST(self) -> None:
            size = self.headers.get("Content-Length", "")
            if not size.isdecimal() or int(size) > LARGEST_REQUEST:
                self.close_connection = True  # the body was not read
                self._answer(413, {"error": f"expected at most {LARGEST_REQUEST} bytes"})
                return
            body = self.rfile.read(int(size))
            if self.path != predictions:
                self._answer(404, {"error": "not found"})
                return
            try:
                self._answer(200, {"predictions": predictor.predict(json.loads(body))})
            except (InputError, ValueError, RecursionError) as error:
                self._answer(400, {"error": str(error)})
            except Exception as error:  # such as out of memory; the next request may succeed
                say(f"a request failed: {error!r}")
                self._answer(500, {"error": type(error).__name__})

        def _answer(self, status: int, content: Any) -> None:
            text = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: Any) -> None:
            """Write nothing: prompts do not belong in logs."""

    server = ThreadingHTTPServer(address, Handler)
    server.daemon_threads = True
    return server


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", default="", help="merged/, local or gs://. Default: AIP_STORAGE_URI.")
@click.option("--prompt_sequence_length", default=512, show_default=True, type=click.IntRange(1))
@click.option("--target_sequence_length", default=64, show_default=True, type=click.IntRange(1))
def serve_command(model: str, prompt_sequence_length: int, target_sequence_length: int) -> None:
    """Serve a tuned model over HTTP."""
    folder = model or os.environ.get("AIP_STORAGE_URI", "")
    if not folder:
        raise InputError("model: is not given, and there is no AIP_STORAGE_URI")
    port = os.environ.get("AIP_HTTP_PORT", "8080")
    if not port.isdecimal() or int(port) > 65_535:
        raise InputError(f"AIP_HTTP_PORT: expected a port, got {port!r}")
    predictor = Predictor(folder, prompt_sequence_length, target_sequence_length)
    routes = (
        os.environ.get("AIP_HEALTH_ROUTE", "/health"),
        os.environ.get("AIP_PREDICT_ROUTE", "/predict"),
    )
    server = make_server(predictor, ("", int(port)), routes)
    say(f"serving {folder} on port {server.server_port}, {' and '.join(routes)}")
    server.serve_forever()


def main() -> int:
    """Serve until the process is stopped; return its exit code."""
    quiet_third_parties()

    def serve() -> None:
        with suppress(StoppedBySignal):  # the normal way for a server to end
            serve_command.main(standalone_mode=False)

    return exit_code(serve)


if __name__ == "__main__":
    sys.exit(main())
