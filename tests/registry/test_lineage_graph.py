"""Where adapters come from: recorded with merges and conversions, walked, and made again."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from adapterhub.cli.views import lineage_tree as view
from adapterhub.manifest.document import AdapterManifest, Parent
from adapterhub.ref import Ref
from adapterhub.registry import adapter_recipe, conversion_cache, lineage_graph
from adapterhub.registry.registry import Registry
from adapterhub.remotes.content_documents import lineage_document
from adapterhub_converters.formats import convert, gguf, peft
from tests.conftest import Run, need_program
from tests.registry.test_adapter_recipe import document, write_family
from tests.support.folders import adapter, pairs


@pytest.fixture(scope="module")
def prepared_team(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("team"))


@pytest.fixture
def team(prepared_team: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    shutil.copytree(prepared_team, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_parents_weights_methods_and_bases_are_walked_up_and_children_down(run: Run, team: Path) -> None:
    lineage = document(run, "lineage", "team/both")
    nodes = {node["digest"]: node for node in lineage["nodes"]}
    assert {ref for node in nodes.values() for ref in node["refs"]} == {
        "team/a:v1", "team/b:v1", "team/both:v1", "team/light:v1",
    }  # fmt: skip
    assert {(nodes[e["parent"]]["refs"][0], nodes[e["child"]]["refs"][0], e["weight"]) for e in lineage["edges"]} == {
        ("team/a:v1", "team/both:v1", 0.7), ("team/b:v1", "team/both:v1", -0.3), ("team/both:v1", "team/light:v1", None),
    }  # fmt: skip
    assert nodes[lineage["digest"]]["how"] == "merged by svd"
    assert len({json.dumps(node["base"]["fingerprint"]) for node in nodes.values()}) == 1


def test_the_tree_fits_80_columns_and_names_what_came_of_it(run: Run, team: Path) -> None:
    lines = run("lineage", "team/both").stdout.splitlines()
    assert lines[0].startswith("team/both:v1  sha256:")
    assert lines[1].startswith("├─ 0.7 × team/a:v1  origin not recorded, r 2, on sha256:")
    assert lines[2].startswith("└─ -0.3 × team/b:v1  ")
    assert lines[-1].startswith("└─ team/light:v1  converted to gguf")
    assert max(map(len, lines[1:])) <= 80


def test_a_parent_that_is_not_here_is_a_node_all_the_same(run: Run, team: Path) -> None:
    lineage = document(run, "lineage", "team/elsewhere")
    assert sorted(node["here"] for node in lineage["nodes"]) == [False, True, True]
    assert "not in this registry" in run("lineage", "team/elsewhere").stdout


def test_of_several_names_of_the_same_bytes_the_one_asked_for_comes_first(run: Run, team: Path) -> None:
    run("copy", "team/both", "earlier/both")
    run("copy", "team/a", "earlier/a")
    lines = run("lineage", "team/both").stdout.splitlines()
    assert lines[0].startswith("team/both:v1  ")
    assert lines[1] == "   also earlier/both:v1"
    assert lines[2].startswith("├─ 0.7 × team/a:v1  ")
    assert run("lineage", "earlier/both").stdout.startswith("earlier/both:v1  ")
    tree = [line.strip() for line in run("list", "--tree").stdout.splitlines()]
    assert tree.count("from team/a:v1, team/b:v1") == 2


def test_an_ancestor_is_shown_once_however_many_paths_lead_to_it() -> None:
    generations = 40
    nodes = {}
    for number in range(generations):
        parents = tuple(Parent(f"{side}{number - 1}") for side in "ab") if number else ()
        for side in "ab":
            manifest = dataclasses.replace(AdapterManifest.salvage({"r": 2}), parents=parents)
            nodes[f"{side}{number}"] = lineage_graph.Node(f"{side}{number}", (f"t/{side}{number}:v1",), manifest)
    edges = tuple(lineage_graph.Edge(parent.digest, digest) for digest, node in nodes.items() for parent in node.parents)
    lines = list(view.tree(lineage_document(lineage_graph.Lineage("a39", nodes, edges))))
    assert len(lines) == 1 + len(edges) - 2
    assert sum("(see above)" in line for line in lines) == 74


def test_dot_is_a_graph_with_an_edge_for_each_source(run: Run, team: Path) -> None:
    text = run("lineage", "team/both", "--dot").stdout
    assert text.startswith("digraph lineage {")
    assert text.count("->") >= 3


@pytest.mark.peer
def test_graphviz_draws_that_graph(run: Run, team: Path) -> None:
    dot, text = need_program("dot"), run("lineage", "team/both", "--dot").stdout
    subprocess.run([dot, "-Tsvg"], input=text, text=True, check=True, capture_output=True)


# --- one adapter, many forms


def test_pull_as_converts_on_the_way_out_and_keeps_what_it_made(run: Run, team: Path) -> None:
    first = document(run, "pull", "team/a", "--to", "gguf")
    assert (first["output"], first["cached"], first["loss"]) == ("a.gguf", False, {"exact": 4})
    second = document(run, "pull", "team/a", "--to", "gguf", "-o", "again.gguf")
    assert second["cached"] is True
    assert (team / "a.gguf").read_bytes() == (team / "again.gguf").read_bytes()
    run("convert", "team/a", "plain.gguf", "--to", "gguf")
    assert (team / "a.gguf").read_bytes() == (team / "plain.gguf").read_bytes()


def test_a_kept_conversion_that_was_tampered_with_is_made_again(run: Run, team: Path) -> None:
    run("pull", "team/a", "--to", "gguf")
    (kept_file,) = (team / ".adapterhub/cache").glob("*/files/*.gguf")
    kept_file.chmod(0o600)
    kept_file.write_bytes(kept_file.read_bytes()[:-1] + b"x")
    again = document(run, "pull", "team/a", "--to", "gguf", "-o", "again.gguf")
    assert again["cached"] is False
    assert (team / "again.gguf").read_bytes() == (team / "a.gguf").read_bytes()


def test_a_folder_records_where_it_came_from(run: Run, team: Path) -> None:
    run("pull", "team/light", "--to", "peft", "-o", "back")
    manifest = AdapterManifest.read(team / "back")
    assert manifest is not None
    assert manifest.parents == (Parent(document(run, "show", "team/light")["digest"], method="convert"),)
    assert manifest.recipe is not None
    assert manifest.recipe.to == "peft"
    assert run("verify", "back").returncode == 0
    for name in (peft.CONFIG, peft.WEIGHTS):
        assert (team / "back" / name).read_bytes() == (team / "both" / name).read_bytes()


def test_pull_as_refuses_by_name_and_leaves_nothing(run: Run, team: Path) -> None:
    magnitudes = {f"model.layers.{n}.self_attn.q_proj.lora_magnitude_vector": (8,) for n in range(2)}
    adapter(team / "dora", {**pairs(2), **magnitudes}, use_dora=True)
    run("push", "dora", "team/dora", "--base", "base")
    result = run("pull", "team/dora", "--to", "gguf", code=6)
    assert "DoRA cannot be expressed in a GGUF adapter" in result.stderr
    assert not (team / "dora.gguf").exists()


def test_the_options_of_a_conversion_need_as(run: Run, team: Path) -> None:
    assert "--to: is required by --dtype" in run("pull", "team/a", "--dtype", "f16", code=2).stderr
    assert "--base: is for --to" in run("pull", "team/a", "--base", "base", code=2).stderr


def test_a_read_only_registry_converts_without_keeping(team: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    root = team

    def full(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    with Registry.open(root) as registry:
        monkeypatch.setattr(shutil, "copytree", full)
        form = conversion_cache.pull(registry, Ref.parse("team/a"), team / "a.gguf", adapter_recipe.Conversion("gguf"))
    assert convert.sniff(form.out) == "gguf"
    assert list(gguf.read(form.out).deltas)
    assert not list((root / ".adapterhub/cache").glob("*"))


def test_a_lineage_that_goes_round_ends(team: Path) -> None:
    """No honest digest is its own ancestor; a forged adapter.json must not hang the walk all the same."""
    root = team
    with Registry.open(root) as registry:
        a, b = (registry.resolve(Ref.parse(f"team/{name}")).digest for name in "ab")
        real = registry.adapter_manifest
        forged = {a: b, b: a}

        def lying(digest: str) -> AdapterManifest | None:
            manifest = real(digest)
            if manifest is None or digest not in forged:
                return manifest
            return dataclasses.replace(manifest, parents=(Parent(forged[digest]),))

        registry.adapter_manifest = lying  # type: ignore[method-assign]
        lineage = lineage_graph.trace(registry, Ref.parse("team/a"))
    assert {edge.parent for edge in lineage.edges} >= {a, b}


def test_using_a_deprecated_version_prints_a_warning(run: Run, team: Path) -> None:
    run("deprecate", "team/a", "use b")
    warned = "warning: team/a:v1 is deprecated: use b\n"
    assert run("pull", "team/a", "--to", "gguf", "-o", "a.gguf").stderr == warned
    assert document(run, "pull", "team/a", "--to", "gguf", "-o", "b.gguf")["deprecated"] == "use b"
    result = run("lineage", "team/both", "--json")
    assert result.stderr == warned
    deprecations = [node["deprecated"] for node in json.loads(result.stdout)["nodes"]]
    assert sorted(filter(None, deprecations), key=str) == [{"team/a:v1": "use b"}]
    assert "deprecated" not in run("lineage", "team/light", "--json").stderr.replace(warned, "")
    run("deprecate", "team/both:v1")
    assert run("rebuild", "team/both").stderr == "warning: team/both:v1 is deprecated\n"


def test_children_are_known_until_removed_and_after_an_index_rebuild(team: Path) -> None:
    with Registry.open(team) as registry:
        a = registry.resolve(Ref.parse("team/a")).digest
        assert [str(row.ref) for row in registry.children(a)] == ["team/both:v1", "team/elsewhere:v1"]
        registry.rebuild_index()
        assert [str(row.ref) for row in registry.children(a)] == ["team/both:v1", "team/elsewhere:v1"]
        registry.rm(Ref.parse("team/both"), force=True)
        assert [str(row.ref) for row in registry.children(a)] == ["team/elsewhere:v1"]
        assert [str(row.ref) for row in registry.children(f"sha256:{'0' * 64}")] == ["team/elsewhere:v1"]
