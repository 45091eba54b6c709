"""`mrsa model check`: what is wrong with a folder is said from its files alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mrsa_server.cli import main
from mrsa_server.zaya.checkpoint import NotZaya, expected, read
from tests.helpers.zaya_files import SMALL, write_headers

Shapes = dict[str, Any]


def test_a_whole_model_is_ok(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_headers(tmp_path)
    assert main(["model", "check", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "2 layers, 2 experts" in said
    assert "tensor_parallel_size 1, 2" in said
    assert said.splitlines()[-1].startswith("ok: ")


def _without(shapes: Shapes) -> None:
    del shapes["model.layers.1.self_attn.qk_norm.temp"]


def _renamed(shapes: Shapes) -> None:
    shapes["model.layers.0.self_attn.cca.conv.weight"] = shapes.pop("model.layers.0.self_attn.o_proj.weight")


def _reshaped(shapes: Shapes) -> None:
    shapes["model.layers.0.mlp.gate.balancing_biases"] = (2,)


def _of_the_first_layer(shapes: Shapes) -> None:
    shapes["model.layers.0.mlp.gate.router_states_scale"] = (4,)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_without, "missing: model.layers.1.self_attn.qk_norm.temp"),
        (_renamed, "not of ZAYA1 as transformers names it: model.layers.0.self_attn.cca.conv.weight"),
        (_reshaped, "model.layers.0.mlp.gate.balancing_biases has the shape (2,), not (3,)"),
        (_of_the_first_layer, "not of ZAYA1 as transformers names it: model.layers.0.mlp.gate.router_states_scale"),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Shapes], None], said: str
) -> None:
    shapes = dict(expected(SMALL))
    change(shapes)
    write_headers(tmp_path, shapes=shapes)
    assert main(["model", "check", str(tmp_path)]) == 1
    assert said in capsys.readouterr().err


def test_the_layout_of_the_fork_is_told_apart(tmp_path: Path) -> None:
    write_headers(tmp_path, shapes={"model.layers.1.zaya_block.router.down_proj.weight": (4, 16)})
    with pytest.raises(NotZaya, match="fork"):
        read(tmp_path)


def test_experts_in_a_layout_of_their_own_are_left_to_vllm(tmp_path: Path) -> None:
    config = {**SMALL, "quantization_config": {"quant_method": "fp8"}}
    shapes = {name: shape for name, shape in expected(config) if ".mlp.experts." not in name}
    shapes["model.layers.0.mlp.experts.0.gate_proj.weight_scale"] = (1,)
    write_headers(tmp_path, config, shapes)
    assert read(tmp_path).problems() == ()


def test_a_tied_head_may_be_stored_too(tmp_path: Path) -> None:
    write_headers(tmp_path, shapes=dict(expected(SMALL)) | {"lm_head.weight": (32, 16)})
    assert read(tmp_path).problems() == ()


def test_a_file_that_was_not_loaded_down_whole_is_found(tmp_path: Path) -> None:
    write_headers(tmp_path)
    file = tmp_path / "model-1.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(NotZaya, match=r"model-1\.safetensors has \d+ bytes, not \d+"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({**SMALL, "architectures": ["LlamaForCausalLM"]}, "not ZayaForCausalLM"),
        ({**SMALL, "num_experts_per_tok": 2}, "num_experts_per_tok=2"),
        ({**SMALL, "head_dim": None}, "head_dim is None"),
    ],
)
def test_another_model_is_refused(tmp_path: Path, config: Shapes, said: str) -> None:
    write_headers(tmp_path, config, dict(expected(SMALL)))
    with pytest.raises(NotZaya, match=said):
        read(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"architectures": 3}'])
def test_what_is_no_model_is_no_crash(tmp_path: Path, content: str) -> None:
    write_headers(tmp_path)
    (tmp_path / "config.json").write_text(content)
    assert main(["model", "check", str(tmp_path)]) == 1
    assert main(["model", "check", str(tmp_path / "nowhere")]) == 1
