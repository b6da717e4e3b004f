"""What stands beside a figure: which processor."""

import pytest

from intra import provenance

EPYC = "processor\t: 0\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\nflags\t\t: fpu: yes\n"


@pytest.mark.parametrize(("content", "name"), [
    (f"{EPYC}\n{EPYC.replace('26', '27')}", "AMD EPYC (family 26, model 2)"),
    ("processor: 0\nmodel name: Power9: revised\n", "Power9: revised"),
])  # fmt: skip
def test_a_processor_is_named_as_the_system_names_the_first(monkeypatch, tmp_path, content, name):
    (tmp_path / "cpuinfo").write_text(content)
    monkeypatch.setattr(provenance, "CPUINFO", tmp_path / "cpuinfo")
    assert provenance.processor() == name


@pytest.mark.parametrize("content", [None, "", "processor\t: 0\nCPU part\t: 0xd0c\n"])
def test_where_it_names_none_the_platform_does(monkeypatch, tmp_path, content):
    if content is not None:
        (tmp_path / "cpuinfo").write_text(content)
    monkeypatch.setattr(provenance, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(provenance.platform, "processor", lambda: "")
    monkeypatch.setattr(provenance.platform, "machine", lambda: "riscv64")
    assert provenance.processor() == "riscv64"
