"""The base of a server that somebody else has started: is it the one that adapters are checked against?

Any base of the same shapes answers without an error. What the server says of its base is compared at the start and whenever it
may have been restarted, and so are its probabilities for a fixed prompt: the same weights give the same ones, up to rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from adapterhub_converters.errors import AdapterhubError, RefusedError

from . import COMPLETIONS, EngineDownError
from .engine_client import Client, Connection
from .server_engine import models_of

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

log = logging.getLogger("adapterhub.serve.engine")
PROBE = "Once upon a time, there was a"
MOST_PROBABLE = 5  # tokens whose probabilities are compared
_BASE_HINT = "Name the base that it has, or start it with this one"
_MIN_COMMON = 3  # of these, among the most probable ones of both
# Nats: bfloat16 rounds a logit of 20 by up to 0.06, in another batch otherwise; fine-tuning moves some by more than one.
_MAX_DIFFERENCE = 0.25


class AttachedBase:
    """The base of a server with vLLM's API, by the name that it lists.

    Args:
        spec: The base that adapters are checked against.
        kind: What the server should be, for errors: "a vLLM server".
        is_attached: Whether somebody else has started the server; the base of our own is the right one.

    Attributes:
        name: The server's name for its base, once `read` has been called.
    """

    def __init__(self, client: Client, spec: BaseSpec, kind: str, *, is_attached: bool) -> None:
        self._client, self._kind, self.name, self._probe_name = client, kind, "", ""
        self._checks = BaseChecks(client, spec)
        if is_attached:
            client.greet = self._greet

    @property
    def probabilities(self) -> Mapping[str, float]:
        """The logarithms of the probabilities that the server had first for a fixed prompt; empty if they are not known."""
        return self._checks.probabilities

    async def read(self) -> int:
        """Ask for the name of the base; return the tokens of a conversation, 0 if the server does not say."""
        return await self._read(self._client)

    def probe_by(self, name: str) -> None:
        """Ask for probabilities of the base by another name, for a server that mixes adapters into answers of the base."""
        self._probe_name = name
        self._checks.forget_probabilities()

    async def _read(self, client: Client | Connection) -> int:
        bases = [model for model in await models_of(client) if not model.get("parent")]
        if not bases:
            self._checks.refuse("does not list its models", f"Name {self._kind}")
        self.name, self._root = str(bases[0]["id"]), str(bases[0].get("root") or "")
        return int(bases[0].get("max_model_len") or 0)

    async def _greet(self, connection: Connection) -> None:
        """Compare the base of the process at the end of a connection."""
        await self._read(connection)
        self._checks.compare(self._root or self.name)
        if not self._client.is_connected:
            self._checks.compare_probabilities(await self._probabilities(connection))

    async def _probabilities(self, connection: Connection) -> Mapping[str, float]:
        """Return the logarithms of the probabilities of the most probable next tokens; none for a server of embeddings."""
        probe = {
            "model": self._probe_name or self.name,
            "prompt": PROBE,
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": MOST_PROBABLE,
        }
        status, document = await connection.call("POST", COMPLETIONS, probe)
        try:
            return dict(document["choices"][0]["logprobs"]["top_logprobs"][0]) if status == 200 else {}
        except (KeyError, IndexError, TypeError, ValueError):
            return {}


class BaseChecks:
    """Comparisons of a server's base with the one that adapters are checked against, and with itself after a restart.

    Attributes:
        probabilities: The logarithms of the probabilities that the server had first; empty if they are not known.
    """

    def __init__(self, client: Client, spec: BaseSpec) -> None:
        self._url, self._spec = client.url, spec
        self.probabilities: Mapping[str, float] = {}
        self._compared = ""  # the name that was compared last
        self._was_right = False

    def compare(self, location: str) -> None:
        """Compare the base by its path or its name on the Hub.

        Raises:
            RefusedError: It is another base.
            EngineDownError: It is another base than before, after a restart.
        """
        if location == self._compared:
            return
        if problem := self._problem_of(location):
            self.refuse(problem, code="engine-base")
        self._compared, self._was_right = location, True

    def compare_sizes(self, sizes: Mapping[str, Any]) -> None:
        """Compare the sizes that llama-server tells of its base: `n_vocab`, `n_embd`."""
        table = self._spec.tensor("model.embed_tokens.weight")
        expected = dict(zip(("n_vocab", "n_embd"), table.shape, strict=True)) if table is not None else {}
        for name, value in expected.items():
            if name in sizes and sizes[name] != value:
                problem = f"has a base with {name} = {sizes[name]}, and that of {self._spec.source} is {value}"
                self.refuse(problem, code="engine-base")

    def compare_probabilities(self, probabilities: Mapping[str, float]) -> None:
        """Compare the probabilities with those at the first start; EngineDownError if they are of other weights."""
        if not self.probabilities:
            self.probabilities = probabilities
        if probabilities and not are_alike(probabilities, self.probabilities):
            raise EngineDownError(f"{self._url} answers with other weights than before; restart the gateway if it should")

    def forget_probabilities(self) -> None:
        """Take the next probabilities as those to compare with."""
        self.probabilities = {}

    def refuse(self, problem: str, hint: str = _BASE_HINT, code: str = "") -> NoReturn:
        """Raise the error for another server: a refusal at the start, and after a restart an engine that cannot answer."""
        if self._was_right:
            raise EngineDownError(f"{self._url} {problem}")
        raise RefusedError(self._url, problem, hint, code=code)

    def _problem_of(self, location: str) -> str:
        """Return why a path or a name on the Hub is of another base; empty if it is not known to be one."""
        ours = str(self._spec.folder or self._spec.source)
        path, own_path = Path(location), Path(ours)
        if path.exists() and own_path.exists():
            return "" if path.samefile(own_path) or self._is_copy(path) else f"has the base {location}, and this one is {ours}"
        if self._spec.repo and not path.is_absolute() and "/" in location:
            is_same = location.lower() == self._spec.repo.lower()
            return "" if is_same else f"has the base {location}, and this one is {self._spec.repo}"
        log.warning("%s has the base %s, which cannot be compared with %s from here", self._url, location, ours)
        return ""

    def _is_copy(self, path: Path) -> bool:
        """Return whether a base has the headers, the tokenizer and the template of ours."""
        from adapterhub_converters.bases import read_base

        try:
            copy, spec = read_base(path), self._spec
        except AdapterhubError:
            return False
        return all(
            getattr(copy, name) == getattr(spec, name)
            for name in ("architecture", "config", "tensors", "tied", "tokenizer_digest", "chat_template_digest")
        )


def are_alike(probabilities: Mapping[str, float], reference: Mapping[str, float]) -> bool:
    """Return whether the most probable tokens are those of the same weights, up to rounding."""
    common = probabilities.keys() & reference.keys()
    if len(common) < min(_MIN_COMMON, len(probabilities), len(reference)):
        return False
    return all(abs(probabilities[token] - reference[token]) < _MAX_DIFFERENCE for token in common)
