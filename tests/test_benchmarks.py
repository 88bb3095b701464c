"""The benchmarks' own machinery; no peer is installed and no time is judged."""

import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import flops
import machine
import report
from comparisons import COMPARISONS, Comparison, Side, ppo, quick
from rounds import compare
from shapes import MODELS, POST_TOKENS, QUANTILES, T5, Lengths, Llama, quantile
from worker import Session, run
from workers.watching import seconds_inside

FOLDER = Path(report.__file__).parent
LLAMA = Llama(hidden=64, layers=4, heads=4, kv_heads=2, ffn=96, vocab=200)
ENCODER_DECODER = T5(hidden=64, layers=4, heads=2, head_width=16, ffn=96, vocab=200)
PROMPT, RESPONSE = 12, 7


def make(model: Llama | T5) -> PreTrainedModel:
    if isinstance(model, Llama):
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=model.vocab, hidden_size=model.hidden, intermediate_size=model.ffn,
                num_hidden_layers=model.layers, num_attention_heads=model.heads,
                num_key_value_heads=model.kv_heads, attn_implementation="eager",
            )
        )  # fmt: skip
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=model.vocab, d_model=model.hidden, d_kv=model.head_width, d_ff=model.ffn,
            num_layers=model.layers, num_heads=model.heads, dropout_rate=0.0,
            decoder_start_token_id=0, attn_implementation="eager",
        )
    )  # fmt: skip


def states(module: PreTrainedModel, prompt: torch.Tensor, response: torch.Tensor) -> torch.Tensor:
    """What the LM head reads of a response; (1, R, D)."""
    if module.config.is_encoder_decoder:
        encoded = module.encoder(prompt).last_hidden_state
        return module.decoder(response, encoder_hidden_states=encoded).last_hidden_state
    joined = torch.cat([prompt, response], dim=1)
    return module.model(joined, use_cache=False).last_hidden_state[:, prompt.shape[1] :]


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("model", [LLAMA, ENCODER_DECODER], ids=["llama", "t5"])
def test_flops_are_those_that_torch_counts(model: Llama | T5, rank: int) -> None:
    module = make(model)
    module.requires_grad_(False)
    if rank:
        names = list(model.block if isinstance(model, Llama) else model.attention)
        get_peft_model(module, LoraConfig(r=rank, target_modules=names))
    targets = tuple(model.block if isinstance(model, Llama) else model.attention)
    prompt, response = torch.ones(1, PROMPT, dtype=int), torch.ones(1, RESPONSE, dtype=int)
    with FlopCounterMode(display=False) as forward:
        logits = module.lm_head(states(module, prompt, response))
    expected = flops.pass_over(model, PROMPT, [RESPONSE], flops.Lora(rank, targets))
    # Eager attention computes the corner that a causal mask hides from the prompt.
    corner = 4.0 * model.inner * model.layers * PROMPT * RESPONSE * isinstance(model, Llama)
    assert forward.get_total_flops() == pytest.approx(expected.forward + corner, rel=0.005)
    if rank:
        with FlopCounterMode(display=False) as backward:
            logits.sum().backward()
        counted = forward.get_total_flops() + backward.get_total_flops()
        assert counted == pytest.approx(expected.training + 3 * corner, rel=0.02)


def test_a_prompt_that_two_responses_share_is_read_once() -> None:
    twice = flops.pass_over(LLAMA, 100, [10, 10]).forward
    once = flops.pass_over(LLAMA, 100, [10]).forward
    assert once < twice < 1.2 * once


def test_ppo_phases_follow_the_configuration() -> None:
    def phases(**changes: object) -> dict[str, float]:
        fields = {"critic": "adapter", "scorer": None, "reference": True, "epochs": 4} | changes
        return flops.ppo_phases(LLAMA, [(100, [10])], flops.Lora(8), **fields)

    assert phases()["score"] == 0 < phases(scorer=flops.Lora(8))["score"]
    assert phases(epochs=2)["update"] == phases()["update"] / 2
    assert phases(critic="head")["update"] < 0.6 * phases()["update"]
    assert phases(critic=None)["update"] == phases(critic="head")["update"]
    assert phases(reference=False)["experience"] < phases()["experience"]


@pytest.mark.parametrize("model", [LLAMA, ENCODER_DECODER], ids=["llama", "t5"])
def test_ppo_reads_a_prompt_once_per_group(model: Llama | T5) -> None:
    def phases(*groups: tuple[int, list[int]]) -> dict[str, float]:
        return flops.ppo_phases(
            model, groups, flops.Lora(8), critic="adapter", scorer=flops.Lora(8), reference=True,
            epochs=4,
        )  # fmt: skip

    together, alone = phases((100, [1] * 4)), phases(*[(100, [1])] * 4)
    for name, count in together.items():
        assert count < 0.3 * alone[name]  # a quarter, and the responses
    # Responses to different prompts share nothing.
    assert phases((30, [5, 6]), (40, [7]))["update"] == pytest.approx(
        phases((30, [5, 6]))["update"] + phases((40, [7]))["update"]
    )


def test_decoding_reads_weights_at_every_step() -> None:
    model = MODELS["llama_1b"]
    weights = 16 * (2048 * (2048 + 512 + 512 + 2048) + 3 * 2048 * 8192) + 2048 * 128256
    read = flops.decode_bytes(model, [(0, 1)], width=2)
    assert read == pytest.approx(2 * weights, rel=1e-3)
    assert flops.decode_bytes(model, [(512, 64)], 2) > 64 * read


def test_lengths_have_the_stated_quantiles() -> None:
    drawn = sorted(prompt for prompt, _ in Lengths(10_000, 10_000, real=True).draw(20_000))
    for level, expected in zip(QUANTILES[1:-1], POST_TOKENS[1:-1], strict=True):
        assert drawn[int(level * len(drawn))] == pytest.approx(expected, rel=0.05)
    assert quantile(POST_TOKENS, 0.0) == POST_TOKENS[0] <= drawn[0]
    assert quantile(POST_TOKENS, 1.0) == POST_TOKENS[-1] >= drawn[-1]
    limited = Lengths(512, 64, real=True).draw(1000)
    assert max(prompt for prompt, _ in limited) == 512
    assert max(response for _, response in limited) == 64
    assert limited == Lengths(512, 64, real=True).draw(1000)
    assert Lengths(128, 48).draw(2) == [(128, 48), (128, 48)]


def side_that(main: object, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(sys.modules, "a_side", SimpleNamespace(main=main))
    return "a_side"


def converse(
    main: object, commands: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, list[dict[str, object]]]:
    answers = io.StringIO()
    session = Session(answers, io.StringIO(commands))
    code = run(side_that(main, monkeypatch), {"threads": torch.get_num_threads()}, session)
    return code, [json.loads(line) for line in answers.getvalue().splitlines()]


def test_a_side_works_when_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    def main(spec: dict[str, object], session: Session) -> None:
        while True:
            done.append(spec["threads"])
            session.round_done({"update": 0.5}, {"dtype": "float32"})

    code, messages = converse(main, '{"do": "round"}\n{"do": "end"}\n', monkeypatch)
    assert code == 0
    assert len(done) == 2  # the warm-up and the round
    assert [message.get("phases") for message in messages] == [{"update": 0.5}] * 2 + [None]
    assert messages[0]["facts"] == {"dtype": "float32"}
    assert messages[-1]["peak_mib"] > 10
    assert converse(main, "", monkeypatch)[0] == 0  # a driver that died is an end too


def test_a_side_that_breaks_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def main(spec: dict[str, object], session: Session) -> None:
        raise RuntimeError("first line\nsecond line")

    code, messages = converse(main, "", monkeypatch)
    assert code == 1
    assert messages == [{"error": "RuntimeError: first line second line"}]


def test_calls_within_calls_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))

    class Base:
        def inner(self) -> None: ...

        def outer(self) -> None:
            self.inner()

    class Model(Base):
        pass

    def work() -> None:
        Model().outer()
        Model().inner()

    # A second between two looks at the clock: its own two, and two for each outermost call.
    assert seconds_inside(work, [(Model, "inner"), (Model, "outer")]) == (5, 2)
    assert "inner" not in vars(Model)


@pytest.mark.slow
def test_sides_take_turns_and_one_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    lora = {"rank": 2, "target_modules": ["q_proj", "v_proj"]}
    sides = {
        "broken": Side("workers.there_is_none"),
        "ours": ppo(2.0, lora=lora, kl_coeff=0.1),
        "generate": Side("workers.ours_generate", options={"dtype": "float32", "lora": None}),
    }
    lengths = Lengths(24, 8, real=True)
    comparison = Comparison("llama_toy", 4, lengths, sides, baseline="broken")
    entry = json.loads(json.dumps(compare(comparison, tmp_path, rounds=2, device="cpu", threads=1)))
    broken, ours, generate = entry["sides"].values()
    assert "there_is_none" in broken["error"]
    assert len(ours["rounds"]) == 2  # a side checks itself that responses were as long as told
    phases = ours["rounds"][0]["phases"]
    assert set(phases) == {"rollout", "score", "experience", "update"}
    assert set(ours["facts"]["flops"]) == set(phases)
    assert 0 < ours["facts"]["outside_model_calls"] < 1
    assert sum(phases.values()) <= ours["rounds"][0]["seconds"]
    assert ours["peak_mib"] > 100
    assert "error" not in generate
    rows = report.comparison_rows("name", entry)
    assert "there_is_none" in rows[0][2]
    assert rows[1][:2] == ["", "ours"]


@pytest.mark.parametrize("name", COMPARISONS)
def test_every_comparison_is_complete(name: str) -> None:
    comparison = COMPARISONS[name]
    assert comparison.baseline is None or comparison.baseline in comparison.sides
    assert comparison.model in MODELS
    for side in comparison.sides.values():
        assert (FOLDER / f"{side.module.replace('.', '/')}.py").is_file()
        per_prompt = side.options.get("config", {}).get("responses_per_prompt", 1)
        assert not side.module.endswith("ours_ppo") or per_prompt == comparison.responses_per_prompt
    assert comparison.batch % comparison.responses_per_prompt == 0
    assert quick(comparison).batch % comparison.responses_per_prompt == 0
    assert quick(comparison).model in MODELS


def a_side(seconds: list[float], peak: float, **more: object) -> dict[str, object]:
    rounds = [{"seconds": s, "phases": {"rollout": s / 4, "update": s / 2}} for s in seconds]
    side = {"rounds": rounds, "peak_mib": peak, "target": None, "ours": False, "facts": {}}
    return side | more


@pytest.fixture
def results() -> dict[str, object]:
    facts = {"dtype": "float32", "flops": {"update": 50e9}, "outside_model_calls": 0.0249}
    machine = {
        "date": "2030-01-02", "device": "an abacus", "instructions": "beads", "threads": 2,
        "bytes": 1e10,
        "flops": {"float32": 1e11, "bfloat16": 4e11}, "versions": {"torch": "2"},
    }  # fmt: skip
    main = {
        "machine": machine,
        "group": "main",
        "baseline": "peer",
        "sides": {
            "peer": a_side([8.0, 9.0, 20.0], 2048),
            "ours": a_side([4.0, 2.0, 3.0], 512, target=4.0, memory=0.4, ours=True, facts=facts),
            "lost": {"rounds": [], "error": "no luck", "target": 3.0, "ours": True},
        },
    }
    sizes = {"model": "llama_toy", "batch": 8, "lengths": {"prompt": 64, "response": 16}}
    scaling = {"group": "scaling", "baseline": None, **sizes}
    scaling["sides"] = {"defaults": a_side([1.0], 256, ours=True)}
    larger = scaling | {"batch": 16, "sides": {"defaults": a_side([2.5], 512, ours=True)}}
    comparisons = {"race": main, "scaling_base": scaling, "scaling_batch_16": larger}
    return {"machine": machine, "comparisons": comparisons}


def test_tables_say_what_was_measured(results: dict[str, object]) -> None:
    text = report.markdown(results)
    assert "an abacus (beads), 2 threads: matrix products 100 GFLOP/s in float32 and 400" in text
    assert "| race | peer | 9 (8 to 20) |  |  |  | 2.00 GiB |  |" in text
    # Medians 9 and 3; rounds 2, 4.5 and 6.7 times as fast; 512 of 2048 MiB.
    assert "|  | ours | 3 (2 to 4) | 3.00x | 4.50x | 4x | 0.50 GiB | 0.25x (target 0.4x) |" in text
    assert "|  | lost | failed: no luck |  |  |  |  |  |" in text
    # 50 GFLOP in a median of 1.5 s at 100 GFLOP/s; a quarter of each round is in no phase.
    assert "| race | ours | rollout | 0.75 s | 25 % |  |  |  |" in text
    assert "|  | ours | update | 1.5 s | 50 % | 50 | 33 % |  |" in text
    assert "|  | ours | overhead | 0.75 s | 25 % |  |  |  |" in text
    assert "|  | ours | outside model calls |  | 2.5 % |  |  |  |" in text
    row = "| llama_toy | 8 | 64 | 16 | 1 (1 to 1) | 1.00x | 0.25 | 0.00 | 0.00 | 0.50 | 0.25 GiB |"
    assert row in text
    assert "| llama_toy | 16 | 64 | 16 | 2.5 (2.5 to 2.5) | 2.50x | 0.62 | 0.00 |" in text


@pytest.mark.parametrize("section", ["cpu", "cpu-avx512", "cuda"])
def test_tables_go_between_the_markers_of_their_section(
    results: dict[str, object], section: str
) -> None:
    page = (FOLDER / "README.md").read_text()
    text = report.markdown(results)
    filled = report.insert(page, section, text)
    assert text in filled
    assert filled.startswith(page.split(f"<!-- {section}: begin -->")[0])
    assert filled.endswith(page.split(f"<!-- {section}: end -->")[1])
    assert report.insert(filled, section, text) == filled


def test_driver_needs_nothing_but_python() -> None:
    """What it imported would be inherited by no side, but would sit in memory beside them."""
    code = "import rounds, report, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=FOLDER, check=True)


def test_a_machine_is_known_by_its_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ATEN_CPU_CAPABILITY", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    has = {"avx2": True, "avx512_f": True, "avx512_bf16": True, "amx_bf16": False, "sse": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert machine.instructions() == "avx2 avx512_f avx512_bf16 ONEDNN_MAX_CPU_ISA=AVX2"
