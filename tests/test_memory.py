"""Memory hardly grows with the length: slots against their bound, and a process's peak."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import random_tokens
from checkpoints import random_model, save_checkpoint
from rank_processes import run_ranks

import homer_triton as ht
from homer_triton.demo import CHECKPOINT
from homer_triton.engine.shares import Shares
from homer_triton.engine.tree import build_plan
from homer_triton.evaluation.memory import forget_peak, peak
from homer_triton.kernels.products import has_instructions

SETTINGS = {"max_chunk_len": 128, "target_len": 128, "layers_warmup": 1}
AFFIX = 8

# Runs `case` for each list of arguments in a process of its own, forked from one that has imported
# everything; prints what it returns, a line each.
FORK = """
import json, os, sys
ht.load, ht.encode, ht.from_transformers  # imported when they are first named
for arguments in json.loads(sys.argv[1]):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            print(json.dumps(case(*arguments)), flush=True)
            os._exit(0)
        finally:
            os._exit(1)
    if os.waitpid(child, 0)[1]:
        sys.exit(1)
"""

# How much a process's resident memory grows at its peak, and what the plan says, in bytes: a random
# model, wide enough for its numbers to outweigh the process's own.
PREDICT = """
import re
from pathlib import Path
import torch
import homer_triton as ht
from homer_triton.engine.heap import trim_heap
from transformers import LlamaConfig, LlamaForCausalLM
torch.set_num_threads(1)
def resident(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
def case(tokens, leaf_batch, documents, dtype, recompute):
    dtype = getattr(torch, dtype)
    sizes = LlamaConfig(hidden_size=512, intermediate_size=1376, num_hidden_layers=12,
        num_attention_heads=8, num_key_value_heads=8, vocab_size=256, max_position_embeddings=1024)
    model = ht.from_transformers(LlamaForCausalLM(sizes).to(dtype), ops="torch")
    config = ht.HomerConfig(layers_warmup=4, leaf_batch=leaf_batch, recompute=recompute)
    texts = list(torch.randint(256, (documents, tokens)))
    def encode():
        return ht.encode_batch(model, texts, [1] * 16, [[2] * 16] * documents, config)[0]
    encode()  # libraries make and keep kernels for every shape
    trim_heap()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    plan, size = encode().plan, dtype.itemsize
    return resident("VmHWM") - before, plan.memory(model.config, size, documents, on_gpu=False)
"""

# The same of a model whose largest matrix weighs more, where it is unpacked, than all else does.
PREDICT_QUANTIZED = """
import torch
import homer_triton as ht
from homer_triton.evaluation.memory import forget_peak, peak
torch.set_num_threads(1)
def case(path, dtype, recompute):
    model = ht.load(path, "cpu", dtype, ops="torch", quantize="int8")
    config = ht.HomerConfig(128, 128, layers_warmup=1, leaf_batch=1, recompute=recompute)
    tokens = torch.randint(96, (500,))
    for _ in range(2):  # libraries make and keep kernels for every shape
        before = forget_peak()
        encoded = ht.encode(model, tokens, [1] * 8, [2] * 8, config)
        measured = peak() - before
    size = model.dtype.itemsize
    return measured, encoded.plan.memory(model.config, size, on_gpu=False), model.config.unpacked
"""

# The high-water mark of a process's resident memory, in KiB.
ENCODE = """
import re
from pathlib import Path
import torch
import homer_triton as ht
torch.set_num_threads(1)
def case(path, tokens, affix, *settings):
    model = ht.load(path, "cpu", "float32", ops="torch")
    ids = torch.randint(3, model.config.vocab_size, (tokens,))
    config = ht.HomerConfig(*settings, leaf_batch=8)
    ht.encode(model, ids[affix:-affix], ids[:affix], ids[-affix:], config)
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def forked(script: str, cases: list[tuple[Any, ...]]) -> list[Any]:
    """What `case` of a script returns for each list of arguments."""
    done = subprocess.run(
        [sys.executable, "-c", script + FORK, json.dumps(cases, default=str)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(("prefix", "suffix"), [(0, 1), (16, 16), (1, 100)])
def test_slots_stay_within_a_chunk_and_one_waiting_half_for_each_height(
    prefix: int, suffix: int
) -> None:
    """For up to 512 leaves: `M + h·M/2` and a prefix, plus what a suffix longer than the prefix
    adds to each of the h nodes that wait, since each one keeps its own suffix.
    """
    chunk = 2048
    room = chunk - prefix - suffix
    for leaves in (*range(1, 70), *range(70, 513, 37), 127, 128, 129, 255, 256, 257, 511, 512):
        for context in (room * leaves, room * (leaves - 1) + 1):
            plan = build_plan(prefix, context, suffix, 32, chunk, chunk, 8)
            bound = chunk + plan.height * chunk // 2 + prefix
            bound += plan.height * max(suffix - prefix, 0) // 2
            assert plan.peak_slots <= bound, (leaves, context)


@pytest.mark.process
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's /proc")
def test_ranks_take_the_memory_that_is_planned(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 12}
    hf_model = random_model(**sizes, num_attention_heads=8, num_key_value_heads=8)
    model = ht.from_transformers(hf_model, ops="torch")
    config = ht.HomerConfig(256, 256, 4, recompute="none")
    tokens = random_tokens(4000)

    def share(rank: int) -> tuple[int, int]:
        torch.set_num_threads(1)
        for _ in range(2):  # libraries make and keep kernels for every shape
            before = forget_peak()
            ht.encode(model, tokens, tokens[:16], tokens[-16:], config, ranks=ht.Ranks())
        plan = ht.plan(model, 4000, 16, 16, config, 4, on_gpu=False, ranks=3)
        planned = Shares(plan, 3).costs(model.config, 4, on_gpu=False)[rank].memory
        return peak() - before, planned

    for measured, planned in run_ranks(3, tmp_path, share):
        assert 0.6 * planned <= measured <= 1.1 * planned, (measured, planned)


@pytest.mark.slow
@pytest.mark.parametrize("leaves", [1, 2, 3, 5, 8, 31, 100, 257])
def test_an_encoding_takes_the_slots_that_its_plan_says(leaves: int) -> None:
    hf_model = random_model(hidden_size=16, intermediate_size=16, num_hidden_layers=11)
    model = ht.from_transformers(hf_model, ops="torch")
    room, chunk = 12, 16
    tokens = random_tokens(room * leaves + 4)
    config = ht.HomerConfig(chunk, chunk, 1, leaf_batch=1)
    encoded = ht.encode(model, tokens[2:-2], tokens[:2], tokens[-2:], config)
    height = (leaves - 1).bit_length()
    assert encoded.plan.height == height
    assert encoded.stats.peak_slots == encoded.plan.peak_slots <= chunk + height * chunk // 2 + 2


@pytest.mark.process
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's /proc")
def test_the_process_peak_hardly_grows_from_8k_to_64k_tokens() -> None:
    lengths = (8192, 65_536)
    settings = (AFFIX, *SETTINGS.values())
    short, long = forked(ENCODE, [(CHECKPOINT, tokens, *settings) for tokens in lengths])
    cache_row = 2 * 16 * 128 * 4
    assert 0.15 * short * 1024 < 65_536 / 2 * cache_row, "too small to see a linear growth"
    assert long <= 1.15 * short


@pytest.mark.process
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's /proc")
def test_the_plan_predicts_the_process_peak() -> None:
    cases = [
        (4096, 8, 1, "float32", "none"),
        (1024, 2, 3, "bfloat16", "none"),
        (2048, 1, 1, "float32", "suffix"),
        (2048, 1, 1, "float32", "all"),
        (1024, 2, 3, "bfloat16", "all"),
    ]
    for case, (measured, predicted) in zip(cases, forked(PREDICT, cases), strict=True):
        *_, dtype, recompute = case
        # Without pools the activations are the most: a guess of a heap's holes, and in half
        # precision the plan allows for chips that compute it in float32.
        spare = {"float32": 1.2, "bfloat16": 1.4}[dtype] if recompute == "all" else 1.1
        # What a chip without instructions for bfloat16 takes beside is not all in the plan yet.
        wide = dtype == "bfloat16" and not has_instructions(torch.bfloat16)
        assert (0.75 if wide else 0.9) * measured <= predicted <= spare * measured, case


@pytest.mark.process
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's /proc")
def test_the_plan_knows_of_matrices_that_are_unpacked(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    sizes = {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 5}
    sizes |= {"max_position_embeddings": 256}
    save_checkpoint(tmp_path, num_attention_heads=16, num_key_value_heads=2, **sizes)
    cases = [(tmp_path, "bfloat16", "none"), (tmp_path, "float32", "all")]
    for (_, name, _), found in zip(cases, forked(PREDICT_QUANTIZED, cases), strict=True):
        measured, planned, elements = found
        dtype = getattr(torch, name)
        assert elements == 1024 * 8192
        # What a chip without instructions for bfloat16 takes beside is not all in the plan yet.
        wide = name == "bfloat16" and not has_instructions(torch.bfloat16)
        most = (1.3 if wide else 1.1) * planned
        assert elements * dtype.itemsize < measured <= most <= 4 * measured, name
