"""`mrsa model check`: what is wrong with a folder is said from its files alone."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mrsa_server.cli import main
from mrsa_server.engines import CannotServe
from mrsa_server.engines.vllm import VllmEngine, _check_folder, _for_cpu
from mrsa_server.runs.host import EngineHost, Health
from mrsa_server.zaya.checkpoint import NotZaya, expected, read
from tests.helpers.zaya_files import SMALL, write_headers

Shapes = dict[str, Any]


def test_a_whole_model_is_ok(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_headers(tmp_path)
    assert main(["model", "check", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "2 layers, 2 experts" in said
    assert "tensor_parallel_size 1, 2" in said
    assert said.splitlines()[-2].startswith("ok: ")
    assert said.splitlines()[-1].strip() == f"mrsa serve --model {tmp_path}"


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


def test_it_is_told_apart_by_its_index_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_headers(tmp_path, shapes={"model.layers.1.zaya_block.router.down_proj.weight": (4, 16)})
    (tmp_path / "model-0.safetensors").unlink()
    assert main(["model", "check", str(tmp_path)]) == 1
    assert "hf download Zyphra/ZAYA1-8B " in capsys.readouterr().err


def test_a_name_is_looked_for_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert main(["model", "check", "me/mine"]) == 1
    assert "hf download me/mine" in capsys.readouterr().err
    assert main(["model", "check", "/me/mine/x"]) == 1
    assert "hf download" not in capsys.readouterr().err


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
        ({**SMALL, "num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({**SMALL, "num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, and there are 67 tensors"),
        ({**SMALL, "num_attention_heads": 3}, "num_attention_heads=3 is no multiple of num_key_value_heads=2"),
        ({**SMALL, "cca_time0": 1, "cca_time1": 1}, "leave no convolution"),
        ({**SMALL, "layer_types": ["hybrid"]}, "layer_types is no list of 2 of hybrid or hybrid_sliding"),
        ({**SMALL, "layer_types": ["hybrid", {}]}, "layer_types is no list of 2 of hybrid or hybrid_sliding"),
        ({**SMALL, "layer_types": ["hybrid", "hybrid_sliding"]}, "sliding_window is None"),
    ],
)
def test_another_model_is_refused(tmp_path: Path, config: Shapes, said: str) -> None:
    write_headers(tmp_path, config, dict(expected(SMALL)))
    assert main(["model", "check", str(tmp_path)]) == 1
    with pytest.raises(NotZaya, match=said):
        read(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"architectures": 3}', "[" * 100_000])
def test_what_is_no_model_is_no_crash(tmp_path: Path, content: str) -> None:
    write_headers(tmp_path)
    (tmp_path / "config.json").write_text(content)
    assert main(["model", "check", str(tmp_path)]) == 1
    assert main(["model", "check", str(tmp_path / "nowhere")]) == 1


DEEP = b"[" * 100_000


def _of(part: Any) -> bytes:
    header = json.dumps({"a": part}).encode()
    return struct.pack("<Q", len(header)) + header + b"xx"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "ends after 0 bytes, within its header"),
        (b"\1\2", "ends after 2 bytes, within its header"),
        (struct.pack("<Q", 99_999_999) + b"{}", "ends after 10 bytes, within its header"),
        (struct.pack("<Q", 1 << 63) + b"{}", "is no safetensors file"),
        (struct.pack("<Q", len(DEEP)) + DEEP, "is no JSON"),
        (struct.pack("<Q", 2) + b"[]", "is no JSON object"),
        (_of([1]), "does not describe a as"),
        (_of({"dtype": "BF16", "shape": [1]}), "does not describe a as"),
        (_of({"dtype": "BF16", "shape": [1], "data_offsets": [0]}), "does not describe a as"),
        (_of({"dtype": "BF16", "shape": "ab", "data_offsets": [0, 2]}), "does not describe a as"),
        (_of({"dtype": "BF16", "shape": ["1"], "data_offsets": [0, 2]}), "does not describe a as"),
        (_of({"dtype": "BF16", "shape": [-1], "data_offsets": [0, 2]}), "does not describe a as"),
        (_of({"dtype": {}, "shape": [1], "data_offsets": [0, 2]}), "does not describe a as"),
        (_of({"dtype": "BF16", "shape": [5], "data_offsets": [0, 2]}), "gives a 2 bytes, not 10"),
    ],
)
def test_a_file_that_is_no_safetensors_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, said: str
) -> None:
    write_headers(tmp_path)
    (tmp_path / "model-0.safetensors").write_bytes(content)
    assert main(["model", "check", str(tmp_path)]) == 1
    assert f"model-0.safetensors {said}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("[]", "is no JSON object"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "names 1, which is no file beside it"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "which is no file beside it"),
        ('{"weight_map": {"a": "/dev/zero"}}', "which is no file beside it"),
    ],
)
def test_an_index_names_files_beside_it(tmp_path: Path, index: str, said: str) -> None:
    write_headers(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(NotZaya, match=said):
        read(tmp_path)


def test_nothing_is_waited_for(tmp_path: Path) -> None:
    write_headers(tmp_path)
    file = tmp_path / "model-0.safetensors"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(NotZaya, match="is no file"):
        read(tmp_path)


def test_weights_that_need_a_scale_are_not_taken_for_plain_ones(tmp_path: Path) -> None:
    write_headers(tmp_path)
    checkpoint = read(tmp_path)
    name = "model.embed_tokens.weight"
    stored = {**checkpoint.tensors, name: checkpoint.tensors[name]._replace(dtype="F8_E4M3")}
    (problem,) = replace(checkpoint, tensors=stored).problems()
    assert problem == f"stored as F8_E4M3, without a quantization_config: {name}"


def test_a_name_does_not_steer_the_terminal(tmp_path: Path) -> None:
    write_headers(tmp_path, shapes=dict(expected(SMALL)) | {"a\x1b[31m": (1,)})
    (problem,) = read(tmp_path).problems()
    assert problem.isprintable()


@pytest.mark.parametrize(
    ("settings", "status"), [(None, 1), ("{", 1), ('{"chat_template": null}', 1), ('{"chat_template": "x"}', 0)]
)
def test_a_chat_template_is_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: str | None, status: int
) -> None:
    write_headers(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(settings)
    assert main(["model", "check", str(tmp_path)]) == status
    assert ("no chat template" in capsys.readouterr().err) == bool(status)


async def test_a_broken_model_is_refused_before_vllm_is_looked_for(tmp_path: Path) -> None:
    write_headers(tmp_path)
    (tmp_path / "model-0.safetensors").unlink()
    engine = VllmEngine(str(tmp_path))
    with pytest.raises(CannotServe, match=r"lacks 1 of its 2 files: model-0.safetensors\n +hf download") as caught:
        await engine.start()
    host = EngineHost(engine)
    await host.run()
    assert host.health is Health.FAILED
    assert host.reason == str(caught.value)


def test_vllm_on_a_cpu_takes_what_is_free(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    assert _for_cpu(meminfo) == {"worker_cls": "mrsa_server.engines.vllm_cpu.Worker"}
    meminfo.write_text("MemTotal:       33554432 kB\nMemFree:         1000 kB\nMemAvailable:   16777216 kB\n")
    assert _for_cpu(meminfo)["gpu_memory_utilization"] == 0.419  # 0.9 of the half, less 1 of 32 GiB


@pytest.mark.parametrize("extra", [{"load_format": "dummy"}, {"hf_overrides": {"head_dim": 8}}])
def test_what_is_not_loaded_as_it_lies_is_left_to_vllm(tmp_path: Path, extra: dict[str, object]) -> None:
    write_headers(tmp_path)
    (tmp_path / "model-0.safetensors").unlink()
    _check_folder({"model": str(tmp_path), **extra})
    _check_folder({"model": "Zyphra/ZAYA1-8B"})
