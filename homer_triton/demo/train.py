"""Train the demo model from scratch on two CPU cores: `python -m homer_triton.demo.train`.

Three losses: the next token, the answer once more, and the *reading loss*. The reading loss asks
that one linear head can tell all five digits from what the attention of any single layer brings to
the question's last token. Without it one layer reads the key and the others need not look; with it
the attention of every layer points at the key, which is what HOMER's significance score measures.
Two kinds of noise keep the layers from relying on each other: layers are dropped at random, and
some questions see the context only from a random layer on, as they do at the root of a merge tree
in which every other chunk held nothing.
"""

import argparse
import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from ..evaluation.passkey import KEY_DIGITS
from . import CHECKPOINT
from .corpus import DOCUMENT_LENGTHS, Corpus
from .tokenizer import build_tokenizer
from .training import ATTENTION, cosine_schedule, save

CONTEXT_LIMIT = 256
# Seven of the eight pairs of dimensions turn at least 0.7 times within the limit, so that most of
# what a RoPE rescaling slows tells near tokens apart. With Llama's 10,000 half of the pairs turn
# less than half a time, and attention that leans on those minds a longer text less.
ROPE_THETA = 200.0
TOKENS_PER_STEP = 2048
STEPS = 1500
WARMUP_STEPS = 50
LEARNING_RATE = 1.5e-3
FINAL_LEARNING_RATE_SHARE = 0.03
WEIGHT_DECAY = 0.1
FIRST_READING_LAYER = 3
FIRST_DROPPED_LAYER = 2
LAYER_DROP = 0.25
BLIND_SHARE = 0.3
REPORT_EVERY = 25


class Trainee(nn.Module):
    """The model and the head of its reading loss; only the model is shipped."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=16,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=CONTEXT_LIMIT,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        config._attn_implementation = ATTENTION
        self.model = LlamaForCausalLM(config)
        self.reading_head = nn.Linear(config.hidden_size, KEY_DIGITS * 10)

    def forward(
        self, ids: Tensor, question: slice, dropped: set[int], blind_layers: int
    ) -> tuple[Tensor, Tensor]:
        """The logits, and those of the digits that each layer read.

        Args:
            ids: `[documents, tokens]`.
            question: the question's rows.
            dropped: the layers to leave out.
            blind_layers: in so many first layers the question sees only BOS and itself.

        Returns:
            `[documents, tokens - 1, vocabulary]` and `[reading layers, documents, 5, 10]`.
        """
        length = ids.shape[1]
        causal = torch.zeros(length, length)
        causal.masked_fill_(torch.ones(length, length, dtype=torch.bool).triu(1), -1e9)
        blind = causal.clone()
        blind[question, 1 : question.start] = -1e9
        last = question.stop - 1

        hidden = self.model.model.embed_tokens(ids)
        rotary = self.model.model.rotary_emb(hidden, torch.arange(length)[None])
        reads = []
        for index, layer in enumerate(self.model.model.layers):
            if index in dropped:
                continue
            mask = blind if index < blind_layers else causal
            hidden, read = _run_layer(layer, hidden, mask[None, None], rotary, last)
            if index >= max(FIRST_READING_LAYER, blind_layers):
                reads.append(read)
        logits = self.model.lm_head(self.model.model.norm(hidden)[:, :-1])
        read_digits = self.reading_head(F.rms_norm(torch.stack(reads).float(), hidden.shape[-1:]))
        return logits.float(), read_digits.unflatten(-1, (KEY_DIGITS, 10))


def _run_layer(
    layer: LlamaDecoderLayer, hidden: Tensor, mask: Tensor, rotary: tuple[Tensor, Tensor], row: int
) -> tuple[Tensor, Tensor]:
    """The layer's output, and what its attention brought to `row`."""
    normed = layer.input_layernorm(hidden)
    read, _ = layer.self_attn(normed, position_embeddings=rotary, attention_mask=mask)
    hidden = hidden + read
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden)), read[:, row]


def train(steps: int, seed: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Train for `steps` steps of `TOKENS_PER_STEP` tokens, printing the progress."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    tokenizer = build_tokenizer(CONTEXT_LIMIT)
    corpus = Corpus(tokenizer, seed)
    trainee = Trainee(tokenizer)
    parameters = list(trainee.parameters())
    optimizer = _optimizer(parameters)
    schedule = cosine_schedule(optimizer, steps, WARMUP_STEPS, FINAL_LEARNING_RATE_SHARE)
    layers = trainee.model.config.num_hidden_layers
    zero = tokenizer.get_vocab()["0"]
    started = time.monotonic()
    for step in range(steps):
        # Short documents hold more keys per token, so they come first; after a quarter, any length.
        length = draw.choice(DOCUMENT_LENGTHS[: 1 + 20 * step // steps])
        ids = torch.tensor(corpus.documents(TOKENS_PER_STEP // length, length))
        answer = slice(length - corpus.answer_rows, length - corpus.answer_rows + KEY_DIGITS)
        question = slice(answer.start - corpus.question_rows, answer.start)
        blind_layers = draw.randint(1, layers - 1) if draw.random() < BLIND_SHARE else 0
        dropped = {i for i in range(FIRST_DROPPED_LAYER, layers - 1) if draw.random() < LAYER_DROP}

        with torch.autocast("cpu", torch.bfloat16):
            logits, read_digits = trainee(ids, question, dropped, blind_layers)
        answer_logits = logits[:, answer.start - 1 : answer.stop - 1]
        token_loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        answer_loss = F.cross_entropy(answer_logits.flatten(0, 1), ids[:, answer].flatten())
        digits = (ids[:, answer] - zero).expand(len(read_digits), -1, -1)
        reading_loss = F.cross_entropy(read_digits.flatten(0, 2), digits.flatten())
        (token_loss + answer_loss + reading_loss).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % REPORT_EVERY == 0:
            right = (answer_logits.argmax(-1) == ids[:, answer]).all(1).float().mean()
            read = (read_digits.argmax(-1) == digits).float().mean()
            print(
                f"step {step + 1}/{steps}, {time.monotonic() - started:.0f} s: next-token loss "
                f"{token_loss:.2f}, answers right {right:.0%}, digits read {read:.0%}",
                flush=True,
            )
    return trainee.model, tokenizer


def _optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [p for p in parameters if p.dim() == 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors},
    ]
    return torch.optim.AdamW(groups, LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0, fused=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model from scratch on the CPU.")
    parser.add_argument("--steps", type=int, default=STEPS, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and texts (default: 0)")
    parser.add_argument(
        "--threads", type=int, default=1, help="(default: 1; the weights depend on it, by rounding)"
    )
    parser.add_argument(
        "--output", type=Path, default=CHECKPOINT, help="(default: the shipped checkpoint's folder)"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = train(arguments.steps, arguments.seed)
    save(model, tokenizer, arguments.output)


if __name__ == "__main__":
    main()
