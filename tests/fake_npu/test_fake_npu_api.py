"""The names that the project uses of torch_npu, and the comparison with the real wheel by `make check-npu-api`."""

import zipfile

import check_npu_api


def test_fake_npu_has_every_name_that_the_project_uses():
    used, places = check_npu_api.project_names()
    defined = check_npu_api.fake_names()
    assert {"torch_npu.npu.amp.GradScaler", "torch_npu.optim.NpuFusedSGD", "torch_npu.npu.conv.allow_hf32"} <= set(used)
    missing = [name for name in used if name not in defined and name.rpartition(".")[0] not in defined]
    assert missing == []
    assert all(place.startswith("common/device") for place in places.values()), "only common/device names npu"


def test_fake_npu_api_comparison_finds_what_a_wheel_lacks(tmp_path):
    """A wheel of three files: re-exports, a star import, an inherited method, an attribute behind a string."""
    sources = {
        "torch_npu/__init__.py": "from . import npu\n",
        "torch_npu/npu/__init__.py": "from .utils import set_device\nfrom .more import *\nconv = more._Conv()\n",
        "torch_npu/npu/utils.py": "def set_device(device):\n    pass\n",
        "torch_npu/npu/more.py": "class Base:\n    def scale(self): pass\nclass Scaler(Base):\n"
        "    def __init__(self, dynamic): pass\nclass _Conv:\n"
        "    def __setattr__(self, name, value): name == 'allow_hf32'\n",
    }
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as archive:
        for name, text in sources.items():
            archive.writestr(name, text)
    package = check_npu_api.Package(tmp_path / "w.whl")
    assert package.find("torch_npu.npu.set_device") == ("torch_npu/npu/utils.py:1", {"device"})
    assert package.find("torch_npu.npu.Scaler") == ("torch_npu/npu/more.py:3", {"dynamic"})
    assert package.find("torch_npu.npu.Scaler.scale")[0] == "torch_npu/npu/more.py:2"
    assert package.find("torch_npu.npu.conv.allow_hf32")[0] == "torch_npu/npu/more.py:6"
    for absent in ("torch_npu.npu.conv.allow_tf32", "torch_npu.npu.reset", "torch_npu.npu.Scaler.step"):
        assert package.find(absent) is None
    names = {"torch_npu.npu.Scaler": {"init_scale"}, "torch_npu.npu.set_device": {"device"}, "torch_npu.npu.x": set()}
    assert check_npu_api.compare(package, names, str) == ["torch_npu.npu.Scaler", "torch_npu.npu.x"]
