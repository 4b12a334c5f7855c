"""Rotary tables against transformers' own, for every RoPE type and beyond the context limit."""

import pytest
import torch
from checkpoints import LIMIT, ROPES, random_model

from homer_triton.model.config import ModelConfig
from homer_triton.model.rotary import rotary_tables


@pytest.mark.parametrize("length", [1, LIMIT, 3 * LIMIT])
@pytest.mark.parametrize("rope", ROPES)
def test_tables_are_those_of_a_transformers_forward_pass(rope: str, length: int) -> None:
    model = random_model(rope_parameters={"rope_theta": 10000.0, **ROPES[rope]})
    config = ModelConfig.from_hf(model.config)
    cos, sin = rotary_tables(config, length, "cpu")
    expected = model.model.rotary_emb(torch.empty(0), torch.arange(length)[None])
    for table, whole in zip((cos, sin), expected, strict=True):
        assert table.shape == (length, config.head_dim // 2)
        assert table.dtype == torch.float32
        assert table.is_contiguous()
        torch.testing.assert_close(torch.cat([table, table], dim=-1), whole[0], rtol=0, atol=0)


def test_default_frequencies_are_those_of_the_paper() -> None:
    config = ModelConfig.from_hf(random_model("llama-2").config)
    cos, sin = rotary_tables(config, 100, "cpu")
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float64)
    angles = torch.arange(100)[:, None] * 10000.0 ** (-pairs / config.head_dim)
    torch.testing.assert_close(cos, angles.cos().float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(sin, angles.sin().float(), rtol=0, atol=1e-5)


def test_only_dynamic_tables_depend_on_the_length() -> None:
    for rope, parameters in ROPES.items():
        hf_config = random_model(rope_parameters={"rope_theta": 10000.0, **parameters}).config
        config = ModelConfig.from_hf(hf_config)
        short, _ = rotary_tables(config, LIMIT, "cpu")
        long, _ = rotary_tables(config, 3 * LIMIT, "cpu")
        assert torch.equal(short, long[:LIMIT]) == (rope != "dynamic")


def test_yarn_scales_attention() -> None:
    config = ModelConfig.from_hf(random_model(rope_parameters=ROPES["yarn"]).config)
    cos, _ = rotary_tables(config, 1, "cpu")
    assert cos.min() > 1.1  # 0.1 ln(4) + 1, Peng et al. 2023, equation 22


def test_an_empty_table_is_refused() -> None:
    config = ModelConfig.from_hf(random_model().config)
    with pytest.raises(ValueError, match="length is 0"):
        rotary_tables(config, 0, "cpu")
