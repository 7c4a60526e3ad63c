"""`shoal score` and `shoal lm-eval`: lm-eval's spellings, numbers, standard errors, groups and files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from shoal.cli import app
from shoal.errors import EvaluationError
from shoal.evals.quiet import quiet_libraries
from shoal.score import Scores, Speed, score_model

TASKS = ["pico_choice", "pico_next", "pico_write"]


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's bootstrap of standard errors would start one process per core."""
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")


@pytest.fixture(scope="module")
def tasks(pico: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pico tasks, and a group of two of them that lm-eval aggregates."""
    folder = tmp_path_factory.mktemp("grouped") / "tasks"
    shutil.copytree(pico.tasks, folder)
    group = {
        "group": "pico",
        "task": [{"group": "inner", "task": ["pico_next"]}, "pico_choice"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    (folder / "pico.yaml").write_text(json.dumps(group))
    return folder


def scored(pico: Any, tasks: list[str], **options: Any) -> Scores:
    options = {"include_path": pico.tasks, "device": "cpu", "bootstrap_iters": 100} | options
    return score_model(str(pico.model("left")), tasks, **options)


def stock(pico: Any, tasks: list[str], include_path: Path, **options: Any) -> dict[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    with quiet_libraries():
        results = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(pico.model("left")), "dtype": "float32"},
            tasks=tasks,
            device="cpu",
            batch_size=16,
            bootstrap_iters=100,
            task_manager=TaskManager(include_path=str(include_path), include_defaults=False),
            **options,
        )
    return dict(results or {})


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["score", *arguments])


def test_values_and_standard_errors_are_lm_evals_also_of_groups(pico: Any, tasks: Path) -> None:
    names = ["pico", "pico_write"]
    expected = stock(pico, names, tasks, num_fewshot=1)["results"]
    scores = scored(pico, names, include_path=tasks, num_fewshot=1)
    assert [(row.task, row.metric, row.depth, row.items) for row in scores.rows] == [
        ("pico", "acc,none", 0, 240),
        ("pico_next", "perplexity,none", 1, 120),
        ("pico_next", "acc,none", 1, 120),
        ("pico_choice", "acc,none", 1, 120),
        ("pico_write", "exact_match,none", 0, 120),
    ]
    for row in scores.rows:
        found = expected[row.task]
        assert row.value == pytest.approx(found[row.metric], rel=1e-5)
        assert row.stderr == pytest.approx(found[row.metric.replace(",", "_stderr,")], rel=1e-4)
        assert row.higher_is_better is (row.metric != "perplexity,none")
    assert scores.speed is not None and scores.speed.tokens > 120 * 6 and scores.speed.seconds > 0


@pytest.mark.parametrize("limit", [7, 0.1])
def test_a_limit_changes_no_prompt(pico: Any, tmp_path: Path, limit: float) -> None:
    """The first items have the few-shot examples that they have in a full run."""
    full = stock(pico, TASKS, pico.tasks, num_fewshot=3)["samples"]
    options: dict[str, Any] = {"num_fewshot": 3, "output_path": tmp_path, "log_samples": True}
    scores = scored(pico, TASKS, limit=limit, **options)
    count = 7 if limit == 7 else 12
    assert {row.items for row in scores.rows} == {count}
    for path, task in zip(scores.files[1:], TASKS, strict=True):
        samples = [json.loads(line) for line in path.read_text().splitlines()]
        keys = ("doc_id", "doc_hash", "prompt_hash", "target_hash")
        assert [[s[k] for k in keys] for s in samples] == [[s[k] for k in keys] for s in full[task][:count]]


def test_files_are_laid_out_as_lm_evals(pico: Any, tasks: Path, tmp_path: Path) -> None:
    from lm_eval.utils import get_results_filenames, get_sample_results_filenames, sanitize_model_name

    model = str(pico.model("left"))
    command = ["--tasks", "pico", "--include_path", str(tasks), "--device", "cpu", "--limit", "20"]
    assert run(model, *command, "--output_path", str(tmp_path / "shoal"), "--log_samples").exit_code == 0
    theirs = [
        "lm-eval",
        "run",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={model},dtype=float32",
        *command,
    ]
    done = CliRunner().invoke(app, [*theirs, "--output_path", str(tmp_path / "hf"), "--log_samples"])
    assert done.exit_code == 0, done.output
    found: dict[str, tuple[Any, dict[str, Any]]] = {}
    for name in ("shoal", "hf"):
        folder = tmp_path / name / sanitize_model_name(model)
        files = sorted(map(str, folder.iterdir()))
        (results,) = get_results_filenames(files)
        samples = get_sample_results_filenames(files)
        assert len(files) == 3
        rows = {
            Path(f).name.rpartition("_")[0]: [json.loads(line) for line in Path(f).read_text().splitlines()]
            for f in samples
        }
        found[name] = json.loads(Path(results).read_text()), rows
    (ours, our_samples), (hf, hf_samples) = found["shoal"], found["hf"]
    assert set(hf) <= set(ours)
    assert ours["task_hashes"] == hf["task_hashes"]
    assert (ours["model_source"], ours["model_name"]) == ("shoal", model)
    for key in ("group_subtasks", "versions", "n-shot", "higher_is_better", "n-samples"):
        assert ours[key] == hf[key]
    for task, metrics in hf["results"].items():
        assert set(metrics) == set(ours["results"][task])
    assert set(our_samples) == set(hf_samples)
    for task in hf_samples:
        assert [set(s) for s in our_samples[task]] == [set(s) for s in hf_samples[task]]


def test_lm_evals_own_command_line_knows_the_model(pico: Any, tmp_path: Path) -> None:
    arguments = f"pretrained={pico.model('left')},dtype=float32"
    command = ["lm-eval", "run", "--model", "shoal", "--model_args", arguments, "--tasks", "pico_choice"]
    command += ["--include_path", str(pico.tasks), "--device", "cpu", "--batch_size", "auto", "--limit", "8"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "shoal ({'pretrained'" in done.stdout and "|pico_choice|" in done.stdout


def test_arguments_are_passed_to_lm_eval_untouched() -> None:
    for arguments in (["--help"], ["run", "--help"], ["ls", "--help"], []):
        done = CliRunner().invoke(app, ["lm-eval", *arguments])
        assert done.exit_code == 0 and "lm-eval" in done.stdout and "Usage: shoal" not in done.stdout
    assert CliRunner().invoke(app, ["lm-eval", "run", "--no-such-thing"]).exit_code == 2


def test_both_spellings_of_every_option(pico: Any, tmp_path: Path) -> None:
    model, rest = str(pico.model("left")), ["--device", "cpu", "--dtype", "float32", "--limit", "4", "-q"]
    options = {
        "include-path": str(pico.tasks),
        "num-fewshot": "1",
        "batch-size": "auto:2",
        "system-instruction": "abc",
        "gen-kwargs": 'max_gen_toks=2,until=["a","b"]',
        "output-path": str(tmp_path / "out"),
    }
    tables = []
    for change in (str, lambda name: name.replace("-", "_")):
        flags = [part for name, value in options.items() for part in (f"--{change(name)}", value)]
        flags += [f"--{change('log-samples')}", f"--{change('fewshot-as-multiturn')}", "false"]
        done = run(model, "--tasks", ",".join(TASKS), *flags, *rest)
        assert done.exit_code == 0, done.output
        tables.append(done.stdout.partition(" tokens/s")[0].rpartition("\n")[0])
    assert tables[0] == tables[1] and "exact_match" in tables[0]
    (first, _) = sorted((tmp_path / "out").rglob("results_*.json"))
    config = json.loads(first.read_text())
    assert config["config"]["gen_kwargs"] == {"max_gen_toks": 2, "until": ["a", "b"]}
    assert config["system_instruction"] == "abc"
    (written, _) = sorted((tmp_path / "out").rglob("samples_pico_write_*.jsonl"))
    sample = json.loads(written.read_text().splitlines()[0])
    assert sample["arguments"]["gen_args_0"]["arg_0"].startswith("abc")
    assert sample["arguments"]["gen_args_0"]["arg_1"]["max_gen_toks"] == 2


@pytest.fixture
def chatty(pico: Any, tmp_path: Path) -> Path:
    """A copy of `left` with two named chat templates."""
    from shoal.tokenizer import load_tokenizer

    shutil.copytree(pico.model("left"), tmp_path / "chatty")
    tokenizer = load_tokenizer(pico.model("left"))
    body = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.chat_template = {"default": f"a{body}", "other": f"b{body}"}
    tokenizer.save_pretrained(tmp_path / "chatty")
    return tmp_path / "chatty"


def test_a_chat_template_by_flag_or_by_name(pico: Any, chatty: Path, tmp_path: Path) -> None:
    common = ["--tasks", "pico_write", "--include_path", str(pico.tasks), "--device", "cpu", "--limit", "2"]
    prompts = {}
    for name, flags in {
        "flag": ["--apply_chat_template"],
        "default": ["--apply-chat-template", "default"],
        "other": ["--apply_chat_template=other", "--fewshot_as_multiturn"],
        "none": [],
    }.items():
        out = tmp_path / name
        done = run(str(chatty), *flags, *common, "--output_path", str(out), "--log_samples")
        assert done.exit_code == 0, done.output
        (samples,) = out.rglob("samples_*.jsonl")
        prompts[name] = json.loads(samples.read_text().splitlines()[0])["arguments"]["gen_args_0"]["arg_0"]
    word = prompts["none"]
    assert prompts == {"flag": f"a{word}", "default": f"a{word}", "other": f"b{word}", "none": word}


REFUSED: dict[str, tuple[list[str], str]] = {
    "samples nowhere": (["--log_samples"], "--log_samples writes files: say where, by --output_path"),
    "no template": (["--apply_chat_template"], "has no chat template"),
    "multiturn alone": (["--fewshot_as_multiturn"], "--fewshot_as_multiturn needs --apply_chat_template"),
    "batch size": (["--batch_size", "many"], "--batch_size: expected a number of rows or auto, found 'many'"),
    "gen_kwargs": (["--gen_kwargs", "loud"], "--gen_kwargs: expected `key=value`, got 'loud'"),
    "limit": (["--limit", "0"], "--limit: expected a number of items or a share below 1, found 0"),
    "twice": (
        ["--tasks", "pico,pico_next"],
        "Duplicate task 'pico_next': found in both 'pico' and 'pico_next'",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_one_line(pico: Any, tasks: Path, what: str) -> None:
    flags, message = REFUSED[what]
    common = ["--tasks", "pico_next", "--include_path", str(tasks), "--device", "cpu"]
    done = run(str(pico.model("left")), *common, *flags)
    assert done.exit_code == 2
    assert message in done.stderr and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_an_unknown_template_and_a_broken_model(pico: Any, chatty: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    with pytest.raises(
        EvaluationError, match=r"no chat template 'othr'; did you mean 'other'\? valid: default, other"
    ):
        score_model(
            str(chatty), ["pico_next"], include_path=pico.tasks, device="cpu", apply_chat_template="othr"
        )
    shutil.copytree(pico.model("left"), tmp_path / "broken")
    state = load_file(tmp_path / "broken" / "model.safetensors")
    state["model.norm.weight"] = torch.full_like(state["model.norm.weight"], float("nan"))
    save_file(state, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EvaluationError, match=r"log-likelihood is not finite"):
        score_model(str(tmp_path / "broken"), ["pico_next"], include_path=pico.tasks, device="cpu")


def test_an_adapter_on_its_base(pico: Any, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    from shoal.merge.runtime import load_runtime

    torch.manual_seed(0)
    model = get_peft_model(
        load_runtime(pico.model("left")),  # type: ignore[arg-type]
        LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False),
    )
    model.save_pretrained(str(tmp_path / "lora"))
    both = f"{pico.model('left')}+{tmp_path / 'lora'}"
    options: dict[str, Any] = {"include_path": pico.tasks, "device": "cpu", "bootstrap_iters": 100}
    (_, found) = score_model(both, ["pico_next"], **options).rows
    merged = model.merge_and_unload()
    shutil.copytree(pico.model("left"), tmp_path / "merged")
    merged.save_pretrained(str(tmp_path / "merged"))
    (_, expected) = score_model(str(tmp_path / "merged"), ["pico_next"], **options).rows
    (_, plain) = score_model(str(pico.model("left")), ["pico_next"], **options).rows
    assert found.value == pytest.approx(expected.value, rel=1e-5)
    assert found.value != pytest.approx(plain.value, rel=1e-3)


def test_words_of_speed() -> None:
    assert Speed(12_000, 2.0).words() == "6,000 tokens/s asked for"
    words = "6,000 tokens/s asked for, 1,500 computed (25% of the rate of this machine's matrix products)"
    assert Speed(12_000, 2.0, 0.25, 3_000).words() == words
