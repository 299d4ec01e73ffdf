"""The stages as commands, distillation against TRL's loss, and one line for what a person can put right."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from testing.training import completion_logits

from grpo_kernels import cli
from grpo_kernels.integrations.transformers.model_head import open_head
from grpo_kernels.training.addition import TASKS, build_model
from grpo_kernels.training.checkpoint import save_checkpoint
from grpo_kernels.training.recipe import Recipe
from grpo_kernels.training.rollout import teacher_forced
from grpo_kernels.training.stages import KINDS, load_stage
from grpo_kernels.training.supervised import check_vocabularies, distillation_batch_loss
from grpo_kernels.training.task import columns_needed, load_task_rows

SMALL: dict[str, Any] = {
    "num_eval_prompts": 3, "eval_samples": 2, "sft_steps": 3, "sft_batch_size": 4, "max_completion_length": 8,
    "device": "cpu", "num_threads": 1, "disable_tqdm": True,
}  # fmt: skip


def run(command: str, folder: Path, **options: object) -> int:
    known = {**SMALL} if command == "train" else {k: v for k, v in SMALL.items() if k in KINDS[command].keys()}  # noqa: SIM118 - a class, no dict
    arguments = known | {"output_dir": folder} | options
    return cli.main([command, *(text for name, value in arguments.items() for text in (f"--{name}", str(value)))])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that writes a few digits, as ``grpo-kernels sft`` leaves it."""
    folder = tmp_path_factory.mktemp("sft")
    assert run("sft", folder, sft_steps=20) == 0
    return folder / "checkpoint-20"


def records(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_samples_of_a_model_are_rows_to_train_on(trained: Path, tmp_path: Path) -> None:
    sampled = tmp_path / "sampled"
    assert run("sample", sampled, model_name_or_path=trained, keep="{accuracy: 0}", prompts=5, samples=3) == 0
    rows = records(sampled, "rows.jsonl")
    assert 0 < len(rows) <= 15 and records(sampled)[-1]["kept"] == len(rows)
    assert run("sft", tmp_path / "again", data=sampled / "rows.jsonl") == 0
    assert [record["step"] for record in records(tmp_path / "again")] == [1, 2, 3, 3]
    assert run("augment", tmp_path / "more", ways="[start]", num_rows=4) == 0
    assert {row["source"] for row in records(tmp_path / "more", "rows.jsonl")} == {"seed", "start"}


COUNTED: dict[str, int] = {}  # tokens of each completion that ``token_count`` was given


def token_count(prompts: list[str], completions: list[str], *, completion_ids: list[list[int]], **_: Any) -> list[int]:
    counts = [len(ids) for ids in completion_ids]
    COUNTED.update(zip(completions, counts, strict=True))
    return counts


def test_samples_are_kept_by_rewards_of_their_tokens(trained: Path, tmp_path: Path) -> None:
    keep = "{test_training_commands:token_count: 8}"
    assert run("sample", tmp_path, model_name_or_path=trained, keep=keep, prompts=5, samples=3) == 0
    kept = {row["completion"] for row in records(tmp_path, "rows.jsonl")}
    assert kept == {completion for completion, count in COUNTED.items() if count >= 8} and len(kept) < len(COUNTED)


def test_eval_prints_every_score_with_its_interval(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    votes = tmp_path / "votes"
    assert run("eval", votes, model_name_or_path=trained, eval_samples=4, ks="[1, 2, 4]") == 0
    printed = capsys.readouterr().out
    for name in ("pass@1", "pass@2", "pass@4", "cons@2", "cons@4", "greedy"):
        assert re.search(rf"{name} \d\.\d+ \[\d\.\d+, \d\.\d+\]", printed), name
    assert run("eval", tmp_path, model_name_or_path=trained, eval_samples=4, ks="[1, 2, 4]", check="format") == 0
    printed = capsys.readouterr().out
    assert "pass@4" in printed and "cons@" not in printed  # a form is no answer to vote on
    before = (tmp_path / "done.json").read_bytes()
    assert run("eval", tmp_path, model_name_or_path=trained, eval_samples=4, ks="[1, 2, 4]", check="format") == 0
    assert (tmp_path / "done.json").read_bytes() == before and "== eval" not in capsys.readouterr().out
    assert run("eval", tmp_path, model_name_or_path=trained, eval_samples=4, ks="[1, 2]", check="format") == 2
    assert "holds a stage with another ks; delete it to run it again" in capsys.readouterr().err
    assert run("eval", tmp_path, model_name_or_path=trained, ks="[1, 2]", overwrite_output_dir=True) == 0


@pytest.mark.parametrize(("beta", "lmbda"), [(0, 0), (0.5, 0.5), (1, 1)])
def test_a_student_comes_closer_to_its_teacher(trained: Path, tmp_path: Path, beta: float, lmbda: float) -> None:
    options = {"teacher_model_name_or_path": trained, "hidden_size": 32, "prompts": 8, "samples": 2, "sft_steps": 24,
               "beta": beta, "lmbda": lmbda}  # fmt: skip
    assert run("distill", tmp_path, **options, num_eval_prompts=0) == 0
    losses = [record["loss"] for record in records(tmp_path)]
    assert len(losses) == 24 and sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert (tmp_path / "rows.jsonl").exists() == (lmbda < 1)  # on its own samples alone, the teacher writes none


@pytest.mark.parametrize("beta", [0, 0.3, 1])
def test_the_loss_is_trls(beta: float) -> None:
    trainer = pytest.importorskip("trl.experimental.gkd").GKDTrainer
    tokenizer = TASKS["addition"].build_tokenizer()
    student, teacher = build_model(tokenizer, 0, hidden_size=32).eval(), build_model(tokenizer, 1).eval()
    batch = teacher_forced(tokenizer, ["1 + 1 =", "1 2 + 3 4 ="], ["2 carry 1", "4 6 units 7 = 9 tens"])
    with torch.no_grad():
        ours, theirs = (completion_logits(model, batch)[:, :-1] for model in (student, teacher))
    labels = torch.where(batch.completion_mask.bool(), batch.completion_ids, -100)
    expected = trainer.generalized_jsd_loss(ours, theirs, labels, beta=beta, temperature=0.9)
    for model in (student, teacher):
        open_head(model)
    loss = distillation_batch_loss(student, teacher, batch, beta=beta, temperature=0.9)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in student.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_head_that_is_padded_further_teaches_the_same_tokens() -> None:
    """Qwen2.5's larger models have 152,064 rows for the tokens of which its smaller ones have 151,936."""
    tokenizer = TASKS["addition"].build_tokenizer()
    student, teacher = build_model(tokenizer, 0, hidden_size=32).eval(), build_model(tokenizer, 1).eval()
    batch = teacher_forced(tokenizer, ["1 + 1 ="], ["2 carry 1"])
    for model in (student, teacher):
        open_head(model)
    expected = distillation_batch_loss(student, teacher, batch, beta=0.5)
    teacher.resize_token_embeddings(len(tokenizer) + 10)
    torch.testing.assert_close(distillation_batch_loss(student, teacher, batch, beta=0.5), expected)


def test_another_vocabulary_teaches_by_samples_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("sft", tmp_path / "teacher", dataset_name="addition-mixed") == 0
    options = {"teacher_model_name_or_path": tmp_path / "teacher" / "checkpoint-3", "prompts": 4}
    assert run("distill", tmp_path / "soft", **options, beta=0) == 2
    assert "beta must be None for a teacher with another vocabulary: of 22 tokens" in capsys.readouterr().err
    assert run("distill", tmp_path / "hard", **options) == 0
    with pytest.raises(ValueError, match="2 differ"):
        tokenizer = TASKS["addition"].build_tokenizer()
        other = TASKS["addition"].build_tokenizer()
        other.add_tokens(["one", "two"])
        check_vocabularies(tokenizer, other)


def test_a_stage_that_names_another_needs_a_recipe_of_several() -> None:
    with pytest.raises(ValueError, match=r"data must be a file \(\.jsonl, .*\.parquet\), got 'rejection'"):
        load_stage("sft", None, ["--data", "rejection", "--sft_steps", "1"])
    with pytest.raises(ValueError, match="teacher has no effect on kind 'eval'"):
        load_stage("eval", None, ["--teacher", "grpo"])


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("eval", {"temperature": 0.01}),
        ("sample", {"temperature": 0.5, "keep": "{format: 0}"}),
        ("sft", {"learning_rate": 1, "max_steps": 7, "use_peft": True}),
        ("distill", {"teacher_model_name_or_path": "x", "use_vllm": True}),
        ("augment", {"sft_steps": 3}),
    ],
)
def test_an_option_without_effect_is_refused(
    tmp_path: Path, command: str, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    idle = ", ".join(name for name in options if name not in ("keep", "teacher_model_name_or_path"))
    assert run(command, tmp_path, **options) == 2
    assert f"command line: {idle} has no effect on kind '{command}'" in capsys.readouterr().err
    (name, value) = next((name, value) for name, value in options.items() if name in idle)
    path = tmp_path / "stage.yaml"
    path.write_text(f"{name}: {value}\n")
    if command != "eval":  # which takes the recipe that trained
        assert cli.main([command, "--recipe", str(path)]) == 2
        assert f"{name} has no effect on kind '{command}'" in capsys.readouterr().err
    assert cli.main([command, f"--{name.replace('_', '-')}={value}"]) == 2
    assert f"{name} has no effect on kind '{command}'" in capsys.readouterr().err


def test_what_is_wrong_is_the_key_not_what_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, key, near in (("sft", "sft_step", "sft_steps"), ("sample", "kep", "keep"),
                               ("distill", "teacher_model_name", "teacher_model_name_or_path")):  # fmt: skip
        assert run(command, tmp_path, **{key: "{format: 1}"}) == 2
        assert f"unknown key {key!r}; the nearest known key is {near!r}" in capsys.readouterr().err
    assert run("eval", tmp_path, colour=1) == 2
    assert "unknown key 'colour'; grpo-kernels eval --help lists the keys" in capsys.readouterr().err


def test_an_evaluation_stays_out_of_the_folder_of_a_run(trained: Path, tmp_path: Path) -> None:
    path, folder = tmp_path / "mine.yaml", trained.parent
    path.write_text(f"model_name_or_path: {trained}\noutput_dir: {folder}\n")
    assert load_stage("eval", str(path)).folder == folder / "eval"
    path.write_text(f"model_name_or_path: {trained}\noutput_dir: {tmp_path / 'other'}\n")
    assert load_stage("eval", str(path)).folder == tmp_path / "other"


def test_prompts_alone_are_sampled_where_nothing_reads_an_answer(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f'{{"prompt": "{k} + 1 ="}}\n' for k in range(6)))
    stage = load_stage("sample", None, ["--dataset_name", str(path), "--keep", "{format: 0}"])
    assert columns_needed(stage.options) == ("prompt",)


def test_every_key_of_a_recipe_is_read_by_some_kind_of_stage() -> None:
    known = {key.name for key in fields(Recipe)}
    assert known - set().union(*(kind.keys() for kind in KINDS.values())) == {"resume"}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "grpo"])  # whose command is train
def test_the_help_of_a_stage_has_its_keys_and_no_others(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load_stage(kind, None, ["--help"])
    assert ended.value.code == 0
    listed = set(re.findall(r"^  --(?!no_)(\w+)", capsys.readouterr().out, flags=re.MULTILINE))
    assert listed == KINDS[kind].keys() - {"model", "teacher"}


def test_an_evaluation_needs_no_training_rows_and_augmentation_no_model(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "held_out.jsonl"
    path.write_text('{"prompt": "1 + 1 =", "answer": "2"}\n{"prompt": "1 + 2 =", "answer": "3"}\n')
    assert run("eval", tmp_path / "eval", dataset_name=path, model_name_or_path=trained, num_eval_prompts=2) == 0
    trace = "<think> 1 + 1 = 2 </think> <answer> 2 </answer>"
    path.write_text(json.dumps({"prompt": "1 + 1 =", "answer": "2", "completion": trace}) + "\n")
    assert run("augment", tmp_path / "augment", dataset_name=path, num_eval_prompts=0, ways="[start]") == 0


def test_an_evaluation_needs_held_out_problems(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "few.jsonl"  # of which a fifth is none
    path.write_text('{"prompt": "1 + 1 =", "answer": "2"}\n{"prompt": "1 + 2 =", "answer": "3"}\n')
    arguments = ["--dataset_name", str(path), "--model_name_or_path", str(trained), "--device", "cpu"]
    assert cli.main(["eval", *arguments, "--output_dir", str(tmp_path / "eval")]) == 2
    assert "few.jsonl' has no held-out problems: set num_eval_prompts, or" in capsys.readouterr().err


def test_only_columns_that_a_reward_takes_are_needed(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "programs.jsonl"
    path.write_text('{"prompt": "1 + 1 =", "tests": ["assert True"]}\n' * 9)
    rows = {"dataset_name": path, "model_name_or_path": trained, "num_eval_prompts": 0}
    assert run("sample", tmp_path / "sample", **rows, keep="{tag_count: 0}", prompts=2, samples=1) == 0
    code = Recipe(dataset_name=str(path), reward_funcs=["code"], num_eval_prompts=2)
    assert columns_needed(code) == ("prompt",)
    assert len(load_task_rows(code)[1]) == 2
    with pytest.raises(ValueError, match="row 0 must have columns prompt and answer; it lacks answer"):
        load_task_rows(replace(code, check="accuracy"))


def test_problems_beyond_the_context_are_not_sampled_for(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "problems.jsonl"
    rows = [{"prompt": " ".join("1" * n), "answer": "1"} for n in (125, 3, 0, 5)]  # a context of 128, 8 of a completion
    path.write_text("".join(json.dumps(row) + "\n" for row in rows).replace('"prompt": ""', '"prompt": " "'))
    common = {"data": path, "prompts": 2, "samples": 1, "keep": "{format: 0}", "num_completions_to_print": 9}
    teacher = {"teacher_model_name_or_path": trained, "sft_steps": 1}
    for command, more in (("sample", {"model_name_or_path": trained}), ("distill", teacher)):
        if command == "distill":
            del common["data"]
            more |= {"dataset_name": path, "model_name_or_path": trained, "num_eval_prompts": 0}
        caplog.clear()
        assert run(command, tmp_path / command, **common, **more) == 0
        left_out = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
        assert len(left_out) == 2 and left_out[0].startswith("1 of 4 training prompts have no token")
        prompts = {record["prompt"] for record in records(tmp_path / command, "samples.jsonl")}
        assert prompts == {"1 1 1", "1 1 1 1 1"}


def test_the_progress_of_supervised_steps_counts_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def count_step(bar: Any, *, completions: int, tokens: float, **values: float) -> None:
        seen.append(tokens)

    monkeypatch.setattr("grpo_kernels.training.stages.work.count_step", count_step)
    assert run("sft", tmp_path, num_eval_prompts=0) == 0
    assert len(seen) == 3 and min(seen) > SMALL["sft_batch_size"]


BAD = {
    "the columns": ("train", {"dataset_name": "ROWS"}, "row 0 must have columns prompt and answer; it lacks answer"),
    "a line": ("train", {"dataset_name": "CUT"}, "cut.jsonl:2: expected a JSON object"),
    "no file": ("train", {"dataset_name": "nowhere.jsonl"}, "nowhere.jsonl cannot be read"),
    "traces": ("sft", {"data": "ROWS"}, "row 0 must have prompt, completion; it lacks completion and has"),
    "no model": ("eval", {"model_name_or_path": "no/such/model"}, "'no/such/model' cannot be loaded"),
    "cut weights": ("eval", {"model_name_or_path": "WEIGHTS"}, "cannot be loaded: Error while deserializing header"),
    "missing weights": ("train", {"model_name_or_path": "LACKING"}, "lacks weights of the model: model.norm.weight"),
    "other sizes": ("sample", {"model_name_or_path": "OTHER", "keep": "{format: 0}"}, "cannot be loaded: "),
    "backend": ("train", {"backend": "triton"}, "backend 'triton' cannot run grpo_loss: "),
    "device": ("eval", {"device": "abacus"}, "device must be a torch device or auto, got 'abacus'"),
    "tracker": ("train", {"report_to": "smoke"}, "report_to must be none alone, all alone, or some of"),
    "reward": ("train", {"reward_funcs": "fluency"}, "expected one of accuracy"),
    "judge": ("train", {"check": "fluency"}, "expected one of accuracy"),
    "yaml": ("sample", {"keep": "{accuracy"}, "error: command line: argument --keep: expected YAML, got '{accuracy'"),
    "nothing kept": ("sample", {"keep": "{accuracy: 2}", "prompts": 2}, "none of 8 completions earned {'accuracy': 2}"),
}  # fmt: skip


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files that are not what they should be, by the name that stands for them in ``BAD``."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("bad")
    (folder / "rows.jsonl").write_text('{"prompt": "1 + 1 =", "result": "2"}\n' * 4)
    (folder / "cut.jsonl").write_text('{"prompt": "1 + 1 =", "answer": "2"}\n{"prompt": "1 +')
    tokenizer = TASKS["addition"].build_tokenizer()
    models = {}
    for name in ("WEIGHTS", "LACKING", "OTHER"):
        models[name] = save_checkpoint(folder / name, 1, build_model(tokenizer, 0), tokenizer, keep=1)
    weights = models["WEIGHTS"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    weights = load_file(models["LACKING"] / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, models["LACKING"] / "model.safetensors", metadata={"format": "pt"})
    config = models["OTHER"] / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 96', '"hidden_size": 64'))
    return {"ROWS": str(folder / "rows.jsonl"), "CUT": str(folder / "cut.jsonl")} | {
        k: str(v) for k, v in models.items()
    }


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(
    bad: dict[str, str], tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command, options, message = BAD[case]
    options = {name: bad.get(str(value), value) for name, value in options.items()}
    assert run(command, tmp_path / "run", **options) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert error.splitlines()[-1].startswith("error: ") or "\nerror: " in error or error.startswith("error: ")
    assert not (tmp_path / "run" / "done.json").exists()


FULL = """
import resource, sys
from grpo_kernels import cli
from grpo_kernels.training import run
save = run.save_checkpoint
def save_then_fill(*args, **options):
    if args[1] > 0:  # the disk has room for the first checkpoint, and no more for the weights of another
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    return save(*args, **options)
run.save_checkpoint = save_then_fill
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.full
@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files as POSIX does")
def test_a_disk_that_fills_up_leaves_the_run_to_be_resumed(tmp_path: Path) -> None:
    options = SMALL | {"output_dir": tmp_path, "max_steps": 4, "save_steps": 2, "num_generations": 4,
                       "per_device_train_batch_size": 4, "num_eval_prompts": 0, "sft_steps": 0}  # fmt: skip
    arguments = ["train", *(text for name, value in options.items() for text in (f"--{name}", str(value)))]
    done = subprocess.run([sys.executable, "-c", FULL, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "checkpoint-2 could not be written" in done.stderr and "Traceback" not in done.stderr
    assert f"stopped after step 2; last complete checkpoint: {tmp_path / 'checkpoint-0'}" in done.stderr
    assert [record["step"] for record in records(tmp_path)] == [1, 2]
    assert {path.name for path in tmp_path.glob("*checkpoint*")} == {"checkpoint-0"}
    assert cli.main([*arguments, "--resume", "true"]) == 0
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4]
