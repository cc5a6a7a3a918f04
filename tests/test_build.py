"""Packaging: what the build produces, and that it fails soft or hard as asked."""

import json
import os
import runpy
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastreg import _native, _ops

ROOT = Path(__file__).parents[1]
needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on the PATH")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what is packaged, so that builds leave this checkout alone. Three small sources are enough: operators,
    and the functions that the plan takes from the module, with the operators that those call."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder)
    skip = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    for name in ("fastreg", "tritonkernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=skip)
    kernels = [path for path in (ROOT / "csrc").rglob("*.*") if path.suffix in (".h", ".cuh")]
    sources = ("module.cpp", "cpu/capability.cpp", "cpu/penalties.cpp", "cpu/plan.cpp")
    kernels += [ROOT / "csrc" / name for name in sources]
    for path in kernels:
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    (folder / "csrc/cuda").mkdir(exist_ok=True)
    return folder


def build(checkout: Path, out: Path, *command: str, **env: str) -> subprocess.CompletedProcess:
    command = command or ("bdist_wheel", "--dist-dir", str(out))
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *command],
        cwd=checkout,
        env={**os.environ, "FASTREG_BUILD_CUDA": "0", **env},
        capture_output=True,
        text=True,
    )


def outcome(wheel: Path) -> dict[str, str]:
    return json.loads(zipfile.ZipFile(wheel).read("fastreg/_build.json"))


@needs_gxx
def test_wheel_is_abi3_and_imports_in_a_clean_environment(checkout, tmp_path):
    done = build(checkout, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "cpu kernels built against torch" in done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp311-abi3-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert "fastreg/_C_cpu.abi3.so" in names and "tritonkernels/__init__.py" in names
    assert not any(name.startswith(("tests/", "benchmarks/", "csrc/")) for name in names)

    venv.create(tmp_path / "env", with_pip=False)
    site = next((tmp_path / "env/lib").glob("python*/site-packages"))
    zipfile.ZipFile(wheel).extractall(site)
    (site / "outer.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    program = "import fastreg, fastreg._native as n; print(fastreg.__file__, n.missing)"
    said = subprocess.run(
        [tmp_path / "env/bin/python", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert str(site) in said and "'cpu': None" in said


@needs_gxx
def test_broken_compiler_costs_only_the_kernels(checkout, tmp_path):
    done = build(checkout, tmp_path, CXXFLAGS="-no-such-flag")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "no-such-flag" in outcome(wheel)["cpu"]
    assert "fastreg/_C_cpu.abi3.so" not in zipfile.ZipFile(wheel).namelist()


def test_missing_compiler_is_named(checkout, tmp_path):
    done = build(checkout, tmp_path, CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert "cpu kernels not built: no no-such-compiler on the PATH" in done.stderr


@pytest.mark.parametrize("kind", ["CPU", "CUDA"])
def test_demanded_build_fails_the_install(checkout, tmp_path, kind):
    nowhere = {"CXX": "no-such-compiler", "CUDA_HOME": "/nonexistent", f"FASTREG_BUILD_{kind}": "1"}
    done = build(checkout, tmp_path, **nowhere)
    assert done.returncode != 0
    assert f"FASTREG_BUILD_{kind}=1, but " in done.stderr


def test_switched_off_build(checkout, tmp_path):
    done = build(checkout, tmp_path, FASTREG_BUILD_CPU="0")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert outcome(wheel)["cpu"] == "not built: FASTREG_BUILD_CPU=0"


def test_flag_with_another_value_is_refused(checkout, tmp_path):
    done = build(checkout, tmp_path, FASTREG_BUILD_CPU="yes")
    assert done.returncode != 0 and "FASTREG_BUILD_CPU must be 0, 1 or unset, not 'yes'" in done.stderr


def test_sdist_holds_what_a_build_needs(checkout, tmp_path):
    done = build(checkout, tmp_path, "sdist", "--dist-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path)
    (tree,) = (path for path in tmp_path.glob("fastreg-*") if path.is_dir())
    for name in ("csrc/module.cpp", "csrc/cpu/foreach_isa.h", "setup.py", "LICENSE", "fastreg/py.typed"):
        assert (tree / name).exists(), name


@pytest.mark.skipif(_native.missing["cpu"] is not None, reason=f"cpu kernels: {_native.missing['cpu']}")
def test_binary_uses_only_the_stable_interface():
    """No symbol of torch's C++ libraries: what is undefined is C, so one binary serves every torch from 2.11 on."""
    library = ROOT / "fastreg" / "_C_cpu.abi3.so"
    symbols = subprocess.run(["nm", "-DC", library], capture_output=True, text=True, check=True).stdout
    assert "aoti_torch" in symbols
    assert not [line for line in symbols.splitlines() if "at::" in line or "c10::" in line]


def test_import_survives_a_binary_that_cannot_load(checkout, tmp_path):
    shutil.copytree(checkout / "fastreg", tmp_path / "fastreg")
    shutil.copytree(checkout / "tritonkernels", tmp_path / "tritonkernels")
    (tmp_path / "fastreg" / "_C_cpu.abi3.so").write_bytes(b"not a library")
    done = subprocess.run([sys.executable, "-m", "fastreg"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "built, but it cannot be loaded" in done.stdout


def test_a_binary_that_is_gone_is_not_reported_as_built(tmp_path, monkeypatch):
    record = tmp_path / "_build.json"
    record.write_text('{"cpu": "built against torch 2.11"}')
    monkeypatch.setattr(_native, "_BUILD", record)
    monkeypatch.setitem(sys.modules, "fastreg._C_cpu", None)  # as if there were no such file
    assert _native._load("cpu") == "built, but its file is gone: build again"


@pytest.mark.parametrize("stale", [{}, {"operators": "of another declaration"}, {"operators": _ops.DIGEST}])
def test_a_binary_of_other_sources_is_not_used(stale, monkeypatch):
    """Its kernels would read arguments that are not there; the last one lacks the functions of the plan."""
    monkeypatch.setitem(sys.modules, "fastreg._C_cpu", SimpleNamespace(**stale))
    assert _native._load("cpu").startswith("built from other sources")
    assert _native._load("cpu").endswith("build again")


def test_in_place_an_old_setuptools_builds_too(checkout, tmp_path):
    """One that cannot read pyproject.toml: before 77 its licence is an error."""
    unreadable = (
        "import runpy, sys; from setuptools.config import pyprojecttoml as p; p.apply_configuration = None; "
        "sys.argv = ['setup.py', '-q', 'build_ext', '--inplace']; runpy.run_path('setup.py', run_name='__main__')"
    )
    folder = shutil.copytree(checkout, tmp_path / "checkout")
    environment = {**os.environ, "FASTREG_BUILD_CPU": "0", "FASTREG_BUILD_CUDA": "0"}
    done = subprocess.run(
        [sys.executable, "-c", unreadable], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "fastreg" / "_build.json").exists()


def test_a_toolkit_is_found_through_the_nvcc_on_the_path(checkout, tmp_path, monkeypatch):
    """Which may be a script somewhere else: nvcc itself says where its toolkit is."""
    home = tmp_path / "toolkit"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "nvcc").touch()
    (tmp_path / "nvcc").write_text(f"#!/bin/sh\necho '#$ TOP={home}' >&2\n")
    (tmp_path / "nvcc").chmod(0o755)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.setenv(name, str(tmp_path / "nowhere"))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    assert runpy.run_path(str(checkout / "setup.py"))["cuda_home"]() == home


def test_the_sources_name_nothing_that_the_first_torch_lacks():
    """STABLE_TORCH_ERROR_CODE_CHECK came in 2.12; TORCH_ERROR_CODE_CHECK was there before and is there still."""
    for path in (ROOT / "csrc").rglob("*.*"):
        assert "STABLE_TORCH_ERROR_CODE_CHECK" not in path.read_text(), path


def test_torch_pin_matches_the_declared_minimum():
    assert tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 11)
