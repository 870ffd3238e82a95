"""Recipes of merged models: writing one from a prepared merge, finding one by name or file, and making the model again."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_converters.errors import AdapterhubError, NotFoundError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from . import base_sources, policy_checks, source_names, sources
from .merge_into import with_trained_prompt
from .workspace import StrPath, Workspace

if TYPE_CHECKING:
    from adapterhub.merging import Merge, Options
    from adapterhub.registry.adapter_recipe import RebuildDifference
    from adapterhub.registry.merge_recipe import Ingredient, MergeOutput, MergeRecipe


# ---- write


@dataclass(frozen=True)
class WrittenRecipe:
    """A recipe that was written: its file or its name in the registry, and its size in bytes."""

    out: str
    size: int
    recipe: MergeRecipe


def write_recipe(
    merge: Merge,
    options: Options,
    base: Path,
    out: str,
    workspace: Workspace,
    *,
    source: str,
    digests: bool = True,
    replace: bool = False,
) -> WrittenRecipe:
    """Write the recipe of a prepared merge to a .json file or under a name in the registry.

    Args:
        merge: The merge.
        options: Its options, with their lineage.
        base: The base model.
        out: A path that ends in `.json`, or a name of one word.
        workspace: The registry.
        source: The base, as the user named it.
        digests: Run the merge once, into a temporary folder, to record the digests of its files.
        replace: Replace the file.
    """
    from adapterhub.registry import merge_recipe, recipe_store
    from adapterhub_converters.containers import atomic, json_file

    name = _new_name(out)
    with ExitStack() as stack:
        if name:
            registry = stack.enter_context(workspace.open_registry(create=True))
            # Refuse before the merge runs: a name that is taken, or adapters that the registry doesn't have.
            recipe_store.check_free(registry, name)
            recipe_store.check_adapters(
                registry, [merge_recipe.Ingredient(**ingredient) for ingredient in options.lineage["adapters"]]
            )
        else:
            atomic.check_free(Path(out), folder=False, replace=replace)
        target = registry.root / name if name else Path(out)
        with atomic.scratch_folder(target) as temporary:
            model = _write_model(merge, temporary / "model", workspace) if digests else None
            recipe = merge_recipe.from_merge(base, merge.base.spec, source, options, model, single=merge.single)
        raw = recipe.dump()
        if name:
            recipe_store.store(registry, name, recipe)
        else:
            with atomic.pending_output(target, folder=False, replace=replace) as scratch:
                json_file.write_text(scratch, raw.decode())
    return WrittenRecipe(name or out, len(raw), recipe)


def _new_name(text: str) -> str | None:
    """Return `text` if it is a name for the registry, None if it names a file; raise UsageError if it is neither."""
    from adapterhub.store.named_documents import parse_document_name

    if text.endswith(".json"):
        return None
    try:
        return parse_document_name(text, text)
    except UsageError as error:
        hint = f"Write {text}.json, or one word for a name in the registry"
        raise UsageError(text, "is neither a .json file nor a name of one word", hint) from error


def _write_model(merge: Merge, out: Path, workspace: Workspace) -> MergeOutput:
    """Write a merged model to get the digests of its files."""
    from adapterhub.registry.merge_recipe import MergeOutput

    with workspace.bar("merging") as progress:
        merge.write(out, progress)
    return MergeOutput(out, merge.single, tuple(merge.report.touched))


# ---- find


def find_recipe(source: str, workspace: Workspace) -> tuple[MergeRecipe, str]:
    """Return the recipe in a file or under a name in the registry, and a name for the model.

    Raises:
        UsageError: `source` is both; `merge:NAME` is always the name.
        NotFoundError: It is neither.
    """
    from adapterhub.registry import merge_recipe, recipe_store
    from adapterhub.store.store_files import MAX_DOCUMENT
    from adapterhub_converters.containers import json_file

    path, name = Path(source), _recipe_name(source)
    if name and not path.exists():
        with workspace.open_registry() as registry:
            return recipe_store.get(registry, name).recipe, name
    if name and _is_recipe_name(name, workspace):
        hint = f"Write ./{source} for the file, {recipe_store.NAME_PREFIX}{name} for the name"
        raise UsageError(source, "both a file and a recipe in the registry", hint, code="ambiguous")
    return merge_recipe.parse(json_file.read_text(path, MAX_DOCUMENT), source), path.name.removesuffix(".json")


def _recipe_name(text: str) -> str | None:
    """Return the registry name that `text` may be; None if it can only be a file."""
    from adapterhub.registry import recipe_store
    from adapterhub.store import named_documents

    if text.endswith(".json"):
        return None
    try:
        return named_documents.parse_document_name(text.removeprefix(recipe_store.NAME_PREFIX), text)
    except UsageError:
        return None


def _is_recipe_name(name: str, workspace: Workspace) -> bool:
    from adapterhub.registry import recipe_store

    try:
        with workspace.open_registry() as registry:
            return name in recipe_store.names(registry)
    except AdapterhubError:
        return False


# ---- make again


@dataclass(frozen=True)
class RebuiltModel:
    """A merged model that was made from its recipe.

    Attributes:
        path: The folder or the GGUF file.
        recipe: The recipe.
        differences: Files that differ from the recipe; empty if all match or the recipe has no digests.
    """

    path: Path
    recipe: MergeRecipe
    differences: tuple[RebuildDifference, ...]

    @property
    def has_digests(self) -> bool:
        """Whether the recipe has digests to compare with."""
        return self.recipe.files is not None


def rebuild_model(
    source: str,
    out: StrPath | None,
    workspace: Workspace,
    *,
    base: StrPath | None = None,
    adapters: Sequence[StrPath] = (),
    replace: bool = False,
) -> RebuiltModel:
    """Make a merged model from its recipe, and compare it with the digests in the recipe.

    Adapters come from the registry, by digest, or from the addresses in the recipe.

    Args:
        source: The recipe, a file or a name in the registry.
        out: The folder or .gguf file to write; the name of the recipe if None.
        workspace: The registry, the policy, credentials.
        base: The base model, if it is not where the recipe says.
        adapters: Adapters of the recipe that are elsewhere.
        replace: Replace a model at `out`.

    Raises:
        RefusedError: The base is not that of the recipe; nothing was written.
        NotFoundError: An adapter or the base is missing.
    """
    from adapterhub.merging import prepare_merge, read_base
    from adapterhub.registry import merge_recipe
    from adapterhub_converters.containers import atomic
    from adapterhub_converters.formats import convert

    recipe, name = find_recipe(source, workspace)
    folder = _base(recipe, base, workspace)
    model = read_base(folder)
    merge_recipe.check_base(recipe, folder, model.spec)
    with ExitStack() as stack:
        adapters_of_recipe = list(_adapters(stack, recipe, adapters, workspace))
        tensors = [(convert.read(path, base=model.spec), weight) for path, weight in adapters_of_recipe]
        options = recipe.merge_options()
        if recipe.may_have_prompt:
            options, _ = with_trained_prompt(options, [path for path, _ in adapters_of_recipe], model.spec)
        merge = prepare_merge(tensors, model, options)
        target = Path(out or (f"{name}.gguf" if merge.single else name))
        sources.check_apart(target, folder)
        with atomic.pending_output(target, folder=not merge.single, replace=replace) as scratch:
            if recipe.files is None and not merge_recipe.check_weights(recipe, folder):
                workspace.tell("note: the recipe has no digests; only names, shapes and sizes of the base were compared")
            model_files = _write_model(merge, scratch, workspace)
            differences = merge_recipe.differences(recipe, model_files) if recipe.files is not None else []
            if differences:
                merge_recipe.check_weights(recipe, folder)  # raises if the base is another one; the model is then discarded
    return RebuiltModel(target, recipe, tuple(differences))


def _base(recipe: MergeRecipe, explicit_path: StrPath | None, workspace: Workspace) -> Path:
    if explicit_path:
        return base_sources.weights(explicit_path, workspace)
    from adapterhub.bases.hub_address import HubPath

    path = Path(recipe.base.source or recipe.base.name)
    if not path.exists() and recipe.base.repo and recipe.base.revision:
        hub_path = HubPath(recipe.base.repo, recipe.base.revision)
        path = base_sources.cached_model_path(hub_path, workspace) or path
    if not path.exists():
        problem = f"the recipe has its base at {path}, and nothing is there"
        raise NotFoundError(str(recipe.base), problem, "Name its path", code="recipe-base-elsewhere")
    return path


def _adapters(
    stack: ExitStack, recipe: MergeRecipe, explicit_adapters: Sequence[StrPath], workspace: Workspace
) -> Iterator[tuple[Path, float]]:
    """Yield the files of every adapter of the recipe, with verified digests, and their weights."""
    by_digest: dict[str, Path] = {}
    recipe_digests = {adapter.digest for adapter in recipe.adapters}
    for text in explicit_adapters:
        adapter_source = stack.enter_context(sources.open_source(text, workspace))
        digest = sources.parent(adapter_source).digest
        if digest not in recipe_digests:
            raise UsageError(str(text), f"is {digest}, which is not an adapter of the recipe", "Name another, or leave it out")
        by_digest[digest] = adapter_source.path
    # In the recipe's order: the sum of floats depends on it.
    for adapter in recipe.adapters:
        if adapter.digest not in by_digest:
            by_digest[adapter.digest] = stack.enter_context(_fetch_adapter(adapter, workspace))
        yield by_digest[adapter.digest], adapter.weight


@contextmanager
def _fetch_adapter(adapter: Ingredient, workspace: Workspace) -> Iterator[Path]:
    """Yield the path of an adapter from the registry, else from the address in the recipe."""
    from adapterhub.ref import Ref
    from adapterhub_converters.adapter_files import resolve_adapter

    with tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
        folder = Path(temporary) / "adapter"
        is_stored = False
        try:
            with workspace.open_registry() as registry:
                for row in registry.versions_with(adapter.digest)[:1]:
                    version = registry.resolve(Ref(row.name, digest=row.digest))
                    policy_checks.check_use(registry, version, adapter.ref or str(version.ref), workspace)
                is_stored = registry.pull_digest(adapter.digest, folder)
        except NotFoundError:  # no registry
            pass
        if not is_stored and adapter.ref and source_names.is_address(adapter.ref):
            with _from_address(adapter.ref, adapter.digest, workspace) as path:
                yield path
            return
        if not is_stored:
            subject = f"an adapter of the recipe, {adapter.digest}," if adapter.ref else "an adapter of the recipe"
            problem, hint = f"{subject} is not in the registry", "Push or pull it here first"
            raise NotFoundError(adapter.ref or adapter.digest, problem, hint, code="recipe-adapter-missing")
        with sources.relabel_errors(folder, adapter.ref or adapter.digest):
            yield resolve_adapter(folder)


@contextmanager
def _from_address(ref: str, digest: str, workspace: Workspace) -> Iterator[Path]:
    """Yield the path of the adapter at an address, if it still has that digest and the policy allows it."""
    # The recipe is a document of somebody else, so its owner must be trusted with the address.
    with sources.open_source(workspace.admitted_address(ref, Path("the recipe")), workspace) as adapter_source:
        if adapter_source.digest != digest:
            problem = f"is another adapter now: {adapter_source.digest or 'one without a digest'}, not {digest}"
            raise NotFoundError(ref, problem, "Name the right one", code="recipe-adapter-moved")
        yield adapter_source.path
