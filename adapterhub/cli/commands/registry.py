"""Commands on a registry: init, push, pull, list, show, verify, fsck."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import inputs, output
from adapterhub.cli.environment import at_remote, complete_ref, hinting, open_registry, registry_folder, remote_option
from adapterhub.cli.errors import hint_of
from adapterhub.cli.options import Settings, command
from adapterhub.cli.output import Column
from adapterhub.cli.progress import bytes_bar
from adapterhub.cli.transfers import transfer_options
from adapterhub_converters.errors import IntegrityError, NotFoundError, RefusedError, UsageError

from . import forms, rules

if TYPE_CHECKING:
    from adapterhub.analysis.norms import Heat
    from adapterhub.index.queries import Row
    from adapterhub.maintenance.fsck import Finding
    from adapterhub.registry.recipe import Conversion
    from adapterhub.registry.registry import Registry, Version
    from adapterhub_converters.bases import BaseSpec


@command(
    "init",
    short="Make a registry.",
    example="""
    adapterhub init
    adapterhub init ~/adapters
    adapterhub init --project""",
)
@click.argument("folder", metavar="[DIR]", required=False)
@click.option("--project", is_flag=True, help="Write an adapterhub.toml with examples instead: remotes, rules of a project.")
@click.pass_obj
def init(settings: Settings, folder: str | None, *, project: bool) -> None:
    """Make a registry in a folder: registry.db and, beside it, the store .adapterhub/.

    Without DIR it is made where --registry, $ADAPTERHUB_REGISTRY or the project says, else here. One that is there already
    stays as it is.
    """
    from adapterhub.cli.environment import named_registry
    from adapterhub.registry.registry import Registry

    if project:
        from .remote import init_project

        init_project(settings, folder)
        return

    root = Path(folder) if folder else registry_folder(settings) if named_registry(settings) else Path()
    new = not (root / ".adapterhub" / "oci-layout").exists()
    Registry.init(root).close()
    text = f"{'made' if new else 'already there:'} {root / 'registry.db'}"
    output.emit({"registry": str(root), "created": new}, as_json=settings.as_json, text=lambda: output.write(text))


@command(
    "push",
    short="Store an adapter as a new version.",
    example="""
    adapterhub push ./sql team/sql
    adapterhub push ./sql team/sql:prod --base ./Qwen3-0.6B
    adapterhub push ./sql team/sql:prod --expect sha256:5f2c…
    adapterhub push team/sql:v2 team/sql:v2 --remote
    adapterhub push team/sql:v2 oci://registry.example/team/sql:v2""",
)
@click.argument("source", metavar="SRC")
@click.argument("ref", shell_complete=complete_ref)
@click.option(
    "--base", metavar="BASE", help="Pin the model it was trained on (a folder, a file, a URL); refused when it does not fit."
)
@click.option("--expect", metavar="DIGEST", help="Fail (exit 7) unless REF still has this digest, or is `absent`.")
@click.option("--force", is_flag=True, help="Push in spite of what validate calls errors.")
@click.option("--private", is_flag=True, help="On a hub: a repository that has to be made is not for everybody to read.")
@remote_option
@forms.options(
    "Convert it first, and name SRC as its parent; `image`, elsewhere only: a container image of it.", more=("image",)
)
@transfer_options
@click.pass_obj
def push(
    settings: Settings,
    *,
    source: str,
    ref: str,
    base: str | None,
    expect: str | None,
    force: bool,
    private: bool,
    remote: str | None,
    conversion: Conversion | None,
) -> None:
    """Store an adapter as the next version of a name.

    REF is namespace/name, or namespace/name:tag to move a tag as well; the version's number, v1, v2 …, is allotted.
    The same files again make no new version. What validate calls an error is refused. The registry is made if there is none.
    REF may be an address elsewhere, like oci://HOST/NAME[:TAG] or hf://ORG/NAME[@BRANCH], or on a remote.
    """
    from adapterhub.ref import Ref
    from adapterhub.remotes.location import is_address

    name = None if remote is None else ref.partition(":")[0]
    ref = at_remote(ref, remote)
    if is_address(ref):
        from . import remotes

        remotes.push(
            settings, source, ref, base=base, expect=expect, force=force, private=private, conversion=conversion, name=name
        )
        return
    if forms.is_image(conversion):
        raise UsageError("--as image", "is for places elsewhere: versions here are files", "Name one like layout://x.tar:v1")
    if private:
        raise UsageError("--private", "is for a repository on a hub, hf://ORG/NAME", "Leave it out")
    target = Ref.parse(ref)
    rules.allowed(target.name)
    spec = inputs.read_base(base, settings) if base else None
    with inputs.opened(source, settings) as found:
        checked(found, spec, force=force)
        with (
            forms.packaged(found, conversion, spec, name=target.name) as folder,
            pinned(folder, spec) as ready,
            open_registry(settings, make=True) as registry,
            bytes_bar("storing") as progress,
        ):
            rules.folder_fits(ready, found.where)
            version = registry.push(ready, target, expect=expect, progress=progress)
    for name in version.skipped:
        output.say(output.one_line(f"left out: {name}"))
    output.emit(version_document(version), as_json=settings.as_json, text=lambda: output.write(_pushed(version)))


def checked(found: inputs.Source, base: BaseSpec | None, *, force: bool) -> None:
    """Refuse what `validate` finds errors in, unless forced: then say how many."""
    from adapterhub import check

    report = check.check(found.path, base=base, where=found.where)
    if report.ok:
        return
    errors = [problem for problem in report.problems if problem.severity == check.ERROR]
    if force:
        output.say(output.one_line(f"pushed in spite of {output.plural(len(errors), 'error')}, the first {errors[0].code}"))
        return
    misfit = f"does not fit {base.where}: " if base and any(problem.code in check.FIT for problem in errors) else ""
    more = f" (and {output.plural(len(errors) - 1, 'more error')})" if len(errors) > 1 else ""
    where = f"{errors[0].where}: " if errors[0].where else ""
    with_base = f" --base {base.where}" if base else ""
    hint = f"`adapterhub validate {found.where}{with_base}` says more, --force pushes it all the same"
    raise RefusedError(found.where, f"{misfit}{errors[0].code}: {where}{errors[0].what}{more}", hint)


@contextmanager
def pinned(folder: Path, base: BaseSpec | None) -> Iterator[Path]:
    """The folder, or a copy of it whose adapter.json pins the base."""
    if base is None:
        yield folder
        return
    import tempfile

    from adapterhub.manifest import describe
    from adapterhub.manifest.package_files import listing

    document = describe.read_facts(folder) or describe.describe(folder)
    pinned = describe.describe(folder, base=base)["base"]
    document["base"] = {**pinned, **{key: value for key, value in document["base"].items() if value}}
    with tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
        for path in listing(folder).files:
            if path != describe.NAME:
                (Path(temporary) / path).parent.mkdir(parents=True, exist_ok=True)
                inputs.place(folder / path, Path(temporary) / path)
        describe.write_facts(Path(temporary), document)
        yield Path(temporary)


def _pushed(version: Version) -> str:
    kind = "" if version.new else "already there: "
    tags = f" ({', '.join(version.tags)})" if version.tags else ""
    return f"{kind}{version.ref}{tags}  {output.size(version.size or 0)}  {output.digest(version.digest)}"


def version_document(version: Version) -> dict[str, Any]:
    """A version as a push gives it; others leave out what only a push can say."""
    return {
        "ref": str(version.ref),
        "name": version.name,
        "number": version.number,
        "tags": list(version.tags),
        "deprecated": version.deprecated,
        "digest": version.digest,
        "size": version.size,
        "new": version.new,
        "skipped": list(version.skipped),
    }


@command(
    "pull",
    short="Write a version's files, verified.",
    example="""
    adapterhub pull team/sql:v2
    adapterhub pull team/sql:prod -o ./sql-prod
    adapterhub pull team/sql:v2 --as gguf
    adapterhub pull team/sql:v2 --remote
    adapterhub pull team/sql:v2 --from adapters.tar --offline
    adapterhub pull oci://registry.example/team/sql:v2 -o ./sql
    adapterhub pull --locked -o ./adapters""",
)
@click.argument("ref", required=False, shell_complete=complete_ref)
@click.option("-o", "--output", "out", metavar="OUT", help="Where to write it. [default: ./NAME, with its ending for a file]")
@click.option("--base", metavar="BASE", help="The model it is for, where --as needs more than its adapter.json says.")
@remote_option
@click.option("--lock", is_flag=True, help="Record in adapters.lock which version it is.")
@click.option("--locked", is_flag=True, help="Pull what adapters.lock says, by digest: REF, or all of it below OUT.")
@click.option("--from", "bundled", metavar="BUNDLE", help="Take it from a bundle, a .tar or a folder, not from a registry.")
@click.option("--offline", is_flag=True, help="Ask no network: refused where REF or BASE is elsewhere.")
@forms.options("Convert it on the way out.", more=("ollama",))
@click.option("--model", metavar="MODEL", help="With --as ollama: what Ollama calls the base; else the path of --base.")
@transfer_options
@click.pass_obj
def pull(
    settings: Settings,
    *,
    ref: str | None,
    out: str | None,
    base: str | None,
    remote: str | None,
    lock: bool,
    locked: bool,
    bundled: str | None,
    offline: bool,
    conversion: Conversion | None,
    model: str | None,
) -> None:
    """Write a version's files into a new folder: every byte verified, all of them or nothing.

    With --as in another format, under the rules of convert: a conversion is kept in the registry, so that the next is a copy.
    From elsewhere (oci://HOST/NAME[:TAG|@DIGEST], or a remote) a pull that was stopped, even killed, goes on where it was.
    What lies there already, right, is left as it is.
    """
    from adapterhub.remotes.location import is_address

    if model and conversion is None:
        raise UsageError("--model", "is for --as ollama", "Leave it out")
    if locked or ref is None:
        from .lock import pull_locked

        alone = not (lock or remote is not None or base is not None or conversion is not None or bundled or offline)
        pull_locked(settings, ref, out, locked=locked, alone=alone)
        return
    address = at_remote(ref, remote)
    if bundled or offline:
        from . import bundle

        address = bundle.found(address, bundled, base=base, offline=offline)
    if is_address(address):
        from . import remotes

        plain, called = conversion is None and base is None, None if remote is None else ref
        remotes.pull(settings, address, out, plain=plain, ref=called, lock=lock)
        return
    with hinting(ref):
        rules.ref_fits(settings, ref)
        if conversion is not None:
            if lock:
                raise UsageError(
                    "--lock", "records the version itself, not a conversion of it", "Lock it with `adapterhub lock`"
                )
            forms.pull(settings, ref, out, base, conversion, model=model)
        elif base is not None:
            raise UsageError("--base", "is for --as", "Leave it out")
        else:
            _pull(settings, ref, out, lock=lock)


def _pull(settings: Settings, ref: str, out: str | None, *, lock: bool) -> None:
    from adapterhub.ref import Ref

    wanted = Ref.parse(ref)
    target = Path(out) if out else Path(wanted.name.rpartition("/")[2])
    with open_registry(settings) as registry:
        with bytes_bar("writing") as progress:
            version = registry.pull(wanted, target, progress)
        files = [layer.path for layer in registry.files(version)]
    if lock:
        from .lock import keep_version

        keep_version(settings, ref, version)
    document = {**version_document(version), "output": str(target), "files": files}
    del document["new"], document["skipped"]
    output.deprecated(str(version.ref), version.deprecated)
    size = output.size(version.size or 0)
    text = f"{target}: {version.ref}, {output.plural(len(files), 'file')}, {size}, verified"
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(text))


_LIST = (
    Column("REF"),
    Column("TAGS", drop=1),
    Column("BASE", drop=3),
    Column("METHOD", drop=5),
    Column("R", right=True, drop=4),
    Column("SIZE", right=True, drop=2),
    Column("PUSHED", drop=6),
)


@command(
    "list",
    short="List versions.",
    example="""
    adapterhub list
    adapterhub list team --tree
    adapterhub list team/sql --json
    adapterhub list team --remote
    adapterhub list oci://registry.example/team/sql""",
)
@click.argument("prefix", metavar="[PREFIX]", required=False, shell_complete=complete_ref)
@click.option("--tree", "as_tree", is_flag=True, help="By namespace and name, with what each version was made from.")
@remote_option
@click.pass_obj
def list_(settings: Settings, prefix: str | None, *, as_tree: bool, remote: str | None) -> None:
    """List versions, the newest of each name first.

    PREFIX is a namespace or a name, or oci://HOST/NAME or hf://ORG/NAME for the tags there; on a remote, its names are listed,
    or the tags of one. A narrow terminal shows fewer columns, and of a tree the newest versions and those with tags; a pipe or
    --json has everything.
    """
    from adapterhub.remotes.location import is_address

    if remote is not None:
        from . import remotes

        remotes.list_remote(settings, prefix, remote, as_tree=as_tree)
        return
    if prefix and is_address(prefix):
        from . import remotes

        remotes.list_tags(settings, prefix, as_tree=as_tree)
        return
    with open_registry(settings) as registry:
        rows = registry.list(prefix)
        if prefix and not rows:
            raise NotFoundError(prefix, "no adapter of this name or namespace", "Run `adapterhub list`")
        found = registry.deprecations()
    for (name, number), message in sorted(found.items()) if rows else ():
        if any(row.name == name and number in (0, row.number) for row in rows):
            output.deprecated(f"{name}:v{number}" if number else name, message)
    from adapterhub.cli.views import tree

    document = tree.document(rows, found) if as_tree else {"adapters": [row_document(row, found) for row in rows]}
    output.emit(document, as_json=settings.as_json, text=lambda: _list_text(rows, as_tree=as_tree))


def _list_text(rows: Sequence[Row], *, as_tree: bool) -> None:
    from adapterhub.cli.views import tree

    if not rows:
        output.say("no adapters yet; `adapterhub push SRC namespace/name` stores one")
        return
    if as_tree:
        for line in tree.lines(rows, screen=output.width()):
            output.write(line)
        return
    cells = [[*row_cells(row), row.time[:10]] for row in rows]
    for line in output.table(_LIST, cells, screen=output.width()):
        output.write(line)


def row_cells(row: Row) -> list[str]:
    """What tables of versions show of each: ref, tags, base, method, rank, size."""
    return [
        str(row.ref),
        ", ".join(row.tags) or "-",
        (row.base or "-").rpartition("/")[2],
        row.method or "-",
        str(row.r) if row.r is not None else "-",
        output.size(row.size) if row.size is not None else "-",
    ]


def row_document(row: Row, deprecated: Mapping[tuple[str, int], str]) -> dict[str, Any]:
    """A version as lists give it to programs; `deprecated` as `Registry.deprecations` says it."""
    return {
        "ref": str(row.ref),
        "name": row.name,
        "number": row.number,
        "tags": list(row.tags),
        "deprecated": deprecated.get((row.name, row.number), deprecated.get((row.name, 0))),
        "digest": row.digest,
        "size": row.size,
        "time": row.time,
        "base": row.base,
        "revision": row.revision,
        "method": row.method,
        "r": row.r,
        "alpha": row.alpha,
        "format": row.format,
        "dtype": row.dtype,
        "parameters": row.parameters,
        "license": row.license,
        "description": row.description,
        "parents": list(row.parents),
    }


@command(
    "show",
    short="Say what an adapter is.",
    example="""
    adapterhub show team/sql:v2
    adapterhub show ./sql --plot sql.png""",
)
@click.argument("source", metavar="SRC", shell_complete=complete_ref)
@click.option("--base", metavar="BASE", help="Show norms over those of this model's weights (a Hugging Face folder).")
@click.option("--plot", metavar="PNG", help="Draw the norms as a picture as well; it must not be there yet.")
@click.option("--headers-only", is_flag=True, help="Read no values: no norms, takes no time.")
@click.pass_obj
def show(settings: Settings, *, source: str, base: str | None, plot: str | None, headers_only: bool) -> None:
    """Say what an adapter is: its base, size and shape, how it was made, where it acts, its files and their digests.

    SRC is a ref, or a folder, file or address: then it says what a push would store, and under which digest. Where it acts
    is the norm of what it adds to each module, its scale included, layer by layer: a picture on a terminal, numbers elsewhere.
    """
    from adapterhub.cli.views import norms as heat

    if headers_only and (base or plot):
        raise UsageError("--headers-only", "reads no values to draw", "Leave it out, or --base and --plot")
    ref = inputs.ref_of(source, settings)
    if ref is not None:
        with open_registry(settings) as registry:
            document = registry.show(ref)
        output.deprecated(document["ref"], document["deprecated"])
        norms = None if headers_only else heat.read(source, settings, base=base, plot=plot)
    else:
        with inputs.opened(source, settings) as found:
            with inputs.as_folder(found) as folder:
                document = _show_path(source, folder)
            norms = None if headers_only else heat.read(str(found.path), settings, base=base, plot=plot)
    if norms is not None:
        document = {**document, "norms": heat.document(norms)}
    output.emit(document, as_json=settings.as_json, text=lambda: _show_text(document, norms))


def _show_path(where: str, folder: Path) -> dict[str, Any]:
    import json

    from adapterhub.manifest import describe, oci_manifest

    made = oci_manifest.build(folder)
    document, _ = describe.settle(folder)
    described: dict[str, Any] = {
        "ref": None,
        "name": None,
        "number": None,
        "tags": [],
        "protected": [],
        "deprecated": None,
        "digest": made.digest,
        "size": made.size,
        "time": None,
        "evaluations": [],
    }
    return {**described, "path": where, "facts": document, "manifest": json.loads(made.raw)}


def _show_text(document: Mapping[str, Any], norms: Heat | str | None) -> None:
    from adapterhub.cli.views import norms as heat

    for line in [*output.pairs(_show_pairs(document), screen=output.width()), *heat.lines(norms)]:
        output.write(line)
    files = [
        [entry["path"], output.size(entry["size"]), output.digest(entry["digest"])]
        for entry in document["facts"].get("files", [])
    ]
    if files:
        output.write()
        columns = (Column("FILE"), Column("SIZE", right=True), Column("DIGEST", drop=1))
        for line in output.table(columns, files, screen=output.width()):
            output.write(line)


def _show_pairs(document: Mapping[str, Any]) -> dict[str, str]:
    facts = document["facts"]
    base = facts.get("base") or {}
    training = facts.get("training") or {}
    lines = {
        "adapter": document["ref"] or document.get("path"),
        "tags": ", ".join(f"{tag} (protected)" if tag in document["protected"] else tag for tag in document["tags"]),
        "digest": output.digest(document["digest"]),
        "size": output.size(document["size"]),
        "pushed": document["time"],
        "description": facts.get("description"),
        "license": facts.get("license"),
        "base": " ".join(str(part) for part in (base.get("repo"), base.get("revision")) if part),
        "architecture": base.get("architecture"),
        "fingerprint": output.digest(base.get("fingerprint") or ""),
        "trained in": base.get("quantization"),
        "method": _method(facts),
        "targets": ", ".join(facts.get("targets") or []),
        "weights": f"{output.number(facts['parameters'])} parameters, {facts['dtype']}, {facts['format']}"
        if "format" in facts
        else "",
        "metrics": ", ".join(f"{key} {value:g}" for key, value in _numbers(training.get("metrics"))),
        "evaluated": "; ".join(
            f"{item['name']}: {', '.join(f'{key} {value:g}' for key, value in item['metrics'].items())}"
            for item in document["evaluations"]
        ),
        "data": ", ".join(str(item.get("name") or item.get("path")) for item in training.get("data") or []),
        "parents": ", ".join(f"{parent.get('ref') or parent['digest']}" for parent in facts.get("parents") or []),
    }
    return {key: str(value) for key, value in lines.items() if value}


def _method(facts: Mapping[str, Any]) -> str:
    if not facts.get("method"):
        return ""
    scale = ", rsLoRA" if facts.get("rslora") else ""
    return f"{facts['method']}, r {facts.get('r')}, alpha {facts.get('alpha')}{scale}"


def _numbers(metrics: object) -> Iterator[tuple[str, float]]:
    if isinstance(metrics, Mapping):
        for key, value in metrics.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                yield str(key), float(value)


@command(
    "verify",
    short="Compare bytes with their digests.",
    example="""
    adapterhub verify team/sql:v2
    adapterhub verify ./sql""",
)
@click.argument("source", metavar="SRC", shell_complete=complete_ref)
@click.pass_obj
def verify(settings: Settings, source: str) -> int:
    """Compare bytes with their digests: a folder with its adapter.json, a version here or elsewhere with its manifest.

    Exits 0 when every byte is right, 1 when one is not.
    """
    from adapterhub.maintenance import fsck
    from adapterhub.maintenance.fsck import Finding, verify_folder

    ref = inputs.ref_of(source, settings)
    try:
        if inputs.is_elsewhere(source):
            with inputs.opened(source, settings) as found:  # which compares as it fetches
                findings = verify_folder(found.folder)
            return _findings(settings, source, findings, good="every byte is right")
        with bytes_bar("verifying") as progress:
            if ref is None:
                findings = verify_folder(Path(source), progress)
            else:
                with open_registry(settings) as registry:
                    findings = fsck.verify(registry, ref, progress)
    except IntegrityError as error:  # the very document that names the digests
        findings = [Finding("unreadable", "error", error.where, error.what, error.hint)]
    return _findings(settings, source, findings, good="every byte is right")


@command(
    "fsck",
    short="Check a whole registry.",
    example="""
    adapterhub fsck
    adapterhub fsck --rebuild-index --registry ~/adapters
    adapterhub fsck --repair --from /backup/adapters""",
)
@click.option("--rebuild-index", "rebuild", is_flag=True, help="Make registry.db anew from the store first.")
@click.option("--repair", is_flag=True, help="Put back bytes that are missing or damaged first.")
@click.option(
    "--from",
    "source",
    metavar="PATH",
    help="Where --repair looks: another registry (a path, or oci://HOST/NAME), an OCI layout, an adapter's folder.",
)
@click.option("--quick", is_flag=True, help="Trust the bytes of a blob that has the right size.")
@click.pass_obj
def fsck(settings: Settings, *, rebuild: bool, repair: bool, source: str | None, quick: bool) -> int:
    """Check a whole registry: every blob against its name, every ref against its log, the index against both.

    Nothing is changed without --rebuild-index or --repair. Exits 0 when clean, 1 when not; what a killed push left behind and
    harms nothing is a note.
    """
    from adapterhub.maintenance import fsck as checks

    if repair != (source is not None):
        raise UsageError("--repair", "and --from PATH go together", "PATH has the right bytes")
    if rebuild:
        registry, findings = checks.rebuilt(registry_folder(settings))
    else:
        registry, findings = open_registry(settings), []
    with registry:
        healed = _repaired(registry, source) if source else []
        with bytes_bar("checking") as progress:
            findings += checks.fsck(registry, quick=quick, progress=progress)
        root = str(registry.root)
    if source:
        output.say(f"put back {output.plural(len(healed), 'blob')} from {output.one_line(source)}")
    return _findings(settings, root, findings, good="clean")


def _repaired(registry: Registry, source: str) -> list[str]:
    from adapterhub.maintenance.repair import repair
    from adapterhub.remotes.location import is_address

    if not is_address(source):
        return repair(registry, Path(source))
    from . import remotes

    with remotes.opened(source) as remote:
        return repair(registry, remote.find)


def _findings(settings: Settings, where: str, findings: Sequence[Finding], *, good: str) -> int:
    errors = sum(finding.severity == "error" for finding in findings)
    document = {
        "ok": not errors,
        "source": where,
        "findings": [
            {
                "code": finding.code,
                "severity": finding.severity,
                "where": finding.where,
                "what": finding.what,
                "hint": hint_of(finding),
            }
            for finding in findings
        ],
    }

    def text() -> None:
        for finding in findings:
            for line in output.wrapped(
                f"{finding.severity}[{finding.code}] {dataclasses.replace(finding, hint=hint_of(finding))}",
                output.width(),
                indent=4,
            ):
                output.write(line)
        output.write(f"{where}: {good if not errors else output.plural(errors, 'error')}")

    output.emit(document, as_json=settings.as_json, text=text)
    return 1 if errors else 0
