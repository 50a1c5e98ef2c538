"""The numbers of a report are those counted by hand, the paper's stand beside them, and what is left out is named."""

import csv
import io
import json
from pathlib import Path

import pytest

from cluster.paper_numbers import BASE, NUMBERS, paper_number
from cluster.report_format import Measured, Table, csv_text, json_rows, markdown, over_seeds
from cluster.report_runs import Arm, RunGroup, build_arms, find_tested_step, group_runs, read_run, read_runs
from cluster.report_tables import (
    accuracy_table,
    mixture_by_index_table,
    mixture_table,
    out_of_domain_table,
    pass_at_k_table,
    settings_table,
)
from cluster.report_training import cost_table, find_studies, study_table, training_table
from configs.errors import InputError
from tests.cluster.evaluations import write_run

LLAMA = ["model.path=meta-llama/Llama-3.2-3B-Instruct", "task.train=gsm8k", "task.test=gsm8k:test"]
T, F = True, False
BASE_TEST = {"hard_greedy": [[F], [F]], "hard_sample": [[T, F], [F, F]]}


def step(seconds: float, tokens: float, **more: float) -> dict[str, float]:
    """A row of metrics.jsonl; 4,000 bytes of float32 weights are pushed."""
    row = {"time/step": seconds, "rollout/tokens": tokens, "learner/tokens": tokens, "push/bytes": 4000.0, "reward/mean": 40.0}
    return row | {key.replace("__", "/"): value for key, value in more.items()}


def grouped(runs: Path) -> tuple[list[RunGroup], list[Arm]]:
    groups, left_out = group_runs(read_runs(runs)[0])
    assert not left_out
    return groups, build_arms(groups)


# Runs and groups


def test_runs_are_one_group_when_only_the_seed_differs(tmp_path: Path) -> None:
    for mode in ("soft", "hard", "fuzzy"):
        for seed in (1, 0):
            write_run(tmp_path, f"{mode}{seed}", [f"policy.mode={mode}", f"run.seed={seed}"])
    write_run(tmp_path, "noisy", ["policy.gamma=1"])
    groups, _ = grouped(tmp_path)
    assert [(g.label, g.seeds) for g in groups] == [
        ("hard", "0, 1"),
        ("fuzzy", "0, 1"),
        ("soft, policy.gamma=0.33", "0, 1"),
        ("soft, policy.gamma=1.0", "0"),
    ]


def test_a_label_too_long_for_a_table_is_a_hash_that_tells_groups_apart(tmp_path: Path) -> None:
    for i in (1, 2):
        write_run(tmp_path, f"run{i}", [f"task.prompt={'worked example ' * 5} {i}: {{question}}", f"learner.lr={i}e-5"])
    groups, _ = grouped(tmp_path)
    assert all(len(group.label) == len("soft #123456") for group in groups) and groups[0].label != groups[1].label
    assert {group.differences[-14:] for group in groups} == {"learner.lr=1e-05"[-14:], "learner.lr=2e-05"[-14:]}
    assert groups[0].label_without("task.prompt") in ("soft, learner.lr=1e-05", "soft, learner.lr=2e-05")


def test_a_repeat_is_no_further_seed_and_is_named(tmp_path: Path) -> None:
    write_run(tmp_path, "a_longer", metrics=[step(1, 1)] * 3)
    write_run(tmp_path, "b_shorter", metrics=[step(1, 1)] * 2)
    write_run(tmp_path, "c_as_long", metrics=[step(1, 1)] * 3)
    (group,), left_out = group_runs(read_runs(tmp_path)[0])
    assert [run.folder.name for run in group.runs] == ["c_as_long"]
    assert [(run.name, run.reason) for run in left_out] == [
        ("b_shorter", "same settings and seed as a_longer"),
        ("a_longer", "same settings and seed as c_as_long"),
    ]


def test_a_run_that_cannot_be_read_is_named_and_the_others_are_reported(tmp_path: Path) -> None:
    write_run(tmp_path, "good")
    (write_run(tmp_path, "torn") / "config.yaml").write_text("policy: {mode: sotf}\n")
    (write_run(tmp_path, "ood") / "eval").mkdir()
    (tmp_path / "ood" / "eval" / "out_of_domain_000000.json").write_text('[{"dataset": "mmlu"}]')
    runs, left_out = read_runs(tmp_path)
    assert [run.folder.name for run in runs] == ["good"]
    assert [run.name for run in left_out] == ["ood", "torn"]
    assert "out_of_domain_000000.json: expected a list of objects with dataset, items, accuracy" in left_out[0].reason
    assert "config.yaml:1: policy.mode = sotf: expected" in left_out[1].reason


def test_a_folder_without_runs_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: no such folder; expected one that holds run folders"):
        read_runs(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"holds no runs; expected folders with a config.yaml"):
        read_runs(tmp_path)


def test_one_run_folder_is_a_folder_of_runs(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "only", metrics=[step(1, 1)])
    assert [run.folder for run in read_runs(folder)[0]] == [folder]


def test_the_result_is_the_test_of_the_best_checkpoint(tmp_path: Path) -> None:
    tests = {0: BASE_TEST, 4: {"hard_greedy": [[T], [F]]}, 6: {"hard_greedy": [[F], [F]]}}
    folder = write_run(tmp_path, "run", tests=tests)
    assert find_tested_step(folder) == 6
    (folder / "checkpoints" / "best").mkdir(parents=True)
    (folder / "checkpoints" / "best" / "controller.json").write_text('{"step": 4}')
    run = read_run(folder)
    assert run.tested_step == 4 and run.tests["gsm8k:test", "hard_greedy"].share == 0.5
    assert run.base_tests["gsm8k:test", "hard_sample"].share == 0.25
    untested = write_run(tmp_path, "untested", tests={0: BASE_TEST})
    (untested / "eval" / "test_000003.json").write_text("[]")  # a summary is no evaluation
    assert read_run(untested).tested_step is None


def test_an_unfinished_evaluation_is_noted(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "run", tests={3: {"hard_greedy": [[T], [T]], "soft_sample": [[T, T], [F, F]]}})
    path = folder / "eval" / "test_000003" / "gsm8k_test.jsonl"
    kept = [line for line in path.read_text().splitlines(keepends=True) if "hard_greedy" not in line][:3]
    path.write_text("".join(kept))
    assert read_run(folder).notes == [
        "run/eval/test_000003/gsm8k_test.jsonl: hard_greedy: no samples yet",
        "run/eval/test_000003/gsm8k_test.jsonl: soft_sample: 1 of 4 samples missing",
    ]


# Accuracy


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """Two seeds of hard tokens, one of soft, all with the untrained model's row."""
    hard = {0: [[T], [T]], 1: [[T], [F]]}
    for seed, greedy in hard.items():
        sampled = {"hard_sample": [[T, F], [T, T]]}
        tests = {0: BASE_TEST, 8: {"hard_greedy": greedy, **sampled}}
        write_run(tmp_path, f"hard{seed}", [*LLAMA, "policy.mode=hard", f"run.seed={seed}"], tests=tests)
    soft = {"hard_greedy": [[T], [T]], "soft_sample": [[T, F], [T, T]]}
    write_run(tmp_path, "soft", [*LLAMA, "policy.mode=soft"], tests={0: BASE_TEST, 5: soft})
    return tmp_path


def test_mean_and_deviation_over_seeds_stand_beside_the_papers_number(llama: Path) -> None:
    _, arms = grouped(llama)
    rows = accuracy_table(arms).rows
    assert [(row["trained"], row["seeds"], row["test"]) for row in rows] == [
        ("none", "0, 1", "gsm8k:test"),
        ("hard", "0, 1", "gsm8k:test"),
        ("soft", "0", "gsm8k:test"),
    ]
    assert rows[0]["hard sample pass@1"] == Measured(25.0, 0.0, 2)  # the untrained model: the paper has no number here
    assert rows[1]["hard greedy pass@1"] == Measured(75.0, pytest.approx(35.355, abs=1e-3), 2, 75.9)
    assert rows[1]["hard sample pass@1"] == Measured(75.0, 0.0, 2, 74.3)
    assert rows[1]["hard sample pass@32"] == Measured(None, None, 0, 94.1)  # two samples were drawn
    assert rows[2]["hard greedy pass@1"] == Measured(100.0, None, 1, 77.2)


def test_other_noise_than_the_papers_gets_no_number_of_the_paper(tmp_path: Path) -> None:
    for gamma in ("0.33", "1"):
        write_run(tmp_path, gamma, [*LLAMA, f"policy.gamma={gamma}"], tests={8: {"hard_greedy": [[T]]}})
    rows = accuracy_table(grouped(tmp_path)[1]).rows
    assert [row["hard greedy pass@1"] for row in rows] == [Measured(100.0, None, 1, 77.2), Measured(100.0, None, 1)]


def test_all_six_settings_have_a_row_with_the_votes_and_the_curve(llama: Path) -> None:
    _, arms = grouped(llama)
    rows = {(row["trained"], row["setting"]): row for row in settings_table(arms).rows}
    assert list(rows) == [
        *(("none", s) for s in ("hard_greedy", "hard_sample")),
        *(("hard", s) for s in ("hard_greedy", "hard_sample")),
        *(("soft", s) for s in ("hard_greedy", "soft_sample")),
    ]
    row = rows["soft", "soft_sample"]
    assert (row["n"], row["pass@1"], row["pass@n"]) == (2, Measured(75.0, None, 1), Measured(100.0, None, 1))
    assert row["majority"] == Measured(100.0, None, 1)  # the first of two different answers
    assert (row["CoT tokens"], row["no box %"], row["missing"]) == (Measured(2.0, None, 1), Measured(0.0, None, 1), 0)


def test_the_curve_has_powers_of_two_and_n_and_an_interval(tmp_path: Path) -> None:
    write_run(tmp_path, "soft", tests={1: {"hard_sample": [[T, F, F, F, F, F], [T, T, T, T, T, T]]}})
    rows = pass_at_k_table(grouped(tmp_path)[1]).rows
    assert [row["k"] for row in rows] == [1, 2, 4, 6]
    means = [row["pass@k"].mean for row in rows if isinstance(row["pass@k"], Measured)]
    assert means == pytest.approx([100 * (1 + k / 6) / 2 for k in (1, 2, 4, 6)])
    assert (rows[0]["low"], rows[0]["high"]) == (pytest.approx(100 / 6), pytest.approx(100.0))
    assert (rows[3]["low"], rows[3]["high"]) == (100.0, 100.0)


def test_mixtures_are_averaged_over_steps_and_by_index(llama: Path) -> None:
    _, arms = grouped(llama)
    (row,) = mixture_table(arms).rows
    assert (row["trained"], row["setting"]) == ("soft", "soft_sample")
    assert row["entropy"] == Measured(pytest.approx((0.6931 + 1.3863) / 2), None, 1)
    assert row["support"] == Measured(3.0, None, 1)
    by_index = mixture_by_index_table(arms).rows
    assert [(r["index"], r["samples"], r["support"]) for r in by_index] == [(0, 4, 2.0), (1, 4, 4.0)]


def test_out_of_domain_rows_are_reported_for_the_base_and_the_tested_weights(tmp_path: Path) -> None:
    for seed, accuracy in ((0, 0.5), (1, 0.6)):
        folder = write_run(tmp_path, f"soft{seed}", [f"run.seed={seed}"], tests={4: {"hard_greedy": [[T]]}})
        for name, share in (("000000", 0.25), ("000004", accuracy)):
            path = folder / "eval" / f"out_of_domain_{name}.json"
            row = {"dataset": "mmlu", "items": 4, "accuracy": share, "accuracy_norm": 0.75, "nll_per_token": 2.5}
            path.write_text(json.dumps([row]))
    base, soft = out_of_domain_table(grouped(tmp_path)[1]).rows
    assert (base["trained"], base["accuracy"]) == ("none", Measured(25.0, 0.0, 2))
    assert (soft["trained"], soft["accuracy"]) == ("soft", Measured(pytest.approx(55.0), pytest.approx(7.071, abs=1e-3), 2))
    assert (soft["by character"], soft["NLL per token"]) == (Measured(75.0, 0.0, 2), Measured(2.5, 0.0, 2))
    assert soft["items"] == 4


def test_the_untrained_model_counts_once_a_seed_and_apart_where_it_was_evaluated_otherwise(llama: Path) -> None:
    path = llama / "soft" / "eval" / "test_000000" / "gsm8k_test.json"
    path.write_text(path.read_text().replace('"sigma": 0.25', '"sigma": 0.5'))
    _, arms = grouped(llama)
    assert [(arm.label, arm.seeds) for arm in arms if arm.trained == BASE] == [
        ("none, sigma=0.25", "0, 1"),
        ("none, sigma=0.5", "0"),
    ]


# Training, cost, studies


def test_training_is_reported_without_any_evaluation(tmp_path: Path) -> None:
    rows = [step(1, 10, reward__mean=float(i), **({"eval__hard_greedy": i / 100} if i % 5 == 0 else {})) for i in range(1, 21)]
    write_run(tmp_path, "soft", metrics=rows)
    groups, arms = grouped(tmp_path)
    (row,) = training_table(groups).rows
    assert (row["steps"], row["reward"], row["best validation"]) == (20, Measured(19.5, None, 1), Measured(20.0, None, 1))
    assert row["residual"] is None
    assert accuracy_table(arms).rows == [] and settings_table(arms).rows == []


def test_cost_is_compared_with_hard_tokens_at_equal_settings_and_steps(tmp_path: Path) -> None:
    write_run(tmp_path, "hard", ["policy.mode=hard"], metrics=[step(10, 1000)] * 4)
    write_run(tmp_path, "soft", metrics=[step(12, 1500)] * 3)
    write_run(tmp_path, "soft_1", ["run.seed=1"], metrics=[step(18, 1500)] * 3)
    write_run(tmp_path, "other", ["learner.lr=1e-5"], metrics=[step(12, 1500)] * 3)
    groups, _ = grouped(tmp_path)
    hard, other, soft = cost_table(groups).rows
    assert (hard["steps"], hard["hours / hard"], hard["PFLOP / hard"]) == (4, 1.0, 1.0)
    assert (soft["trained"], soft["steps"]) == ("soft, learner.lr=6e-06", 3)
    assert soft["hours"] == Measured(pytest.approx(45 / 3600), pytest.approx(9 / 3600 * 2**0.5), 2)
    assert (soft["hours / hard"], soft["Mtokens / hard"]) == (pytest.approx(1.5), pytest.approx(1.5))
    # 1,000 weights; 2 a token to decode and 6 to learn
    assert soft["PFLOP"] == Measured(pytest.approx(1000 * 8 * 4500 / 1e15), 0.0, 2)
    assert soft["tokens/s"] == Measured(pytest.approx((125 + 1500 / 18) / 2), pytest.approx(29.46, abs=0.01), 2)
    assert (other["trained"], other["hours / hard"]) == ("soft, learner.lr=1e-05", None)


def test_gamma_does_not_part_a_soft_run_from_its_hard_counterpart(tmp_path: Path) -> None:
    write_run(tmp_path, "hard", ["policy.mode=hard"], metrics=[step(10, 1000)])
    write_run(tmp_path, "soft", ["policy.gamma=1"], metrics=[step(20, 1000)])
    _, soft = cost_table(grouped(tmp_path)[0]).rows
    assert soft["hours / hard"] == 2.0


def test_a_metric_that_some_steps_lack_is_no_cost(tmp_path: Path) -> None:
    write_run(tmp_path, "soft", metrics=[step(10, 1000), {"time/step": 10.0}])
    (row,) = cost_table(grouped(tmp_path)[0]).rows
    assert (row["hours"], row["Mtokens"], row["PFLOP"]) == (Measured(pytest.approx(20 / 3600), None, 1), None, None)


def test_runs_that_differ_in_one_key_are_a_study(tmp_path: Path) -> None:
    for gamma in ("1", "0.1"):
        write_run(tmp_path, f"gamma{gamma}", [f"policy.gamma={gamma}"], metrics=[step(1, 1)], tests={1: {"hard_greedy": [[T]]}})
    for size in (4, 16):
        sized = [f"rollout.samples_per_prompt={size}", "policy.gamma=0.1"]
        write_run(tmp_path, f"size{size}", sized, metrics=[step(size, 10 * size)] * 2)
    write_run(tmp_path, "both", ["policy.gamma=3", "rollout.samples_per_prompt=2"])
    write_run(tmp_path, "hard_a", ["policy.mode=hard", "policy.gamma=0.1"])
    write_run(tmp_path, "hard_b", ["policy.mode=hard", "policy.gamma=1"])
    studies = {study.key: study for study in find_studies(grouped(tmp_path)[0])}
    assert list(studies) == ["rollout.samples_per_prompt", "policy.gamma"]
    sizes = studies["rollout.samples_per_prompt"]
    assert [sizes.value(group) for group in sizes.groups] == [4, 8, 16]
    rows = study_table(sizes.key, [sizes]).rows
    assert [row["s / step"] for row in rows] == [Measured(4.0, None, 1), Measured(1.0, None, 1), Measured(16.0, None, 1)]
    assert [row.get("test") for row in rows] == [None, "gsm8k:test", None]
    gammas = study_table("policy.gamma", [studies["policy.gamma"]]).rows
    assert [(row["policy.gamma"], row["hard greedy pass@1"]) for row in gammas] == [
        (0.1, Measured(100.0, None, 1)),
        (1.0, Measured(100.0, None, 1)),
    ]


# Forms


def test_a_table_says_the_same_in_three_forms() -> None:
    table = Table(
        name="t",
        title="T",
        columns={"name": "", "k": "d", "x": ".1f"},
        rows=[
            {"name": "a|b", "k": 2, "x": Measured(70.25, 0.54, 3, 70.5)},
            {"name": "c", "k": 4, "x": Measured(None, None, 0, 60.0)},
            {"name": "d", "x": Measured(1.0, None, 1)},
        ],
    )
    assert markdown(table).splitlines() == [
        "| name | k | x |",
        "| :-- | --: | --: |",
        "| a\\|b | 2 | 70.2 ± 0.5 (70.5) |",
        "| c | 4 | - (60.0) |",
        "| d | - | 1.0 |",
    ]
    first, second, third = csv.DictReader(io.StringIO(csv_text(table)))
    assert first == {"name": "a|b", "k": "2", "x": "70.25", "x std": "0.54", "x seeds": "3", "x paper": "70.5"}
    assert (second["x"], second["x seeds"], second["x paper"], third["k"]) == ("", "0", "60.0", "")
    assert json_rows(table)[2] == {"name": "d", "k": None, "x": 1.0, "x std": None, "x seeds": 1, "x paper": None}


def test_a_number_of_some_seeds_says_so_and_a_deviation_is_as_fine_as_its_mean() -> None:
    forms = {"seeds": "", "x": ".1f", "hours": ".3g", "PFLOP": ".3g"}
    row = {"seeds": "0, 1, 2", "x": over_seeds([1.0, None, 3.0]), "hours": over_seeds([0.01234, 0.0129, 0.0125])}
    text = markdown(Table(name="t", title="T", columns=forms, rows=[row | {"PFLOP": over_seeds([2e-9, 3e-9, 3e-9])}]))
    assert text.splitlines()[2] == "| 0, 1, 2 | 2.0 ± 1.4 [2 of 3 seeds] | 0.0126 ± 0.0003 | 2.67e-09 ± 5.77e-10 |"


@pytest.mark.timeout(60)
def test_a_long_table_takes_no_longer_a_row() -> None:
    """512 CoT indices of four settings, three data sets and twenty arms: quadratic in the rows it would be an hour."""
    rows = [{"index": i, "x": over_seeds([1.0, 2.0])} for i in range(120_000)]
    table = Table(name="t", title="T", columns={"index": "d", "x": ".1f"}, rows=rows)
    assert len(csv_text(table).splitlines()) == 1 + len(rows) and len(json_rows(table)) == len(rows)


def test_one_seed_has_no_deviation_and_none_has_no_mean() -> None:
    assert over_seeds([3.0]) == Measured(3.0, None, 1)
    assert over_seeds([1.0, None, 3.0]) == Measured(2.0, pytest.approx(2**0.5), 2)
    assert over_seeds([None, float("nan")]) is None


def test_the_papers_numbers_are_found_under_the_names_that_recipes_use() -> None:
    assert paper_number("meta-llama/Llama-3.1-8B-Instruct", "gsm8k", "math500", "hard", "hard_sample", 32) == 45.4
    assert paper_number("models/Qwen2.5-3B-Instruct/", "math", "math500", "none", "hard_greedy", 1) == 29.0
    for unknown in (("x", "math", "math500"), ("Qwen/Qwen2.5-3B-Instruct", "gsm8k", "gsm8k:test")):
        assert paper_number(*unknown, "hard", "hard_greedy", 1) is None
    assert paper_number("Qwen/Qwen2.5-3B-Instruct", "math", "math500", "hard", "soft_greedy", 1) is None
    for rows in NUMBERS.values():
        for greedy, sampled, best in rows.values():
            assert 0 < sampled <= greedy < best < 100
