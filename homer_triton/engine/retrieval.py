"""Which of a model's attention heads retrieve: they look up what a question repeats.

A few of a language model's heads attend from a word to where it stood before, and to what followed
it there; answers in long texts hang on them ("induction heads", Olsson et al. 2022; "retrieval
heads", Wu et al. 2024). They are found without any text: random tokens in records, and a record's
beginning once more as the question. A head that retrieves attends to that record, any other one to
no record more than to the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.llama import Llama
from ..text.tokens import beginning

# A sequence's records, at most half of the context limit; the tokens of each; how many of them the
# question repeats; and sequences.
RECORDS, RECORD_LEN, QUESTION_LEN, SEQUENCES = 32, 16, 6, 4
# With fewer records, chance would look like retrieval.
FEWEST_RECORDS = 16
# A head retrieves that gives the record at least this much of its attention, and at least this
# share of what the best head gives.
LEAST_ATTENTION = 0.2
LEAST_SHARE = 0.25

# `record_attention` on the CPU, by the weights' fingerprint and the dtype that they compute in.
measured: dict[tuple[str, torch.dtype], Tensor | None] = {}


def retrieval_heads(model: Llama) -> Tensor | None:
    """A model's retrieval heads: [L, HQ] float32 on its device, 1 for these and 0 for the others;
    None where it has none.
    """
    attention = known_attention(model)
    if attention is None:
        return None
    best = attention.max()
    if not best >= LEAST_ATTENTION:  # or NaN
        return None
    return (attention >= LEAST_SHARE * best).float()


def known_attention(model: Llama) -> Tensor | None:
    """`record_attention` of a model, on its device; None where its context limit is too short for
    enough records.

    It is measured once, which takes as long as reading two thousand tokens.
    """
    key = model.fingerprint, model.dtype
    if key not in measured:
        records = min(RECORDS, model.config.context_limit // 2 // RECORD_LEN)
        enough = records >= FEWEST_RECORDS
        measured[key] = record_attention(model, records) if enough else None
    attention = measured[key]
    return None if attention is None else attention.to(model.device)


def record_attention(model: Llama, records: int = RECORDS) -> Tensor:
    """How much of their attention a model's heads give to the record that a question repeats.

    Returns [L, HQ] float32 on the CPU, from 0 to 1: the mean over random sequences of the attention
    that the question's rows give to what they repeat and to the token after it. The same for the
    same weights, but for rounding.
    """
    draw = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    prefix = torch.tensor(beginning(model), dtype=torch.int64)
    total = torch.zeros(model.config.num_hidden_layers, model.config.num_attention_heads)
    for _ in range(SEQUENCES):
        text = torch.randint(vocabulary, (records, RECORD_LEN), generator=draw)
        # The first records are near to where attention goes that finds nothing.
        asked = int(torch.randint(records // 8, records, (), generator=draw))
        first = len(prefix) + asked * RECORD_LEN
        tokens = torch.cat([prefix, text.flatten(), text[asked, :QUESTION_LEN]])
        total += _attention_to(model, tokens, slice(first, first + QUESTION_LEN + 1))
    return total / SEQUENCES


def _attention_to(model: Llama, tokens: Tensor, record: slice) -> Tensor:
    """How much attention [L, HQ] the last QUESTION_LEN tokens give to some of those before them."""
    given: list[Tensor] = []
    with model.own_dtype():
        for _, q, k in model.queries_and_keys(tokens, QUESTION_LEN):
            keys = k[0, :-QUESTION_LEN].float().permute(1, 2, 0)
            queries = q[0].float().transpose(0, 1).unflatten(0, (len(keys), -1))
            logits = queries @ keys[:, None] * q.shape[-1] ** -0.5
            given.append(logits.softmax(-1)[..., record].sum(-1).mean(-1).flatten())
    return torch.stack(given).cpu()
