"""Bad input: one sentence on stderr, exit code 2, no traceback, nothing half-written."""

import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import edit_json
from command_line import checkpoint, run, text
from fuzz.processes import Ended, Homer
from safetensors.torch import load_file, save_file
from typer.testing import Result

from homer_triton import Calibration, encode, load
from homer_triton.cli.output import print_json


@dataclass
class Workplace:
    """A folder with a good checkpoint and a good text, for a test to spoil."""

    folder: Path
    model: Path
    context: Path

    def encode(self, *options: object) -> Result:
        """`homer encode` to `out.safetensors`."""
        output = self.folder / "out.safetensors"
        return run(
            *("encode", "--model", self.model, "--context-file", self.context, "-o", output),
            *options,
        )


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    context = tmp_path / "context.txt"
    context.write_text(text(100))
    return Workplace(tmp_path, checkpoint(tmp_path / "model"), context)


def assert_refused(result: Result, *phrases: str) -> None:
    assert result.exit_code == 2, (result.stdout, result.stderr, result.exception)
    assert result.stdout == ""
    assert result.stderr.startswith("homer: ")
    assert result.stderr.count("\n") == 1
    for phrase in phrases:
        assert phrase in result.stderr


def test_the_good_case_is_good(place: Workplace) -> None:
    assert place.encode().exit_code == 0


def _no_checkpoint(place: Workplace) -> None:
    place.model = place.folder / "absent" / "model"


def _empty_folder(place: Workplace) -> None:
    place.model = place.folder / "empty"
    place.model.mkdir()


def _corrupt_config(place: Workplace) -> None:
    (place.model / "config.json").write_text("{not json")


def _other_architecture(place: Workplace) -> None:
    edit_json(place.model / "config.json", lambda config: config | {"model_type": "gpt2"})


def _corrupt_tokenizer(place: Workplace) -> None:
    (place.model / "tokenizer.json").write_text("{}")


def _no_tokenizer(place: Workplace) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (place.model / name).unlink()


def _nested_tokenizer_config(place: Workplace) -> None:
    (place.model / "tokenizer_config.json").write_text('{"a": ' + "[" * 200_000)


def _own_code(place: Workplace, name: str = "tokenizer_config.json") -> None:
    (place.model / "own.py").write_text("open('ran', 'w')\nclass Own: ...\n")
    own = {"AutoTokenizer": ["own.Own", "own.Own"]}
    edit_json(place.model / name, lambda config: config | {"auto_map": own})


def _own_code_of_an_unknown_class(place: Workplace) -> None:
    _own_code(place)
    edit_json(place.model / "tokenizer_config.json", lambda c: c | {"tokenizer_class": "Own"})


def _own_code_named_by_the_config(place: Workplace) -> None:
    _own_code(place, "config.json")


def _truncated_shard(place: Workplace) -> None:
    weights = place.model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _missing_shard(place: Workplace) -> None:
    place.model = checkpoint(place.folder / "sharded", shards=True)
    sorted(place.model.glob("model-*.safetensors"))[1].unlink()


def _nan_weights(place: Workplace) -> None:
    weights = place.model / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})


def _larger_tokenizer(place: Workplace) -> None:
    place.model = checkpoint(place.folder / "larger", words=200)
    place.context.write_text("w3 w150 w4")


def _empty_context(place: Workplace) -> None:
    place.context.write_text("")


def _latin1_context(place: Workplace) -> None:
    place.context.write_bytes("déjà vu".encode("latin-1"))


def _context_folder(place: Workplace) -> None:
    place.context = place.folder


def _no_context(place: Workplace) -> None:
    place.context = place.folder / "absent.txt"


@pytest.mark.parametrize(
    ("spoil", "phrase"),
    [
        (_no_checkpoint, "absent"),
        (_empty_folder, "config.json"),
        (_corrupt_config, "config.json is not valid JSON"),
        (_other_architecture, "'gpt2'"),
        (_corrupt_tokenizer, "The tokenizer in"),
        (_no_tokenizer, "no tokenizer"),
        (_nested_tokenizer_config, "tokenizer_config.json is not valid JSON"),
        (_own_code, "code of its own (auto_map in tokenizer_config.json), which is never run"),
        (_own_code_of_an_unknown_class, "code of its own"),
        (_own_code_named_by_the_config, "code of its own (auto_map in config.json)"),
        (_truncated_shard, "model.safetensors"),
        (_missing_shard, "names the shard model-00002"),
        (_nan_weights, "model.norm.weight"),
        (_larger_tokenizer, "token id 150, outside the vocabulary of 96"),
        (_empty_context, "The context is empty"),
        (_latin1_context, "not UTF-8 text (byte 1 is 0xe9)"),
        (_context_folder, "Is a directory"),
        (_no_context, "There is no file"),
    ],
)
def test_spoilt_files(place: Workplace, spoil: Callable[[Workplace], None], phrase: str) -> None:
    spoil(place)
    before = sorted(place.folder.rglob("*"))
    assert_refused(place.encode(), phrase)
    assert sorted(place.folder.rglob("*")) == before


def test_affix_too_long_for_a_chunk(place: Workplace) -> None:
    result = place.encode("--prefix", text(20), "--suffix", text(20))
    assert_refused(result, "max_chunk_len=32", "prefix (21 tokens) plus suffix (20)")


def test_more_chunks_than_layers_can_merge(place: Workplace) -> None:
    place.context.write_text(text(1000))
    assert_refused(place.encode(), "raise max_chunk_len or lower layers_warmup")


def test_calibration_of_another_model(place: Workplace) -> None:
    bias = place.folder / "bias.safetensors"
    Calibration(torch.zeros(3, 64), model="another").save(bias)
    assert_refused(place.encode("--calibration", bias), "made for another model (another")


def test_calibration_too_short_for_the_chunk(place: Workplace) -> None:
    bias = place.folder / "bias.safetensors"
    Calibration(torch.zeros(3, 8), model=load(place.model).fingerprint).save(bias)
    assert_refused(place.encode("--calibration", bias), "distances up to 7", "max_chunk_len")


def test_calibration_that_is_none(place: Workplace) -> None:
    assert_refused(place.encode("--calibration", place.context), "context.txt is neither")
    assert_refused(place.encode("--calibration", "absent"), "no calibration file absent")


@pytest.mark.parametrize(
    "command",
    [
        ("encode", "--model", "absent/model", "--context-file", "absent.txt"),
        ("calibrate", "--model", "absent/model", "--text", "absent.txt"),
    ],
)
def test_output_that_cannot_be_written_is_refused_first(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    assert_refused(run(*command, "-o", tmp_path / "no" / "out.safetensors"), "Cannot write")
    assert_refused(run(*command, "-o", tmp_path), "Cannot write", "it is a folder")
    assert list(tmp_path.iterdir()) == []


def test_no_command_writes_over_what_it_reads(place: Workplace) -> None:
    model, context = place.model, place.context
    encoded, bias = place.folder / "out.safetensors", place.folder / "bias.safetensors"
    assert place.encode().exit_code == 0
    Calibration(torch.zeros(3, 64)).save(bias)
    weights = model / "model.safetensors"
    source = ("--model", model, "--context-file", context)
    settings = ("--calibration", bias)
    page = ("show", encoded, "--model", model)
    run_folder = place.folder / "run"
    run_folder.mkdir()
    novel = place.folder / "novel.txt"
    novel.write_text(text(400))
    os.link(novel, run_folder / "metrics.json")
    asked = ("--model", model, "--methods", "plain", "--no-plots")
    calibrate = ("calibrate", "--model", model, "--text", context)
    cases: list[tuple[tuple[object, ...], str]] = [
        (("encode", *source, "-o", context), "--context-file"),
        (("encode", *source, "-o", weights), "--model"),
        (("encode", *source, *settings, "-o", bias), "--calibration"),
        (("compress", *source, "-o", weights), "--model"),
        (("compress", *source, *settings, "-o", bias), "--calibration"),
        ((*calibrate, "-o", weights), "--model"),
        ((*calibrate[:-1], bias, "-o", bias), "--text"),
        ((*page, "-o", encoded), "ENCODED"),
        ((*page, "-o", weights), "--model"),
        ((*page, "-o", place.folder / "page.html", "--png", encoded), "ENCODED"),
        (("eval", "perplexity", *asked, "--text", novel, "-o", run_folder), "--text"),
        (("eval", "passkey", *asked, "--lengths", 200, "-o", model), "--model"),
    ]
    before = {path: path.read_bytes() for path in place.folder.rglob("*") if path.is_file()}
    for command, option in cases:
        result = run(*command)
        assert_refused(result, f"which {option} reads; give another name")
        assert {p: p.read_bytes() for p in place.folder.rglob("*") if p.is_file()} == before
    same = run(*page, "-o", place.folder / "a", "--png", place.folder / "a")
    assert_refused(same, "-o and --png both name")


@pytest.mark.process
def test_standard_input_may_be_the_output_too(place: Workplace) -> None:
    command = [sys.executable, "-c", "from homer_triton.cli import main; main()", "encode"]
    the_text = place.context.read_text()
    with place.context.open() as stdin:
        done = subprocess.run(
            [*command, "--model", place.model, "--context-file", "-", "-o", place.context],
            stdin=stdin,
            capture_output=True,
            text=True,
        )
    assert (done.returncode, done.stdout) == (2, "")
    assert "which --context-file reads" in done.stderr
    assert place.context.read_text() == the_text


def test_names_that_are_not_utf8(place: Workplace) -> None:
    folder = os.fsencode(place.folder)
    context, output, page = (folder + b"/" + x for x in (b"\xe9.txt", b"\xe9.st", b"\xe9.html"))
    os.rename(place.context, context)
    model = os.fsencode(place.model)
    for arguments in (
        [b"encode", b"--context-file", context, b"-o", output],
        [b"encode", b"--context-file", context, b"-o", output, b"--json"],
        [b"show", output, b"-o", page],
        [b"generate", b"--encoded", output, b"--max-new-tokens", b"3"],
    ):
        done = forked(place, *arguments, b"--model", model)
        assert done.code == 0, done.stderr
        if b"--json" in arguments:
            written = json.loads(done.stdout)["output"]
            assert os.fsencode(written) == output
    os.remove(output)
    os.rename(model, model + b"\xe9")
    for arguments, reason in (
        ([b"show", output, b"-o", page], "There is no encoded context"),
        ([b"encode", b"--context-file", context, b"-o", output], "is not UTF-8, which"),
    ):
        done = forked(place, *arguments, b"--model", model + b"\xe9")
        assert (done.code, done.stdout) == (2, "")
        assert reason in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("output", ["", "."])
def test_an_output_without_a_name(place: Workplace, output: str) -> None:
    assert_refused(place.encode("-o", output), "give the name of a file")


def test_calibration_named_so_that_it_cannot_be_read(tmp_path: Path) -> None:
    result = run("calibrate", "--model", "m", "--text", "t", "-o", tmp_path / "bias.pt")
    assert_refused(result, ".safetensors")


def test_calibration_text_too_short(place: Workplace) -> None:
    short = place.folder / "short.txt"
    short.write_text(text(5))
    output = place.folder / "bias.safetensors"
    result = run("calibrate", "--model", place.model, "--text", short, "-o", output)
    assert_refused(result, "have 5 tokens, a segment needs 32")
    assert not output.exists()


def test_generate_takes_one_source(place: Workplace) -> None:
    assert_refused(run("generate", "--model", place.model), "--context-file", "--encoded")
    both = ("--context-file", place.context, "--encoded", place.context)
    assert_refused(run("generate", "--model", place.model, *both), "--context-file", "--encoded")


def test_generate_refuses_settings_that_an_encoding_has_fixed(place: Workplace) -> None:
    options = ("--encoded", "e.safetensors", "--recompute", "all", "--target-len", 8)
    result = run("generate", "--model", place.model, *options)
    assert_refused(result, "--target-len, --recompute cannot change what e.safetensors holds")


def test_generate_refuses_files_that_are_no_encoding(place: Workplace) -> None:
    for file, phrase in ((place.context, "is not an encoded context"), ("absent", "no encoded")):
        assert_refused(run("generate", "--model", place.model, "--encoded", file), phrase)


def test_generate_refuses_another_models_encoding(place: Workplace) -> None:
    assert place.encode().exit_code == 0
    other = checkpoint(place.folder / "other", seed=1)
    output = place.folder / "out.safetensors"
    result = run("generate", "--model", other, "--encoded", output, "--json")
    assert result.exit_code == 2
    assert "encoded by another model" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--top-k", 5], "set temperature above 0"),
        (["--top-p", 0, "--temperature", 1], "top_p=0.0 must be above 0"),
    ],
)
def test_generate_refuses_sampling_settings_before_it_reads_the_text(
    place: Workplace, settings: list[object], message: str
) -> None:
    result = run("generate", "--model", place.model, "--context-file", "absent.txt", *settings)
    assert_refused(result, message)


@pytest.mark.parametrize(
    "scaling",
    [
        *("{", "[]", '{"rope_type": "magic"}', "[" * 200_000),
        '{"rope_type": "yarn", "factor": Infinity}',
    ],
)
def test_rope_scaling_that_is_none(place: Workplace, scaling: str) -> None:
    assert_refused(place.encode("--rope-scaling", scaling), "rope")


@pytest.mark.parametrize(
    ("option", "value"), [("--dtype", "int8"), ("--ops", "cuda"), ("--device", "toaster")]
)
def test_unknown_names(place: Workplace, option: str, value: str) -> None:
    assert_refused(place.encode(option, value), value)


def test_plan_takes_one_length(place: Workplace) -> None:
    assert_refused(run("plan", "--model", place.model), "--context-len", "--context-file")


def test_usage_errors_are_short() -> None:
    for arguments in (("encode", "--modle", "x"), ("plan",), ("paint",)):
        result = run(*arguments)
        assert result.exit_code == 2
        assert result.stdout == ""
        assert len(result.stderr.splitlines()) <= 5


def test_out_of_memory_says_what_to_change(place: Workplace) -> None:
    result = run(
        *("generate", "--model", place.model, "--context-file", place.context),
        *("--max-new-tokens", 10**12),
    )
    assert result.exit_code == 2
    assert "homer: out of memory; lower --max-chunk-len" in result.stderr.splitlines()[-1]


def test_bugs_keep_their_traceback(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("homer_triton.encode", broken)
    assert isinstance(place.encode().exception, RuntimeError)


@pytest.mark.process
def test_interrupt_and_traceback_in_a_real_process(place: Workplace) -> None:
    pipe = place.folder / "pipe"
    os.mkfifo(pipe)
    command = [sys.executable, "-c", "from homer_triton.cli import main; main()", "encode"]
    output = place.folder / "out.safetensors"
    process = subprocess.Popen(
        [*command, "--model", place.model, "--context-file", pipe, "-o", output],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background may have inherited that interrupts are ignored.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    with pipe.open("w"):  # opens when the command does, and keeps it waiting for the text
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr) == (130, "", "homer: interrupted.\n")
    assert sorted(place.folder.iterdir()) == sorted([place.context, place.model, pipe])


HOMER = [sys.executable, "-c", "from homer_triton.cli import main; main()"]
SHAPE = ("--context-len", "60", "--suffix-len", "5")


def plan_in_a_process(place: Workplace, redirection: str) -> tuple[int, str, str]:
    """A cold process's exit code, stdout and stderr, run by a shell."""
    command = shlex.join([*HOMER, "plan", "--model", str(place.model), *SHAPE])
    done = subprocess.run(
        ["bash", "-c", f"{command} {redirection}"], capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


def forked(place: Workplace, *arguments: str | bytes, **streams: Any) -> Ended:
    """How a process of its own ends, which starts with everything imported."""
    words = [os.fsdecode(argument) for argument in arguments]
    return Homer(words, place.folder, place.folder / "streams", **streams).wait(60)


def plan(place: Workplace, *options: str, **streams: Any) -> Ended:
    """How `homer plan` ends in a forked process."""
    return forked(place, "plan", "--model", str(place.model), *SHAPE, *options, **streams)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_result_that_cannot_be_written(place: Workplace, options: tuple[str, ...]) -> None:
    done = plan(place, *options, stdout="/dev/full")
    found = (done.code, done.stderr)
    assert found == (2, "homer: Cannot write the result: No space left on device.\n")


@pytest.mark.process
def test_a_reader_that_has_heard_enough(place: Workplace) -> None:
    found = plan_in_a_process(place, "| true; exit ${PIPESTATUS[0]}")
    assert found == (1, "", "")


@pytest.mark.process
def test_closed_streams(place: Workplace) -> None:
    closed = ("plan", "--model", str(place.model), "--context-file", "-")
    done = forked(place, *closed, stdin=None)
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr == "homer: Cannot read standard input: it is closed.\n"
    assert plan_in_a_process(place, ">&-") == (0, "", "")
    code, shown, _ = plan_in_a_process(place, "2>&-")
    assert (code, shown.startswith("66 tokens")) == (0, True)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_terminals_of_few_letters(place: Workplace, encoding: str) -> None:
    done = plan(place, encoding=encoding)
    assert (done.code, done.stderr) == (0, "")
    assert "------  ------" in done.stdout
    place.model = place.folder / "─é𝔸…"
    done = plan(place, encoding=encoding)
    accent = "\ufffd" if encoding == "latin-1" else r"\xe9"  # the stream is read as UTF-8
    assert (done.code, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert rf"/-{accent}\U0001d538..." in done.stderr


def test_json_holds_whatever_the_terminal_can_show(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result = {"text": "─é𝔸\udcff"}
    for encoding in ("ascii", "latin-1", "utf-8"):
        written = io.BytesIO()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
            print_json(result)
            sys.stdout.flush()
            assert json.loads(written.getvalue().decode(encoding)) == result


@pytest.mark.parametrize("option", ["--prompt", "--prefix", "--suffix"])
def test_text_that_is_none(place: Workplace, option: str) -> None:
    assert_refused(place.encode(option, "what\udcff"), f"{option} is not Unicode text: character 4")
    with pytest.raises(ValueError, match=r"context is not Unicode text: character 2.*U\+D800"):
        encode(load(place.model), "w3\ud800")


def test_a_gap_that_is_no_text(place: Workplace) -> None:
    shape = ("--model", place.model, "--context-file", place.context)
    result = run("compress", *shape, "--gap", "\udcff")
    assert result.exit_code == 2
    assert "gap is not Unicode text" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("command", ["encode", "generate", "compress", "plan"])
def test_a_model_of_a_name_too_long(place: Workplace, command: str) -> None:
    output = ("-o", place.folder / "out") if command == "encode" else ()
    result = run(command, "--model", "x" * 5000, "--context-file", place.context, *output)
    assert_refused(result, "There is no checkpoint folder at xxx", "File name too long")


@pytest.mark.parametrize(
    "settings",
    [
        ("--max-new-tokens", 10**20),
        ("--temperature", "1e-40"),
        ("--temperature", "nan"),
        ("--seed", 2**64),
    ],
)
def test_generate_refuses_numbers_before_it_reads_the_text(
    place: Workplace, settings: tuple[object, ...]
) -> None:
    result = run("generate", "--model", place.model, "--context-file", "absent.txt", *settings)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert str(settings[0]).strip("-").replace("-", "_") in result.stderr.replace("-", "_")
    assert "absent.txt" not in result.stderr


def test_evaluations_refuse_seeds_before_the_work(place: Workplace) -> None:
    output = ("-o", place.folder / "run")
    result = run("eval", "passkey", "--model", place.model, "--seed", 2**64, *output)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--seed" in result.stderr
    assert not (place.folder / "run").exists()


def test_a_chat_template_that_fails(place: Workplace) -> None:
    checkpoint(place.model, chat=True)
    (place.model / "chat_template.jinja").write_text("{{ 1 // 0 }}")
    assert_refused(place.encode(), "The chat template fails", "use --no-chat-template")


SLOW_IMPORT = """
import sys, time
from importlib.abc import MetaPathFinder

class Slow:
    def __del__(self):
        {drop}

class Finder(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {name!r}:
            print("importing", file=sys.stderr, flush=True)
            {meanwhile}

sys.meta_path.insert(0, Finder())
from homer_triton.cli import main
main()
"""
WAIT = "time.sleep(20)"
CATCH = "\n            ".join(["try:", f"    {WAIT}", "except BaseException:", "    "])


@pytest.mark.process
@pytest.mark.parametrize(
    ("name", "drop", "meanwhile"),
    [
        ("typer", "pass", WAIT),
        ("torch", "pass", WAIT),
        # Where Python drops the exception, and where a library does.
        ("torch", WAIT, "Slow()"),
        ("torch", "pass", CATCH + "pass"),
        ("torch", "pass", CATCH + "raise ImportError"),
    ],
    ids=["typer", "torch", "destructor", "swallowed", "converted"],
)
def test_interrupts_while_libraries_are_imported(
    place: Workplace, name: str, drop: str, meanwhile: str
) -> None:
    script = SLOW_IMPORT.format(name=name, drop=drop, meanwhile=meanwhile)
    command = ["generate", "--model", place.model, "--context-file", place.context]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *command, "--max-new-tokens", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "importing\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr.splitlines()[-1]) == (130, "homer: interrupted.")
    assert "Traceback" not in stderr


def test_an_interrupt_while_options_are_read() -> None:
    script = """
import os, signal
from homer_triton.cli import commands, main
def interrupted(*arguments): os.kill(os.getpid(), signal.SIGINT)
commands.ReportingGroup.parse_args = interrupted
main()
"""
    ended = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert (ended.returncode, ended.stderr.strip()) == (130, "homer: interrupted.")


def test_json_errors_leave_stdout_empty(place: Workplace) -> None:
    _empty_context(place)
    assert_refused(place.encode("--json"), "The context is empty")
