"""Train the text model from scratch on one CPU core: `python -m homer_triton.demo.train_text`.

An ordinary language model, but for its windows: half of those in the later three quarters of the
training are *sparse*, with a context of tokens that survived from several chunks, so that the model
has met duplicate positions. Whether it needs that was not measured.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from ..calibration import calibrate
from ..loading import load
from . import TEXT_CHECKPOINT
from .text_corpus import WindowSampler, build_tokenizer, tokenize_corpus, training_texts
from .training import ATTENTION, cosine_schedule, save

CONTEXT_LIMIT = 512
VOCABULARY = 2048
# As in the demo model: positions past the limit turn every dimension further than it has seen.
ROPE_THETA = 1000.0
WINDOWS_PER_STEP = 4
# BOS and the context fill half the limit but for a suffix, as a chunk does.
CONTEXT_ROOM = CONTEXT_LIMIT // 2 - 12
DENSE_STEPS_SHARE = 0.25
SPARSE_SHARE = 0.5
STEPS = 2100
WARMUP_STEPS = 50
MATRIX_LEARNING_RATE = 0.02
OTHER_LEARNING_RATE = 4e-3
WEIGHT_DECAY = 0.05
FINAL_LEARNING_RATE_SHARE = 0.02
CALIBRATION_SEGMENTS = 400
REPORT_EVERY = 25


def build_model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A Llama with random weights: 12 layers, so that a tree of height 8 leaves warm-up layers."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_LIMIT,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config._attn_implementation = ATTENTION
    return LlamaForCausalLM(config)


def train(
    texts: list[str], steps: int, seed: int
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Train for `steps` steps of `WINDOWS_PER_STEP` windows, printing the progress."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(texts, VOCABULARY, CONTEXT_LIMIT)
    stream = tokenize_corpus(tokenizer, texts)
    sampler = WindowSampler(stream, tokenizer.bos_token_id, CONTEXT_LIMIT, CONTEXT_ROOM, seed)
    model = build_model(tokenizer)
    optimizers = _optimizers(model)
    schedules = [
        cosine_schedule(optimizer, steps, WARMUP_STEPS, FINAL_LEARNING_RATE_SHARE)
        for optimizer in optimizers
    ]
    started = time.monotonic()
    recent: list[float] = []
    for step in range(steps):
        sparse_share = SPARSE_SHARE if step >= DENSE_STEPS_SHARE * steps else 0.0
        ids, positions, targets = sampler.windows(WINDOWS_PER_STEP, sparse_share)
        with torch.autocast("cpu", torch.bfloat16):
            logits = _logits(model, ids, positions)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        recent.append(loss.item())
        if (step + 1) % REPORT_EVERY == 0:
            mean = sum(recent) / len(recent)
            print(
                f"step {step + 1}/{steps}, {time.monotonic() - started:.0f} s: loss {mean:.3f}",
                flush=True,
            )
            recent.clear()
    return model, tokenizer


def _logits(model: LlamaForCausalLM, ids: Tensor, positions: Tensor) -> Tensor:
    """`[windows, rows, vocabulary]`, causal by row; the model's own forward pass would go by
    position.
    """
    hidden = model.model.embed_tokens(ids)
    rotary = model.model.rotary_emb(hidden, positions)
    for layer in model.model.layers:
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
    return model.lm_head(model.model.norm(hidden))


def _optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the layers' matrices, AdamW for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    others = [model.model.embed_tokens.weight, *(p for p in model.parameters() if p.dim() == 1)]
    return [
        torch.optim.Muon(matrices, MATRIX_LEARNING_RATE, weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(
            others, OTHER_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0, fused=True
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the text model from scratch on the CPU.")
    parser.add_argument("--steps", type=int, default=STEPS, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and windows (default: 0)")
    parser.add_argument(
        "--threads", type=int, default=1, help="(default: 1; the weights depend on it, by rounding)"
    )
    parser.add_argument(
        "--output", type=Path, default=TEXT_CHECKPOINT, help="(default: the shipped folder)"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    texts = training_texts()
    save(*train(texts, arguments.steps, arguments.seed), arguments.output)
    trained = load(str(arguments.output), dtype="float32", ops="torch")
    calibration = calibrate(trained, texts, num_segments=CALIBRATION_SEGMENTS)
    calibration.save(arguments.output / "calibration.safetensors")


if __name__ == "__main__":
    main()
