"""Rows from datasets of every kind, prompt templates, and the filters of problems and groups."""

from __future__ import annotations

import json
from types import SimpleNamespace

import datasets
import pytest
import torch
from testing.training import report_of

from grpo_kernels import rewards
from grpo_kernels.training import supervised
from grpo_kernels.training.addition import TASKS, build_model
from grpo_kernels.training.data import templates
from grpo_kernels.training.data.files import read_file
from grpo_kernels.training.data.rows import load_rows, split_solution
from grpo_kernels.training.loop import GRPOLoop
from grpo_kernels.training.metrics import informative_groups
from grpo_kernels.training.recipe import Recipe
from grpo_kernels.training.rollout import teacher_forced
from grpo_kernels.training.task import load_task, train_on_traces

CLIPS = (
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n"
    "Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.\n#### 72"
)
GSM8K_ROWS = [
    {"question": "Natalia sold clips to 48 of her friends. How many in all?", "answer": CLIPS},
    {
        "question": "What do 1,000 houses at $70 cost?",
        "answer": "They cost $70*1000 = $<<70*1000=70000>>70,000.\n#### 70,000",
    },
    {"question": "How cold is it?", "answer": "It fell by 5 degrees.\n#### -5"},
]
CHAT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[go]{% endif %}"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def gsm8k_folder(tmp_path):
    """A folder laid out as GSM8K is on the Hub: two configurations, each with two splits in parquet."""
    folder = tmp_path / "gsm8k"
    configs = []
    for config in ("main", "socratic"):
        for split, rows in {"train": GSM8K_ROWS, "test": GSM8K_ROWS[:1]}.items():
            path = folder / config / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            marked = [{**row, "question": f"{config}: {row['question']}"} for row in rows]
            datasets.Dataset.from_list(marked).to_parquet(path)
        files = [{"split": split, "path": f"{config}/{split}-*"} for split in ("train", "test")]
        configs.append({"config_name": config, "data_files": files})
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    return str(folder)


@pytest.fixture
def model_settings(tmp_path):
    tokenizer = TASKS["addition"].build_tokenizer()
    build_model(tokenizer, seed=0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return {"model_name_or_path": str(tmp_path / "model"), "device": "cpu", "num_eval_prompts": 2}


def test_gsm8k_gives_prompts_final_numbers_and_solutions(gsm8k_folder):
    rows = load_rows(gsm8k_folder, config="main")
    assert [row["prompt"] for row in rows] == [f"main: {row['question']}" for row in GSM8K_ROWS]
    assert [row["answer"] for row in rows] == ["72", "70000", "-5"]
    assert rows[0]["solution"] == CLIPS.removesuffix("\n#### 72")
    assert rows[2]["solution"] == "It fell by 5 degrees."
    assert "question" not in rows[0]
    assert load_rows(gsm8k_folder, config="socratic", split="test")[0]["prompt"].startswith("socratic: Natalia")


def test_a_gsm8k_solution_is_a_completion_that_its_rewards_accept(gsm8k_folder):
    for row in load_rows(gsm8k_folder, config="main"):
        assert "<<" not in row["completion"]
        assert rewards.format_reward([""], [row["completion"]]) == [1.0]
        assert rewards.accuracy_reward([""], [row["completion"]], answer=[row["answer"]]) == [1.0]


def test_a_recipe_trains_on_gsm8k_and_evaluates_on_its_test_split(gsm8k_folder, model_settings):
    task = load_task(
        Recipe(dataset_name=gsm8k_folder, dataset_config="main", eval_dataset_split="test", **model_settings)
    )
    assert [row["answer"] for row in task.train_rows] == ["72", "70000", "-5"]
    assert [row["answer"] for row in task.eval_rows] == ["72"]


def test_an_answer_without_a_final_number_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"question": "?", "answer": answer}) for answer in ("a\n#### 1", "a, so 2")))
    with pytest.raises(ValueError, match=r"rows\.jsonl': the answer of row 1 must end in a line #### .* got 'a, so 2'"):
        load_rows(str(path))
    assert split_solution("#### heading\ntext") is None
    assert split_solution("text\n####") is None
    assert split_solution("text\n#### 1,234,567.5 ") == ("text", "1234567.5")


def test_answers_of_another_kind_stay_as_they_are(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a", "answer": 2}, {"prompt": "b", "answer": "text #### 3"}, {"prompt": "c", "answer": "1,000"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert load_rows(str(path)) == rows


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "saved", "splits", "folder"])
def test_columns_of_other_names_are_mapped_for_every_kind_of_dataset(tmp_path, kind):
    rows = [{"problem": f"{i} + 1", "result": str(i + 1), "level": i} for i in range(4)]
    table, path = datasets.Dataset.from_list(rows), tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "saved":
        table.save_to_disk(path)
    elif kind == "splits":
        datasets.DatasetDict({"train": table}).save_to_disk(path)
    elif kind == "folder":
        path.mkdir()
        table.to_parquet(path / "train.parquet")
    else:
        getattr(table, f"to_{kind}")(path)
    found = load_rows(str(path), prompt_column="problem", answer_column="result")
    assert [(row["prompt"], str(row["answer"]), row["level"]) for row in found] == [
        (f"{i} + 1", str(i + 1), i) for i in range(4)
    ]
    assert found[0].keys() == {"prompt", "answer", "level"}


def test_a_named_column_wins_over_one_that_has_our_name(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "template 7", "question": "1 + 1", "answer": "no", "label": 2}))
    assert load_rows(str(path))[0]["prompt"] == "template 7"
    found = load_rows(str(path), prompt_column="question", answer_column="label")
    assert found == [{"prompt": "1 + 1", "answer": 2}]


def test_a_missing_column_or_value_is_named_with_what_there_is(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"problem": "1 + 1", "answer": 2}) + "\n" + json.dumps({"problem": "1 + 2"}))
    with pytest.raises(
        ValueError, match="row 0 must have columns prompt and answer; it lacks prompt and has answer, problem"
    ):
        load_rows(str(path))
    with pytest.raises(ValueError, match="row 1 must have columns problem and answer; it lacks answer and has problem"):
        load_rows(str(path), prompt_column="problem")
    path.write_text(json.dumps({"problem": "1 + 1", "answer": None}))
    with pytest.raises(ValueError, match="row 0 must have a value in column answer, got None"):
        load_rows(str(path), prompt_column="problem")


def test_a_missing_split_is_named_and_one_split_is_not_used_twice(tmp_path):
    table = datasets.Dataset.from_list([{"prompt": "1 + 1", "answer": "2"}])
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match="has no split 'test'; it has train"):
        load_rows(str(tmp_path / "splits"), split="test")
    table.save_to_disk(tmp_path / "single")
    table.to_json(tmp_path / "rows.jsonl")
    for name in ("single", "rows.jsonl"):
        recipe = Recipe(dataset_name=str(tmp_path / name), eval_dataset_split="test")
        with pytest.raises(ValueError, match=r"eval_dataset_split must be None for .* which has one split, got 'test'"):
            load_task(recipe)


def test_no_question_is_on_both_sides_of_a_cut(tmp_path, model_settings):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{i % 10} + 1", "answer": str(i % 10 + 1)} for i in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    for seed in range(5):
        task = load_task(Recipe(dataset_name=str(path), seed=seed, **model_settings))
        held_out = {row["prompt"] for row in task.eval_rows}
        assert len(task.eval_rows) == 2
        assert not held_out & {row["prompt"] for row in task.train_rows}
        assert len(task.train_rows) == 40 - 4 * len(held_out)


def test_a_hub_dataset_is_read_from_its_files_as_they_are(monkeypatch, tmp_path):
    """A name on the Hub has a builder that says which files its splits are; none of its code is run."""
    paths = {split: tmp_path / f"{split}.csv" for split in ("train", "test")}
    for split, path in paths.items():
        path.write_text(f"question,answer\n{split}?,007\nmore?,5\nnone?,\n".replace("none?,", "last?,0.5"))
    calls = []

    def load_dataset_builder(name, config=None):
        calls.append((name, config))
        files = {split: [str(path)] for split, path in paths.items()}
        return SimpleNamespace(config=SimpleNamespace(data_files=files))

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    assert [row["answer"] for row in load_rows("openai/gsm8k")] == ["007", 5, 0.5]
    assert load_rows("openai/gsm8k", config="socratic", split="test")[0]["prompt"] == "test?"
    assert [row["prompt"] for row in load_rows("someone/sums", split="train[1:]")] == ["more?", "last?"]
    with pytest.raises(ValueError, match="'someone/sums' has no split 'dev'; it has train, test"):
        load_rows("someone/sums", split="dev")
    assert calls[:3] == [("openai/gsm8k", "main"), ("openai/gsm8k", "socratic"), ("someone/sums", None)]


def test_a_dataset_that_is_nowhere_is_named_beside_the_built_in_ones(monkeypatch):
    def load_dataset_builder(name, config=None):
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    with pytest.raises(
        ValueError, match=r"built-in task \(addition, addition-mixed\), .* got 'adition': .* doesn't exist"
    ):
        load_rows("adition")


def test_a_line_that_is_no_row_is_named_and_an_empty_one_is_none(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text('{"prompt": "1 + 1 =", "answer": 2}\n\n{"prompt": "2 + 2 =", "answer": 4}\n')
    assert [row["answer"] for row in read_file(path)] == [2, 4]
    path.write_text('{"prompt": "1 + 1 ="}\nnot json\n')
    with pytest.raises(ValueError, match=r"sums\.jsonl:2: expected a JSON object, got 'not json'"):
        read_file(path)


def test_a_line_separator_inside_a_json_string_cuts_no_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"prompt": "one\u2028two\x85three", "answer": "3"}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\r\n" + json.dumps(row), encoding="utf-8")
    assert read_file(path) == [row, row]


def test_without_a_template_prompts_are_rendered_as_ever():
    tokenizer = TASKS["addition"].build_tokenizer()
    tokenizer.chat_template = CHAT
    messages = {"prompt": [{"role": "user", "content": "1 + 1"}]}
    assert templates.render_prompt({"prompt": "1 + 1 "}, tokenizer) == "1 + 1 "
    assert templates.render_prompt({"prompt": "1 + 1"}, tokenizer, None, "Add.") == "[system]Add.[user]1 + 1[go]"
    assert templates.render_prompt(messages, tokenizer) == "[user]1 + 1[go]"
    assert templates.render_prompt(messages, tokenizer, None, "Add.") == "[system]Add.[user]1 + 1[go]"


def test_templates_by_name_and_by_text():
    tokenizer = TASKS["addition"].build_tokenizer()
    row, chat = {"prompt": "1 + {prompt}"}, {"prompt": [{"role": "user", "content": "1 + 1"}]}
    assert templates.render_prompt(row, tokenizer, "none") == "1 + {prompt}"
    zero = templates.render_prompt(row, tokenizer, "r1_zero")
    assert zero.endswith("User: 1 + {prompt} Assistant:")
    assert rewards.extract_answer(zero) == "theresult"  # the form is shown, and what follows the prompt is a completion
    assert templates.render_prompt(chat, tokenizer, r"\boxed{}: {prompt} =") == r"\boxed{}: 1 + 1 ="
    tokenizer.chat_template = CHAT
    assert templates.render_prompt(row, tokenizer, "chat") == "[user]1 + {prompt}[go]"
    assert templates.render_prompt(chat, tokenizer, "chat", "Add.") == "[system]Add.[user]1 + 1[go]"


def test_a_template_that_cannot_be_used_is_named():
    tokenizer, row = TASKS["addition"].build_tokenizer(), {"prompt": "1 + 1"}
    with pytest.raises(
        ValueError, match=r"prompt_template must be one of none, r1_zero, chat, or a text .* got 'r1zero'"
    ):
        templates.render_prompt(row, tokenizer, "r1zero")
    with pytest.raises(ValueError, match="system_prompt must be None for the text template 'r1_zero', got 'Add'"):
        templates.render_prompt(row, tokenizer, "r1_zero", "Add")
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        templates.render_prompt(row, tokenizer, "chat")
    talk = {"prompt": [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 1"}]}
    with pytest.raises(ValueError, match="'none' takes a text or one user message, got messages of system, user"):
        templates.render_prompt(talk, tokenizer, "none")


def test_what_the_prompt_opens_is_given_back_to_the_format_reward():
    tokenizer, row = TASKS["addition"].build_tokenizer(), {"prompt": "1 + 1 ="}
    sampled = " 1 + 1 = 2 </think> <answer> 2 </answer>"
    tokenizer.chat_template = CHAT.replace("[go]", "[go]<think>\n")
    for template in ("chat", "Think first. {prompt} <think>"):
        rendered = templates.render_prompt(row, tokenizer, template)
        assert templates.completion_opening(row, rendered) == "<think>"
        whole = templates.whole_completion(row, rendered, sampled)
        assert rewards.format_reward([""], [sampled]) == [0.0]
        assert rewards.format_reward([""], [whole]) == [1.0]
    for template in ("none", "r1_zero", "Reason after <think>. {prompt}"):
        rendered = templates.render_prompt(row, tokenizer, template)
        assert templates.whole_completion(row, rendered, sampled) == sampled


def test_a_cold_start_does_not_teach_what_the_prompt_opens():
    tokenizer, row = TASKS["addition"].build_tokenizer(), {"prompt": "1 + 1 ="}
    worked = "<think> 1 + 1 = 2 </think> <answer> 2 </answer>"
    opened = templates.render_prompt(row, tokenizer, "{prompt} <think>")
    assert opened + templates.remaining_completion(row, opened, worked) == f"1 + 1 = {worked}"
    assert templates.remaining_completion(row, "1 + 1 =", worked) == worked
    prefix = "<think> 1 + 1"
    started = {"prompt": f"1 + 1 = {prefix}", "completion_prefix": prefix}
    for given in (worked, worked.removeprefix(prefix)):
        assert templates.remaining_completion(started, started["prompt"], given) == " = 2 </think> <answer> 2 </answer>"


def test_a_row_in_the_middle_of_its_solution_goes_on_in_the_assistants_turn():
    tokenizer, prefix = TASKS["addition"].build_tokenizer(), "<think> units 1"
    text = {"prompt": f"1 + 1 = {prefix}", "completion_prefix": prefix}
    chat = {"prompt": [{"role": "user", "content": "1 + 1 ="}, {"role": "assistant", "content": prefix}],
            "completion_prefix": prefix}  # fmt: skip
    assert templates.render_prompt(text, tokenizer) == f"1 + 1 = {prefix}"
    assert templates.render_prompt(text, tokenizer, "r1_zero").endswith(f"User: 1 + 1 = Assistant: {prefix}")
    assert templates.render_prompt(text, tokenizer, "{prompt} <think>\n") == "1 + 1 = <think>\nunits 1"
    tokenizer.chat_template = CHAT
    for row in (text, chat):
        rendered = templates.render_prompt(row, tokenizer, "chat")
        assert rendered == f"[user]1 + 1 =[go] {prefix}"
        assert templates.whole_completion(row, rendered, "+ 1 </think>") == "<think> units 1 + 1 </think>"


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_groups_are_informative_where_rewards_differ(aggregation):
    nan = float("nan")
    groups = [[1.0, 1.0, 1.0], [0.0, 1.0, 0.0], [nan, 1.0, 1.0], [nan, 0.0, 1.0], [nan, nan, nan], [nan, nan, 1.0]]
    found = informative_groups(torch.tensor(groups).view(-1, 1), 3, None, aggregation)
    assert found.tolist() == [False, True, False, True, False, False]
    assert informative_groups(torch.empty(0, 1), 3, None, aggregation).shape == (0,)


def test_a_recipe_names_columns_and_template(tmp_path, model_settings):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"problem": f"{i} + 1 =", "label": i + 1}) for i in range(6)))
    columns = {"prompt_column": "problem", "answer_column": "label"}
    task = load_task(Recipe(dataset_name=str(path), **columns, **model_settings))
    assert {row["answer"] for row in [*task.train_rows, *task.eval_rows]} == set(range(1, 7))
    chat = load_task(Recipe(prompt_template="chat", device="cpu"))
    assert templates.render_prompt(chat.train_rows[0], chat.tokenizer, "chat").endswith("= <assistant>")
    assert chat.model.config.vocab_size == len(chat.tokenizer)


def test_a_recipe_with_an_unknown_template_is_refused():
    with pytest.raises(
        ValueError, match=r"prompt_template must be one of none, r1_zero, chat, or a text .* got 'zero'"
    ):
        Recipe(prompt_template="zero")


def test_the_loop_and_the_evaluation_reward_the_whole_completion():
    seen = []

    def collected(prompts, completions, **columns):
        seen.extend(completions)
        return [0.0] * len(completions)

    settings = {"max_completion_length": 3, "num_eval_prompts": 2, "device": "cpu", "max_steps": 1}
    recipe = Recipe(prompt_template="{prompt} <think>", **settings)
    task = load_task(recipe)
    next(GRPOLoop(task._replace(reward_functions={"collected": collected}), recipe).steps())
    report_of(task, task.eval_rows, recipe, check=collected)
    assert len(seen) == recipe.generation_batch_size + 2 * recipe.eval_samples + 2
    assert all(completion.startswith("<think>") for completion in seen)


def test_the_cold_start_teaches_what_the_prompt_leaves(monkeypatch):
    texts = []

    def recorded(tokenizer, prompts, completions):
        texts.extend(prompt + completion for prompt, completion in zip(prompts, completions, strict=True))
        return teacher_forced(tokenizer, prompts, completions)

    monkeypatch.setattr(supervised, "teacher_forced", recorded)
    recipe = Recipe(prompt_template="{prompt} <think>", sft_steps=2, device="cpu")
    task = load_task(recipe)
    assert len(list(train_on_traces(task.model, task.tokenizer, task.train_rows, recipe))) == 2
    assert len(texts) == 64
    assert all(text.count("<think>") == 1 for text in texts)
