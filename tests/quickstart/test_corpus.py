"""The built-in corpus: what its files promise, and the gold reward by hand-worked examples."""

import json
import random
import statistics

import pytest

from rlhf.quickstart import corpus

POST = (
    "So Peter from work painted a blanket. Please be kind. Now I am lonely. What would you do? "
    "I live in Havana. It was last October. Sorry for my English. [summary]:"
)


def read(folder, name):
    lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    corpus.write_corpus(folder, seed=3, sizes=corpus.CorpusSizes(600, 600, 600, 300))
    return folder


@pytest.mark.parametrize(
    ("summary", "reward"),
    [
        (" Peter painted a blanket in Havana last October and felt lonely.", 6.0),
        (" Peter painted a thing.", 2.0),
        (" Peter PETER peter, Peter!", 1.0),
        (" Anna painted a blanket.", 2.0 - 1.0),
        (" Anna sold a lamp in Rome.", 4 * -1.0),
        (" word" * 16, 0.0),
        (" word" * 18, 2 * -0.15),
        ("", 0.0),
        (" \n\t]]{}é\x00", 0.0),
    ],
)
def test_gold_reward_counts_facts_covered_facts_invented_and_words_over_budget(summary, reward):
    assert corpus.gold_reward(POST, summary) == pytest.approx(reward)


def test_every_value_belongs_to_one_slot_and_to_no_other_sentence():
    values = [value.lower() for values in corpus.FACTS.values() for value in values]
    assert len(values) == len(set(values))
    rng = random.Random(0)
    for _ in range(500):
        post = corpus.make_post(rng)
        assert corpus.facts_in(post.text) == {value.lower() for value in post.facts.values()}


def test_a_careful_summary_tells_every_fact_and_nothing_else():
    rng = random.Random(1)
    for _ in range(200):
        post = corpus.make_post(rng)
        summary = corpus.write_summary(rng, post.facts, corpus.CAREFUL)
        assert corpus.facts_in(summary) == corpus.facts_in(post.text)
        assert len(summary.split()) <= corpus.WORD_BUDGET + 2


def test_demonstrations_leave_room_for_two_standard_deviations(folder):
    def gold(row, summary):
        return corpus.gold_reward(row["input_text"], summary)

    demonstrations = [gold(row, row["output_text"]) for row in read(folder, "sft")]
    ideal = [gold(row, row["output_text"][0]) for row in read(folder, "eval")]
    room = statistics.mean(ideal) - statistics.mean(demonstrations)
    assert room > 1.8 * statistics.stdev(demonstrations)


def test_held_out_posts_are_in_no_other_file_of_any_seed(folder, tmp_path):
    corpus.write_corpus(tmp_path, seed=4, sizes=corpus.CorpusSizes(600, 600, 600, 300))
    held_out = {row["input_text"] for place in (folder, tmp_path) for row in read(place, "eval")}
    for place in (folder, tmp_path):
        for name in ("sft", "preferences", "prompts"):
            assert not held_out & {row["input_text"] for row in read(place, name)}


def test_the_annotator_is_noisy_as_bradley_and_terry_say(folder):
    rows = read(folder, "preferences")
    better = [
        row["choice"] if gain > 0 else 1 - row["choice"]
        for row in rows
        if (gain := _gold_gain(row))
    ]
    share = sum(better) / len(better)
    allowed = corpus.allowed_accuracy([row for row in rows if _gold_gain(row)])
    assert 0.8 < allowed < 0.95
    assert share == pytest.approx(allowed, abs=0.05)  # 3 standard errors of 550 labels
    assert corpus.preference_probability(POST, " Peter.", " Anna.") == pytest.approx(
        1 / (1 + 2.718281828 ** (1.25 * 2.0))
    )


def _gold_gain(row):
    golds = [corpus.gold_reward(row["input_text"], row[f"candidate_{i}"]) for i in (0, 1)]
    return golds[1] - golds[0]


def test_rows_have_the_documented_form(folder):
    for name in ("sft", "preferences", "prompts", "eval"):
        rows = read(folder, name)
        assert len({row["input_text"] for row in rows}) == len(rows)
        for row in rows:
            assert row["input_text"].endswith(corpus.CUE)
            candidates = [row[key] for key in ("candidate_0", "candidate_1") if key in row]
            outputs = row.get("output_text", [])
            outputs = [outputs] if isinstance(outputs, str) else outputs
            assert all(text.startswith(" ") for text in candidates + outputs)


def test_the_same_seed_writes_the_same_bytes_and_another_does_not(tmp_path):
    texts = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        corpus.main([str(tmp_path / name), "--seed", str(seed), "--sft", "20", "--eval", "10"])
        texts.append([path.read_bytes() for path in sorted((tmp_path / name).iterdir())])
    assert texts[0] == texts[1]
    assert all(one != other for one, other in zip(texts[0], texts[2], strict=True))
