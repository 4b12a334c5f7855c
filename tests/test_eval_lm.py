"""The adapter to lm-evaluation-harness, on a tiny random model and tasks of our own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import CHAT_TEMPLATE, run
from eval_model import LIMIT, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import homer_triton as ht
from homer_triton.evaluation.methods import Reading, make_readers, token_losses

pytest.importorskip("lm_eval", reason="the harness is not installed (the eval extra)")

import datasets
from lm_eval.tasks import TaskManager

from homer_triton.evaluation import lm as adapter
from homer_triton.evaluation.lm import HomerLM, evaluate_tasks, open_tasks, suffix_length

CONFIG = ht.HomerConfig(layers_warmup=0)
SENTENCE = "the grass is green and the water of the river runs over the stone . "
QUESTION = "\nWhat is the grass ?"
OPTIONS = ("green", "blue and yellow", "stone")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path) -> ht.Llama:
    return ht.load(folder, ops="torch")


@pytest.fixture(scope="module")
def lm(model: ht.Llama) -> HomerLM:
    return HomerLM(model, "homer", CONFIG)


@pytest.fixture(autouse=True)
def _own_data_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_tasks(folder: Path) -> Path:
    """A folder with a task of each kind, the second of two documents longer than the limit."""
    folder.mkdir()
    documents = [
        {"text": SENTENCE * times, "options": OPTIONS, "gold": 1, "answer": "green"}
        for times in (2, 20)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    ask = '"{{text}}\\nWhat is the grass ?"'
    own = {
        "choice": f"output_type: multiple_choice\ndoc_to_text: {ask}\n"
        "doc_to_choice: options\ndoc_to_target: gold\nmetric_list: [{metric: acc}]\n",
        "answer": f"output_type: generate_until\ndoc_to_text: {ask}\ndoc_to_target: answer\n"
        "generation_kwargs: {until: ['.'], max_gen_toks: 6}\n"
        "metric_list: [{metric: exact_match}]\n",
        "text": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\n'
        'doc_to_target: "{{text}}"\nmetric_list: [{metric: word_perplexity}]\n',
    }
    for name, lines in own.items():
        data = f"dataset_kwargs: {{data_files: {{test: {folder / 'data.jsonl'}}}}}\n"
        shared = f"task: own_{name}\ndataset_path: json\n{data}test_split: test\n"
        (folder / f"{name}.yaml").write_text(shared + lines)
    return folder


def ask(*args: Any) -> list[Any]:
    """Requests as the harness gives them."""
    return [SimpleNamespace(args=one) for one in args]


def peer_score(folder: Path, before: str, after: str) -> tuple[float, bool]:
    """transformers' log-likelihood of one text after another, and whether it is greedy."""
    peer = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(before + after)["input_ids"])
    start = len(tokenizer(before)["input_ids"])
    with torch.no_grad():
        logits = peer(ids[None]).logits[0, start - 1 : -1]
    chances = logits.log_softmax(-1).gather(1, ids[start:, None])
    return chances.sum().item(), bool((logits.argmax(-1) == ids[start:]).all())


def test_short_requests_score_like_transformers(lm: HomerLM, folder: Path) -> None:
    context = SENTENCE * 3 + "What is the grass?"
    likeliest = lm.generate_until(ask((context, {"max_gen_toks": 3})))[0]
    pairs = [(context, f" {option}") for option in (*OPTIONS, likeliest)]
    pairs += [("", "the grass is green"), (SENTENCE * 6, " " + (SENTENCE * 2)[: -len(" . ")])]
    found = lm.loglikelihood(ask(*pairs), disable_tqdm=True)
    expected = [peer_score(folder, *pair) for pair in pairs]
    assert [score for score, _ in found] == pytest.approx([s for s, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [greedy for _, greedy in found] == [False, False, False, True, False, False]
    assert lm._loglikelihood_tokens([(("", ""), [1, 5], [])]) == [(0.0, True)]


def test_logits_come_in_blocks(lm: HomerLM, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = (SENTENCE, SENTENCE * 3)
    (whole,) = lm.loglikelihood(ask(pair), disable_tqdm=True)
    monkeypatch.setattr(adapter, "LOGIT_ROWS", 5)
    (blocks,) = lm.loglikelihood(ask(pair), disable_tqdm=True)
    assert blocks[0] == pytest.approx(whole[0], abs=1e-4)


def test_the_longest_that_fits_is_the_plain_models(lm: HomerLM, model: ht.Llama) -> None:
    def refuse(*parts: object) -> Reading:
        raise AssertionError("the method was asked")

    reading_none = HomerLM(model, "homer", CONFIG)
    reading_none._reader = refuse
    ids = [1, *range(3, 3 + LIMIT - 5)]
    # Of the five tokens that follow, the last is never read.
    (short,) = reading_none._loglikelihood_tokens([(("", ""), ids, [5] * 5)])
    assert short[0] < 0
    with pytest.raises(AssertionError, match="asked"):
        reading_none._loglikelihood_tokens([(("", ""), ids, [5] * 6)])


@pytest.mark.parametrize("method", ["plain", "window", "homer", "sequential"])
def test_long_requests_go_through_the_method(model: ht.Llama, folder: Path, method: str) -> None:
    lm = HomerLM(model, method, CONFIG)
    context = SENTENCE * 20 + QUESTION
    found = lm.loglikelihood(ask(*((context, f" {option}") for option in OPTIONS)))
    ids = torch.tensor(lm.tok_encode(context))
    suffix = LIMIT // 2 // 4  # a quarter of a chunk: there is no line break in this vocabulary
    (reader,) = make_readers((method,), model, CONFIG).values()
    reading = reader(ids[:1], ids[1:-suffix], ids[-suffix:], 3)
    for (score, _), option in zip(found, OPTIONS, strict=True):
        after = torch.tensor(lm.tok_encode(option, add_special_tokens=False))
        assert score == pytest.approx(-sum(token_losses(reading, after)), abs=1e-4)
        if method == "plain":
            assert score == pytest.approx(peer_score(folder, context, f" {option}")[0], abs=1e-3)


def test_consecutive_requests_share_one_reading(
    model: ht.Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = HomerLM(model, "homer", CONFIG)
    reads = []
    own = lm._read
    monkeypatch.setattr(lm, "_read", lambda *a: reads.append(a[1]) or own(*a))
    contexts = (SENTENCE + QUESTION, SENTENCE * 20 + QUESTION)
    pairs = [(context, f" {option}") for context in contexts for option in OPTIONS]
    together = lm.loglikelihood(ask(*pairs))
    assert reads == [3, 3]
    alone = [lm.loglikelihood(ask(pair))[0] for pair in pairs]
    assert len(reads) == 8
    scores = [[score for score, _ in found] for found in (together, alone)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


@pytest.mark.parametrize("times", [3, 20])
def test_rolling_texts_are_scored_in_windows_like_transformers(
    lm: HomerLM, folder: Path, times: int
) -> None:
    (found,) = lm.loglikelihood_rolling(ask((SENTENCE * times,)), disable_tqdm=True)
    peer = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor(lm.tok_encode(SENTENCE * times))
    expected = 0.0
    # Windows of equal length but for the last, which looks back as far as it can.
    for start in range(0, len(ids) - 1, LIMIT):
        stop = min(start + LIMIT, len(ids) - 1)
        read = ids[max(0, stop - LIMIT) : stop + 1]
        if start == 0:
            read = ids[: stop + 1]
        with torch.no_grad():
            chances = peer(read[None, :-1]).logits[0].log_softmax(-1)
        picked = chances.gather(1, read[1:, None])
        expected += picked[-(stop - start) :].sum().item()
    assert found == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("times", [2, 20])
def test_answers_are_greedy_and_end_before_a_stop(lm: HomerLM, model: ht.Llama, times: int) -> None:
    context = SENTENCE * times + QUESTION
    (whole,) = lm.generate_until(ask((context, {"max_gen_toks": 6})))
    ids = torch.tensor(lm.tok_encode(context))
    if times == 2:
        reading = make_readers(("plain",), model, CONFIG)["plain"](ids[:1], ids[1:-4], ids[-4:], 6)
    else:
        reading = make_readers(("homer",), model, CONFIG)["homer"](
            ids[:1], ids[1:-16], ids[-16:], 6
        )
    assert whole == ht.generate(model, reading.encoded, max_new_tokens=6).text
    words = whole.split()
    assert len(words) == 6
    settings = {"until": ["nowhere", words[3]], "max_new_tokens": 6, "do_sample": False}
    (cut,) = lm.generate_until(ask((context, settings)))
    assert cut == whole[: whole.index(words[3])]
    (cut,) = lm.generate_until(ask((context, {"until": words[0], "max_gen_toks": 6})))
    assert cut == ""


def test_answers_end_with_the_end_token(model: ht.Llama) -> None:
    lm = HomerLM(model, "homer", CONFIG)
    (whole,) = lm.generate_until(ask((SENTENCE, {"max_gen_toks": 4})))
    second = lm.tok_encode(whole, add_special_tokens=False)[1]
    lm._ends = [second]
    (cut,) = lm.generate_until(ask((SENTENCE, {"max_gen_toks": 4})))
    assert cut == whole.split()[0]
    assert lm.eot_token_id == second


def test_samples_are_refused(lm: HomerLM) -> None:
    for settings in ({"do_sample": True}, {"temperature": 0.7}):
        with pytest.raises(ValueError, match="only greedy"):
            lm.generate_until(ask((SENTENCE, settings)))


def test_a_text_begins_just_once(folder: Path) -> None:
    model = ht.load(folder, ops="torch")
    assert 1 not in HomerLM(model, "homer", CONFIG).tok_encode("the <s> grass")[1:]
    lm = HomerLM(model, "homer", CONFIG, chat_template=True)
    bare = lm.tok_encode("the grass", add_special_tokens=False)
    assert lm.tok_encode("the grass") == [1, *bare]
    assert lm.tok_encode("<s> the grass") == [1, *bare]
    assert lm.tok_encode("") == [lm.prefix_token_id] == [1]
    lm.tokenizer.chat_template = CHAT_TEMPLATE
    chat = lm.apply_chat_template([{"role": "user", "content": "the grass"}])
    assert chat == "<s>w10 the grass w11 w12"
    assert lm.tok_encode(chat).count(1) == 1
    assert lm.chat_template(True) == CHAT_TEMPLATE
    assert lm.tokenizer_name == str(folder).replace("/", "__")


@pytest.mark.parametrize(
    ("text", "most", "suffix"),
    [
        ("story\nWho?\nAnswer:", 9, "Answer:"),
        ("story\nWho?\nAnswer:", 12, "Who?\nAnswer:"),
        ("story\nWho?\nAnswer:", 15, "Who?\nAnswer:"),
        ("story\nAnswer:", 3, "er:"),
        ("story\n", 3, "ry\n"),
        ("story", 3, "ory"),
        ("story", 9, "story"),
    ],
)
def test_the_suffix_is_the_last_whole_lines(text: str, most: int, suffix: str) -> None:
    letters = SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)))
    length = suffix_length(letters, [ord(letter) for letter in text], most)  # type: ignore[arg-type]
    assert text[-length:] == suffix


def test_the_harness_runs_a_task_of_each_kind(lm: HomerLM, folder: Path, tmp_path: Path) -> None:
    names = ("own_choice", "own_answer", "own_text")
    found = evaluate_tasks(lm, names, open_tasks(names, write_tasks(tmp_path / "tasks")))
    assert found["results"].keys() == set(names)
    scores = found["samples"]["own_choice"][0]["filtered_resps"]
    context = SENTENCE * 2 + QUESTION
    expected = [peer_score(folder, context, f" {option}")[0] for option in OPTIONS]
    assert [score for score, _ in scores] == pytest.approx(expected, abs=1e-4)
    few = evaluate_tasks(lm, names[:1], open_tasks(names[:1], tmp_path / "tasks"), limit=1)
    assert len(few["samples"]["own_choice"]) == 1


def test_the_command_leaves_results_without_a_network(folder: Path, tmp_path: Path) -> None:
    tasks, output = write_tasks(tmp_path / "tasks"), tmp_path / "run"
    options = ("--tasks", "own_choice,own_answer", "--include-path", tasks, "-o", output)
    command = ["eval", "lm", "--model", folder, *options, "--layers-warmup", "0", "--json"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-c", "from homer_triton.cli import main; main()", *map(str, command)],
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    printed, written = json.loads(done.stdout), json.loads((output / "results.json").read_text())
    assert printed["results"] == written["results"]
    assert written["results"]["own_choice"]["acc,none"] in (0, 0.5, 1)
    assert {"torch", "lm_eval", "command", "commit"} <= written["environment"].keys()
    config = json.loads((output / "config.json").read_text())
    assert config["settings"]["method"] == "homer"
    lines = (output / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [
        *("own_choice/0/none", "own_choice/1/none", "own_answer/0/none", "own_answer/1/none")
    ]


def _only_own(self: TaskManager, include_path: object, include_defaults: bool = True) -> None:
    """The harness takes ten seconds to list its own tasks."""
    TaskManager.__init__(self, include_path=include_path, include_defaults=False)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--tasks", "nothing", "--include-path", "tasks"), "'nothing' is not known to lm_eval"),
        (("--tasks", "own_text", "--include-path", "absent"), "There is no folder"),
        (("--tasks", ",", "--include-path", "tasks"), "--tasks is empty"),
        (("--tasks", "own_lost", "--include-path", "tasks"), "The tasks cannot be loaded"),
        (
            ("--tasks", "own_text", "--include-path", "tasks", "--method", "rag"),
            "'rag' is not known; choose from plain",
        ),
        (
            ("--tasks", "own_text", "--include-path", "tasks", "--apply-chat-template"),
            "has no chat template",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_no_folder(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    reason: str,
) -> None:
    monkeypatch.setattr(adapter.LoadedTasks, "__init__", _only_own)
    monkeypatch.chdir(tmp_path)
    tasks = write_tasks(tmp_path / "tasks")
    lost = (tasks / "text.yaml").read_text().replace("own_text", "own_lost")
    (tasks / "lost.yaml").write_text(lost.replace("data.jsonl", "lost.jsonl"))
    result = run("eval", "lm", "--model", folder, *options, "-o", tmp_path / "run")
    assert result.exit_code == 2, (result.output, result.exception)
    assert [line for line in result.stderr.splitlines() if line.startswith("homer: ")] == (
        result.stderr.splitlines()[-1:]
    )
    assert reason in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_missing_harness_is_said_in_one_sentence(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = run("eval", "lm", "--model", folder, "--tasks", "x", "-o", tmp_path / "run")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "pip install 'homer_triton[eval]'" in result.stderr
    assert not (tmp_path / "run").exists()
