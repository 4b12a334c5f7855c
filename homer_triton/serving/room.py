"""Room for an answer: a conversation that outgrows the model's limit is merged."""

from __future__ import annotations

import torch

from ..answering import Question
from ..config import HomerConfig
from ..context import EncodedContext
from ..encoding import encode
from ..growing import recent_of, split_rows
from ..model.llama import Llama
from .jobs import Job


def with_room(model: Llama, job: Job, context: EncodedContext, config: HomerConfig) -> Question:
    """What a request asks of its encoding, as it is where prompt and answer fit the model's limit;
    otherwise merged, as `compact` does it to a conversation that has grown too long: the prompt's
    last tokens stay, and choose what stays of all before them.
    """
    prompt = job.prompt
    new = max(decoding.max_new_tokens for decoding in job.decodings)
    limit = model.config.context_limit
    if not len(prompt) or context.next_position + len(prompt) + new <= limit:
        return Question(context, prompt, job.decodings[0])
    earlier, suffix = prompt.tensor_split([len(prompt) - recent_of(model, config, len(prompt))])
    prefix, rest, _ = split_rows(context, 0)
    merged = encode(model, torch.cat([rest, earlier]), prefix, suffix, config)
    return Question(merged, prompt[:0], job.decodings[0])
