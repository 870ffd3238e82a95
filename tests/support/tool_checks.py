"""What tools of others do with what adapterhub hands over, and the reverse: one check for each claim of docs/tools.md.

    python -m tests.support.tool_checks > docs/tools.md

The page has a claim only if a check here makes it, and `tests/peers/test_tools.py` runs each check with the tool itself.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from adapterhub.manifest import oci_manifest
from tests.conftest import Run, need_program
from tests.support.adapters import Make
from tests.support.bills import trained
from tests.support.environments import environment
from tests.support.signing import model_signing

SIGNATURE, ATTESTATION, MANIFEST, CONFIG, BILL = ITEMS = ("signature", "attestation", "manifest, files", "config", "bill")
OURS: Final = "ours"
THEIRS: Final = "theirs"
MODELPACK, CYCLONEDX = "modelpack-client==0.1.0", "cyclonedx-python-lib[json-validation]==11.12.0"
SPDX, IN_TOTO = "spdx-python-model==0.0.6", "in-toto-attestation==0.9.3"
TOOLS = {
    "model_signing": "model-signing 1.1.1",
    "cosign": "cosign 2.5",
    "oras": "oras 1.2",
    "skopeo": "skopeo 1.18",
    "modelpack": MODELPACK.replace("==", " "),
    "in-toto": IN_TOTO.replace("==", " "),
    "cyclonedx": "cyclonedx-python-lib 11.12.0",
    "spdx": SPDX.replace("==", " "),
}
_BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_BILL_TYPE = "application/vnd.cyclonedx+json"
_TESTS = "https://in-toto.io/attestation/test-result/v0.1"
_PAGE = """# Tools of others

After this page you know which tools verify, read or carry what adapterhub hands over (**ours**), and from which ones adapterhub
verifies or reads the same (**theirs**).

{table}

`python -m tests.support.tool_checks` prints this page from the checks that `make test-peers` runs, one for each word of a cell.
A cell without one claims nothing. `cosign verify` finds what `sign --cosign` signs; the signature of a version's files
and its name is for `model_signing`.
"""


@dataclass(frozen=True)
class Workbench:
    """What a check works with: adapterhub as a process, adapters, a registry on this machine, and an empty folder."""

    run: Run
    make: Make
    host: str
    folder: Path

    def call(self, program: str, *words: object, code: int = 0, folder: str = ".") -> str:
        """Run a tool in the folder, or in one below it, with a home of its own; return its standard output."""
        # The password of a key of cosign, which it would ask for.
        env = {**os.environ, "HOME": str(self.folder), "COSIGN_PASSWORD": "", "COSIGN_EXPERIMENTAL": "1"}
        command = [program if "/" in program else need_program(program), *map(str, words)]
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=120, cwd=self.folder / folder, env=env, check=False
        )
        assert result.returncode == code, result.stderr
        return result.stdout

    def python(self, program: str, *words: object, needs: str, code: int = 0, folder: str = ".") -> str:
        """Run a program of Python in an environment that has a package; return its standard output."""
        packages = (needs, "securesystemslib[crypto]==1.6.0") if needs == IN_TOTO else (needs,)
        return self.call(str(environment(*packages)), "-c", program, *words, code=code, folder=folder)

    def pushed(self, name: str) -> tuple[str, str]:
        """Push an adapter into the registry; return its address without the version, and its digest."""
        address = f"{self.host}/{name}"
        return address, json.loads(self.run("push", self.make("sql"), f"oci://{address}:v1", "--json").stdout)["digest"]

    def keys(self) -> None:
        """Make a key of adapterhub, `team.key`, and one of cosign, `cosign.key`."""
        self.run("key", "generate", "team")
        self.call("cosign", "generate-key-pair")


Origin = Literal["ours", "theirs"]


@dataclass(frozen=True)
class Check:
    """A claim about a tool and what is handed over, in one or both directions, and what shows it."""

    tool: str
    item: str
    origins: tuple[Origin, ...]
    show: Callable[[Workbench], None]

    def __str__(self) -> str:
        return f"{self.show.__name__}-{self.item.partition(',')[0]}"


CHECKS: list[Check] = []
_Show = Callable[[Workbench], None]


def claims(tool: str, item: str, *origins: Origin) -> Callable[[_Show], _Show]:
    """Add the decorated function as the check of a claim."""

    def add(show: _Show) -> _Show:
        CHECKS.append(Check(tool, item, origins, show))
        return show

    return add


# ---- signatures


@claims("model_signing", SIGNATURE, OURS)
def model_signing_verifies_ours(bench: Workbench) -> None:
    bench.run("key", "generate", "team")
    bench.run("push", bench.make("sql"), f"oci://{bench.host}/tools/ms:v1")
    bench.run("sign", f"oci://{bench.host}/tools/ms:v1", "--key", "team.key")
    bench.run("pull", f"oci://{bench.host}/tools/ms:v1", "-o", "out", "--require-signature", "--key", "team.pub")
    assert model_signing("verify", bench.folder / "team.pub", bench.folder / "out") == ""
    (bench.folder / "out/README.md").write_text("another")
    assert "Hash mismatch" in model_signing("verify", bench.folder / "team.pub", bench.folder / "out")


@claims("model_signing", SIGNATURE, THEIRS)
def signatures_of_model_signing_are_verified(bench: Workbench) -> None:
    bench.run("key", "generate", "team")
    bench.run("describe", folder := bench.make("sql"))
    assert model_signing("sign", bench.folder / "team.key", folder) == ""
    bench.run("push", folder, f"oci://{bench.host}/tools/by-ms:v1")
    bench.run("verify", f"oci://{bench.host}/tools/by-ms:v1", "--key", "team.pub", "--signed-as", "sql")


_SIGN = ("--key=cosign.key", "--tlog-upload=false", "--yes", "--allow-insecure-registry", "--allow-http-registry")
_VERIFY = ("--insecure-ignore-tlog=true", "--allow-insecure-registry", "--allow-http-registry")


@claims("cosign", SIGNATURE, THEIRS)
def signatures_of_cosign_are_verified(bench: Workbench) -> None:
    bench.keys()
    name, digest = bench.pushed("tools/by-cosign")
    assert "is not signed" in bench.run("verify", f"oci://{name}:v1", "--key", "cosign.pub", code=1).stdout
    bench.call("cosign", "sign", *_SIGN, f"{name}@{digest}")
    bench.run("verify", f"oci://{name}:v1", "--key", "cosign.pub")
    bench.run("verify", f"oci://{name}:v1", "--key", "team.pub", code=1)


@claims("cosign", SIGNATURE, OURS)
def cosign_verifies_signatures_for_every_name(bench: Workbench) -> None:
    bench.keys()
    name, digest = bench.pushed("tools/for-cosign")
    for number, key in enumerate(("team", "other")):  # the second goes along with the first
        if number:
            bench.run("key", "generate", key)
        bench.run("sign", f"oci://{name}:v1", "--key", f"{key}.key", "--cosign")
    bench.call("cosign", "sign", *_SIGN, f"{name}@{digest}")
    bench.run("copy", f"oci://{name}:v1", f"oci://{name}-copy:v1")
    for repository in (name, f"{name}-copy"):
        for key in ("team", "other", "cosign"):
            bench.call("cosign", "verify", *_VERIFY, f"--key={key}.pub", f"{repository}@{digest}")
            bench.run("verify", f"oci://{repository}:v1", "--key", f"{key}.pub")
        assert json.loads(bench.run("list", f"oci://{repository}", "--json").stdout)["tags"] == ["v1"]
    other_image, digest = bench.pushed("tools/for-cosign-not")
    bench.call("cosign", "verify", *_VERIFY, "--key=team.pub", f"{other_image}@{digest}", code=10)


@claims("oras", SIGNATURE, OURS, THEIRS)
def oras_fetches_signatures_and_attaches_them(bench: Workbench) -> None:
    bench.run("key", "generate", "team")
    name, digest = bench.pushed("tools/oras-sig")
    bench.run("sign", f"oci://{name}:v1", "--key", "team.key")
    (attached,) = json.loads(bench.run("attach", f"oci://{name}:v1", "--list", "--json").stdout)["attached"]
    assert attached["digest"] in bench.call("oras", "discover", "--plain-http", f"{name}@{digest}")
    bench.call("oras", "pull", "--plain-http", f"{name}@{attached['digest']}", "-o", "sig")
    # To the same version in another repository, which has no signature of its own.
    bench.call("oras", "cp", "--from-plain-http", "--to-plain-http", f"{name}:v1", f"{name}-again:v1")
    again = f"oci://{name}-again:v1"
    assert "is not signed" in bench.run("verify", again, "--key", "team.pub", code=1).stdout
    words = ("--plain-http", "--artifact-type", _BUNDLE, f"{name}-again@{digest}", f"model.sig:{_BUNDLE}")
    (bench.folder / "model.sig").write_bytes((bench.folder / "sig/model.sig").read_bytes())
    bench.call("oras", "attach", *words)
    bench.run("verify", again, "--key", "team.pub", "--signed-as", f"{name}".partition("/")[2])


@claims("skopeo", SIGNATURE, THEIRS)
def skopeo_carries_the_signatures_of_cosign(bench: Workbench) -> None:
    bench.keys()
    name, digest = bench.pushed("tools/skopeo-sig")
    bench.call("cosign", "sign", *_SIGN, f"{name}@{digest}")
    for tag in ("v1", f"{digest.replace(':', '-')}.sig"):
        addresses = (f"docker://{name}:{tag}", f"docker://{name}-copy:{tag}")
        bench.call("skopeo", "copy", "--src-tls-verify=false", "--dest-tls-verify=false", *addresses)
    bench.run("verify", f"oci://{name}-copy:v1", "--key", "cosign.pub")


# ---- attestations


def _attested(bench: Workbench, name: str, *options: str) -> tuple[str, str]:
    address, digest = bench.pushed(name)
    bench.run("attest", f"oci://{address}:v1", *options, "--key", "team.key")
    return address, digest


@claims("cosign", ATTESTATION, OURS)
def cosign_verifies_attestations_of_ours(bench: Workbench) -> None:
    bench.keys()
    name, digest = _attested(bench, "tools/attested", "--scan")
    version, type_ = f"{name}@{digest}", "--type=urn:adapterhub:attestation:scan:1"
    _verified_by_cosign(bench, version, type_)
    _verified_by_cosign(bench, version, type_, "--key=cosign.pub", code=1)


def _verified_by_cosign(bench: Workbench, version: str, *words: str, code: int = 0) -> str:
    # Without roots, cosign asks the public Sigstore for them, although a key needs none.
    (bench.folder / "root.json").write_text('{"mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1"}')
    options = ("--new-bundle-format", "--trusted-root=root.json", *_VERIFY, "--key=team.pub")
    return bench.call("cosign", "verify-attestation", *options, *words, version, code=code)


@claims("cosign", ATTESTATION, THEIRS)
def attestations_of_cosign_are_verified(bench: Workbench) -> None:
    bench.keys()
    (bench.folder / "tests.json").write_text('{"result": "PASSED", "configuration": []}')
    for number, form in enumerate(((), ("--new-bundle-format",))):
        name, digest = bench.pushed(f"tools/attested-{number}")
        bench.call("cosign", "attest", *form, f"--type={_TESTS}", "--predicate=tests.json", *_SIGN, f"{name}@{digest}")
        verified = bench.run("verify", f"oci://{name}:v1", "--attestations", "--key", "cosign.pub").stdout
        assert "tests attested by cosign.pub" in verified


@claims("oras", ATTESTATION, OURS)
def oras_copies_attestations_along(bench: Workbench) -> None:
    bench.run("key", "generate", "team")
    name, _ = _attested(bench, "tools/oras-att", "--scan")
    bench.call("oras", "cp", "-r", "--from-plain-http", "--to-plain-http", f"{name}:v1", f"{name}-copy:v1")
    bench.run("verify", f"oci://{name}-copy:v1", "--attestations", "--key", "team.pub")


_IN_TOTO_CODE = """
import base64, json, sys
from google.protobuf.json_format import ParseDict
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement
statement = json.loads(base64.b64decode(json.load(open(sys.argv[1]))["dsseEnvelope"]["payload"]))
read = Statement.copy_from_pb(ParseDict(statement, statement_pb2.Statement()))
read.validate()
print(read.pb.subject[0].digest["sha256"])
"""


@claims("in-toto", ATTESTATION, OURS)
def in_toto_reads_attestations(bench: Workbench) -> None:
    bench.run("key", "generate", "team")
    name, digest = _attested(bench, "tools/in-toto", "--scan", "--bill")
    bench.run("attach", f"oci://{name}:v1", "--list", "--type", _BUNDLE, "-o", "attested")
    paths = sorted((bench.folder / "attested").rglob("*.json"))
    assert len(paths) == 2
    for path in paths:
        assert bench.python(_IN_TOTO_CODE, path, needs=IN_TOTO).strip() == digest.removeprefix("sha256:")


# ---- manifests with their files, and configs


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@claims("oras", MANIFEST, OURS, THEIRS)
def oras_pulls_versions_and_pushes_folders(bench: Workbench) -> None:
    name, digest = bench.pushed("tools/oras")
    bench.call("oras", "pull", "--plain-http", f"{name}:v1", "-o", "by-oras")
    bench.run("pull", f"oci://{name}:v1", "-o", "by-us")
    assert _contents(bench.folder / "by-oras") == _contents(bench.folder / "by-us")
    files = sorted(_contents(bench.folder / "sql"))  # without an adapter.json
    bench.call("oras", "push", "--plain-http", f"{name}-plain:v1", *files, folder="sql")
    assert json.loads(bench.run("copy", f"oci://{name}-plain:v1", "team/sql", "--json").stdout)["digest"] == digest


@claims("skopeo", MANIFEST, OURS, THEIRS)
def skopeo_copies_versions_there_and_back(bench: Workbench) -> None:
    name, digest = bench.pushed("tools/skopeo")
    bench.call("skopeo", "copy", "--src-tls-verify=false", f"docker://{name}:v1", "oci:layout:v1")
    bench.call("skopeo", "copy", "--dest-tls-verify=false", "oci:layout:v1", f"docker://{name}-back:v1")
    for number, address in enumerate(("oci:layout:v1", f"oci://{name}-back:v1")):
        assert json.loads(bench.run("pull", address, "-o", f"out{number}", "--json").stdout)["digest"] == digest


_MODELPACK_CODE = """
import sys
from modelpack_client import ModelLayer, ModelPackClient, ModelPackConfig, ModelTechnicalConfig
act, reference, folder, *names = sys.argv[1:]
client = ModelPackClient(insecure=True)
if act == "pull":  # it validates the config by ModelPack's schema
    print(client.pull(reference, folder).config["config"]["paramSize"])
else:
    layers = [ModelLayer(path, f"application/vnd.cncf.model.{kind}", path) for path, kind in zip(names[::2], names[1::2])]
    client.push(reference, layers, ModelPackConfig(config=ModelTechnicalConfig(param_size="512K", precision="float32")))
"""


@claims("modelpack", MANIFEST, OURS)
@claims("modelpack", CONFIG, OURS)
def modelpack_reads_versions_and_their_configs(bench: Workbench) -> None:
    name, _ = bench.pushed("tools/modelpack")
    assert bench.python(_MODELPACK_CODE, "pull", f"{name}:v1", "out", needs=MODELPACK).strip() == "0.128K"
    bench.run("pull", f"oci://{name}:v1", "-o", "by-us")
    assert _contents(bench.folder / "out") == _contents(bench.folder / "by-us")


@claims("modelpack", MANIFEST, THEIRS)
def artifacts_of_modelpack_are_read(bench: Workbench) -> None:
    files = _contents(bench.make("sql"))
    raw = [word for path in files for word in (path, f"{'doc' if path == 'README.md' else 'weight'}.v1.raw")]
    tars = [["sql", f"weight.v1.{packing}"] for packing in ("tar", "tar+gzip", "tar+zstd")]
    for number, layers in enumerate([raw, *tars]):
        name = f"{bench.host}/tools/by-modelpack{number}:v1"
        words, folder = ("push", name, "-", *layers), "." if number else "sql"
        bench.python(_MODELPACK_CODE, *words, needs=MODELPACK, folder=folder)
        bench.run("pull", f"oci://{name}", "-o", f"out{number}")
        assert _contents(bench.folder / f"out{number}").items() >= files.items()


@claims("oras", CONFIG, OURS)
def oras_fetches_configs(bench: Workbench) -> None:
    name, _ = bench.pushed("tools/oras-config")
    config = bench.call("oras", "manifest", "fetch-config", "--plain-http", f"{name}:v1")
    assert config.encode() == oci_manifest.build(bench.folder / "sql").config_bytes


@claims("skopeo", CONFIG, OURS)
def skopeo_inspects_configs(bench: Workbench) -> None:
    name, _ = bench.pushed("tools/skopeo-config")
    config = bench.call("skopeo", "inspect", "--config", "--raw", "--tls-verify=false", f"docker://{name}:v1")
    assert config.encode() == oci_manifest.build(bench.folder / "sql").config_bytes


# ---- bills of materials


_CYCLONEDX_CODE = """
import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
error = JsonStrictValidator(SchemaVersion.V1_7).validate_str(open(sys.argv[1], encoding="utf-8").read())
sys.exit(f"{error}" if error else 0)
"""
_SPDX_CODE = """
import io, sys
from spdx_python_model.bindings import v3_0_1 as model
objects = model.SHACLObjectSet()
with open(sys.argv[1], "rb") as file:
    model.JSONLDDeserializer().read(file, objects)
if objects.missing_ids:
    sys.exit(f"{objects.missing_ids}")
model.JSONLDSerializer().write(objects, io.BytesIO())  # which checks that each property has as many values as it must
"""


def _billed(bench: Workbench, *options: str) -> Path:
    bench.run("bom", trained(bench.folder / "trained"), "-o", "bill.json", *options)
    return bench.folder / "bill.json"


@claims("cyclonedx", BILL, OURS)
def bills_are_valid_by_cyclonedx(bench: Workbench) -> None:
    bench.python(_CYCLONEDX_CODE, path := _billed(bench), needs=CYCLONEDX)
    path.write_text(path.read_text().replace('"machine-learning-model"', '"adapter"'))
    bench.python(_CYCLONEDX_CODE, path, needs=CYCLONEDX, code=1)


@claims("spdx", BILL, OURS)
def bills_are_valid_by_spdx(bench: Workbench) -> None:
    bench.python(_SPDX_CODE, path := _billed(bench, "--spdx"), needs=SPDX)
    path.write_text(path.read_text().replace('"software_primaryPurpose": "model"', '"software_primaryPurpose": "adapter"'))
    bench.python(_SPDX_CODE, path, needs=SPDX, code=1)


@claims("cosign", BILL, OURS)
def cosign_verifies_bills(bench: Workbench) -> None:
    bench.keys()
    name, digest = _attested(bench, "tools/bill", "--bill")
    envelope = json.loads(_verified_by_cosign(bench, f"{name}@{digest}", "--type=cyclonedx"))
    assert json.loads(base64.b64decode(envelope["payload"]))["predicate"]["bomFormat"] == "CycloneDX"


@claims("oras", BILL, OURS, THEIRS)
def oras_fetches_bills_and_attaches_them(bench: Workbench) -> None:
    name, digest = bench.pushed("tools/oras-bill")
    bill = _billed(bench)
    bench.run("attach", f"oci://{name}:v1", bill, "--type", _BILL_TYPE)
    (attached,) = json.loads(bench.run("attach", f"oci://{name}:v1", "--list", "--json").stdout)["attached"]
    bench.call("oras", "pull", "--plain-http", f"{name}@{attached['digest']}", "-o", "by-oras")
    assert (bench.folder / "by-oras/bill.json").read_bytes() == bill.read_bytes()
    other_image, _ = bench.pushed("tools/oras-bill-too")
    bench.call("oras", "attach", "--plain-http", "--artifact-type", _BILL_TYPE, f"{other_image}@{digest}", "bill.json")
    bench.run("attach", f"oci://{other_image}:v1", "--list", "--type", _BILL_TYPE, "-o", "by-us")
    assert (bench.folder / "by-us/bill.json").read_bytes() == bill.read_bytes()


# ---- the page


def _origins(tool: str, item: str) -> list[Origin]:
    """Return the directions that checks claim of a tool and what is handed over."""
    return sorted({origin for check in CHECKS if (check.tool, check.item) == (tool, item) for origin in check.origins})


def page() -> str:
    """Return docs/tools.md."""
    lines = [f"| tool | {' | '.join(ITEMS)} |", f"| --- |{' --- |' * len(ITEMS)}"]
    for tool, title in TOOLS.items():
        cells = [", ".join(_origins(tool, item)) for item in ITEMS]
        lines.append(f"| {title} | {' | '.join(cell or '–' for cell in cells)} |")
    return _PAGE.format(table="\n".join(lines))


if __name__ == "__main__":
    sys.stdout.write(page())
