"""The processor's fields, as Linux writes them."""

from common import cpuinfo

TEXT = "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: A: B\nFeatures\t:\n\nvendor_id\t: other\n"


def test_fields(monkeypatch):
    field = cpuinfo.field.__wrapped__
    monkeypatch.setattr(cpuinfo.pathlib.Path, "read_text", lambda path: TEXT)
    assert field("vendor_id") == "GenuineIntel" and field("model name") == "A: B"
    assert field("flags", "vendor_id") == "GenuineIntel" and field("Features") == field("absent") == ""


def test_a_system_without_the_file(monkeypatch):
    def read_text(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(cpuinfo.pathlib.Path, "read_text", read_text)
    assert cpuinfo.field.__wrapped__("flags") == ""
