"""The plug-in for transformers that kernels/README.md shows, run as it stands there, and with other
families' classes in the place of Llama's.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import DEVICE

README = Path(__file__).resolve().parent.parent / "kernels" / "README.md"


families = pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen3"])


@cache
def example(family: str = "Llama") -> dict[str, Any]:
    """The names that the README's example leaves behind."""
    *_, code = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    code = code.replace("LlamaConfig", f"{family}Config")
    code = code.replace("LlamaForCausalLM", f"{family}ForCausalLM")
    names: dict[str, Any] = {}
    exec(compile(code, str(README), "exec"), names)
    return names


@pytest.mark.interpreter
@families
def test_the_example_prunes_and_goes_on(family: str):
    names = example(family)
    assert names["rows"] == 4 + 20 + 8
    assert names["answer"].shape == (1, 3 + 4)


@pytest.mark.interpreter
@families
def test_the_prompt_is_read_as_stock_attention_does(family: str):
    names = example(family)
    names["model"].set_attn_implementation("eager")
    try:
        with torch.no_grad():
            expected = names["model"](names["prompt"]).logits
    finally:
        names["model"].set_attn_implementation("pruning")
    torch.testing.assert_close(names["logits"], expected, atol=1e-4, rtol=0)


@pytest.mark.interpreter
@families
def test_keeping_every_row_changes_no_token(family: str):
    names = example(family)
    model, prompt, question = names["model"], names["prompt"], names["question"]
    model.config.kept_rows = 60
    with torch.no_grad():
        _, past = names["read_and_prune"](model, prompt)
        answer = model.generate(
            question,
            past_key_values=past,
            attention_mask=torch.ones(1, 63, dtype=torch.long, device=DEVICE),
            position_ids=torch.arange(60, 63, device=DEVICE)[None],
            max_new_tokens=4,
            do_sample=False,
        )
        model.set_attn_implementation("eager")
        plain = model.generate(
            torch.cat([prompt, question], dim=1), max_new_tokens=4, do_sample=False
        )
    model.set_attn_implementation("pruning")
    assert answer[0, 3:].tolist() == plain[0, 63:].tolist()


@pytest.mark.interpreter
def test_padding_is_refused():
    names = example()
    mask = torch.ones(1, 60, dtype=torch.long, device=DEVICE)
    mask[:, :5] = 0
    with pytest.raises(ValueError, match="attention_mask hides tokens"):
        names["model"](names["prompt"], attention_mask=mask)
