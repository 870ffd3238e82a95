"""Which worker of pytest-xdist runs which files: a plugin of pytest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from xdist.workermanage import WorkerController

# Files for the same worker, because what they share takes seconds to start: a process that has imported torch, llama.cpp's
# conversion of models, the host's models.
TOGETHER = {
    "learning": (
        "tests/attacks/test_chat_templates", "tests/attacks/test_code_in_a_base", "tests/attacks/test_hostile_tokenizers",
        "tests/cli/test_chat", "tests/cli/test_train_command", "tests/generation/", "tests/training/",
    ),
    "llama.cpp": (
        "tests/converters/test_architecture_lookup", "tests/converters/test_rule_named_models",
        "tests/merging/into_base/test_folder_by_rule", "tests/merging/into_base/test_folder_to_gguf",
        "tests/merging/into_base/test_write_gguf",
    ),
    "host": ("tests/serve/torch_engine/",),
}  # fmt: skip

# Files that take minutes and come late in the alphabet: begun last, they would leave the other workers without work.
LONG = (
    "tests/serve/", "tests/peers/test_schemathesis", "tests/peers/test_storm", "tests/peers/test_tutorials",
    "tests/peers/test_upstream", "tests/peers/test_vllm",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the long files."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give a worker whole files, so that what the tests of a file share is made once, and not once a worker.

    Not by `xdist_group`: pytest 9.2 ignores the node IDs by which xdist 3.8 groups tests.
    """
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return next((group for group, files in TOGETHER.items() if file.startswith(files)), file)

        def schedule(self) -> None:
            """Begin, or give a worker that takes the place of another what is left.

            A worker holds its last test back until it gets more or is told to end, which xdist 3.8 forgets for the latter.
            """
            super().schedule()
            for node in self.nodes if self.collection else ():
                self._reschedule(node)

        def _reschedule(self, node: WorkerController) -> None:
            """Give a worker more to do, unless it has not said yet which tests it has.

            Where two workers crash together, one that takes their place may be ready while the other still collects; xdist 3.8
            looks up the tests of both, and the whole run ended by a KeyError.
            """
            if node in self.registered_collections:
                super()._reschedule(node)

        def remove_node(self, node: WorkerController) -> str | None:
            """Leave to the other workers what a worker that ended had not run; return the test by which it crashed.

            xdist 3.8 gives them finished files too, for which no report ever comes, and waits for it: it hung. It also runs
            the test by which one worker crashed in another.
            """
            unfinished = {file: tests for file, tests in self.assigned_work.pop(node).items() if not all(tests.values())}
            if not unfinished:
                return None
            crashed = next(test for tests in unfinished.values() for test, is_done in tests.items() if not is_done)
            for file, tests in unfinished.items():
                unfinished_tests = {test: is_done for test, is_done in tests.items() if not is_done and test != crashed}
                if unfinished_tests:
                    self.workqueue[file] = unfinished_tests
            for other_node in self.assigned_work:
                self._reschedule(other_node)
            return crashed

    return Together(config, log)
