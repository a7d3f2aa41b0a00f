"""What others' packages are taken: within bounds, by their hashes, and listed with licences. And
that keys do not leave in messages."""

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from rankpo_fast.errors import InputError, without_secrets

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BENCH = tomllib.loads((ROOT / "bench/pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
OWN = "rankpo-fast"
LOCK = (ROOT / "requirements-test.lock").read_text()
# They come from an index for the machine: requirements-test.lock in the Makefile.
UNLOCKED = re.compile("torch|triton|nvidia-(?!ml-py)|cuda-")


def asked_of(extra: str) -> list[Requirement]:
    """Of an extra, those of the extras that it names among them."""
    found = []
    for requirement in map(Requirement, EXTRAS[extra]):
        if requirement.name == OWN:
            found += [inner for name in requirement.extras for inner in asked_of(name)]
        else:
            found.append(requirement)
    return found


def bounds(requirement: Requirement) -> set[str]:
    return {specifier.operator for specifier in requirement.specifier}


@pytest.mark.parametrize("extra", [None, *EXTRAS, "rankpo-bench"])
def test_every_requirement_has_a_lower_and_an_upper_bound(extra):
    given = {None: PROJECT["dependencies"], "rankpo-bench": BENCH["dependencies"]} | EXTRAS
    for requirement in map(Requirement, given[extra]):
        if requirement.name != OWN or extra == "rankpo-bench":
            assert bounds(requirement) in ({">=", "<"}, {"=="}), requirement


def locked() -> dict[str, list[str]]:
    """Versions of each package, of which some have several, for one Python each."""
    found: dict[str, list[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==(\S+)", LOCK, re.MULTILINE):
        found.setdefault(canonicalize_name(name), []).append(version)
    return found


def test_every_file_of_the_lock_has_its_hash():
    entries = re.split(r"^(?=[\w.-])", LOCK, flags=re.MULTILINE)[1:]
    assert len(entries) > 100
    for entry in entries:
        assert re.match(r"[\w.-]+==\S+( ; .*?)? \\\n    --hash=sha256:[0-9a-f]{64}\b", entry), entry


def test_the_lock_holds_all_that_tests_need_within_its_bounds_but_torch():
    there = locked()
    assert [name for name in there if UNLOCKED.match(name) and name != "torchao"] == []
    asked = map(Requirement, [*PROJECT["dependencies"], *BENCH["dependencies"][1:]])
    for requirement in (*asked, *asked_of("test")):
        name = canonicalize_name(requirement.name)
        if name not in ("torch", "triton"):
            wrong = [v for v in there[name] if not requirement.specifier.contains(v)]
            assert wrong == [], requirement


@pytest.mark.long  # 10 s, most of it to hold the list against the format's schema
def test_the_list_of_packages_has_all_that_are_installed_with_their_licences(tmp_path):
    pytest.importorskip("cyclonedx_py")
    path, there = tmp_path / "sbom.json", Path(sys.executable).parent
    made = ["make", "-o", ".venv/.ready", "sbom", "VENV=.venv", f"BIN={there}", f"SBOM={path}"]
    subprocess.run(made, cwd=ROOT, check=True, capture_output=True)
    listed = json.loads(path.read_text())
    assert (listed["bomFormat"], listed["metadata"]["component"]["name"]) == ("CycloneDX", OWN)
    components = {canonicalize_name(part["name"]): part for part in listed["components"]}
    for package in metadata.distributions():
        name = canonicalize_name(package.metadata["Name"])
        if name == OWN or not Path(str(package.locate_file(""))).is_relative_to(there.parent):
            continue
        assert components[name]["version"] == package.version
        of_package = package.metadata
        classified = any(x.startswith("License") for x in of_package.get_all("Classifier") or [])
        if of_package["License"] or of_package["License-Expression"] or classified:
            assert components[name]["licenses"], name
    known = {part["ref"] for part in listed["dependencies"]}
    assert {part["bom-ref"] for part in listed["components"]} <= known


def test_messages_hold_no_keys_no_tokens_and_no_passwords(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "0123456789")
    monkeypatch.setenv("SHORT_KEY", "no")
    token = "hf_" + "a1" * 17  # of a login, which no variable holds
    said = f"no: 0123456789, {token}, http://me:pass@host/a@b, mail@host, c://x/y:z@w"
    left = "no: [MY_API_KEY], [token], http://[password]@host/a@b, mail@host, c://x/y:z@w"
    assert without_secrets(said) == left == str(InputError(said))


@pytest.mark.long  # a process of its own, for the address of the hub
def test_the_hub_gets_the_token_that_its_refusal_does_not_show(httpserver, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"query": "a", "passage1": "b", "passage2": "c", "preferred": "A"}\n')
    token = "hf_0123456789abcdefghij"
    seen = []

    def refuse(request):
        from werkzeug import Response

        seen.append(request.headers.get("Authorization"))
        return Response(f"no such token: {token}", 401, {"X-Error-Message": f"bad {token}"})

    httpserver.expect_request(re.compile(".*")).respond_with_handler(refuse)
    variables = {"HF_TOKEN": token, "HF_ENDPOINT": httpserver.url_for(""), "HF_HUB_OFFLINE": "0"}
    flags = ["--model_name_or_path", "owner/name", "--preference_data", str(pairs)]
    done = subprocess.run(
        [sys.executable, "-m", "rankpo_fast.cli", "evaluate", *flags, "--device", "cpu"],
        env={**os.environ, **variables}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and f"Bearer {token}" in seen
    assert "[HF_TOKEN]" in done.stderr and token not in done.stdout + done.stderr
