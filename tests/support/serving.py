"""A base that speaks, adapters of it, what each answers by peft, and `adapterhub serve` as a process."""

from __future__ import annotations

import functools
import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from adapterhub.operations.local_registry import Registry
from tests.conftest import ROOT
from tests.support.byte_tokenizer import SPECIAL, write_tokenizer

COUNT = 12  # tokens of an answer
BIAS = {"0": -100, "1": -100, "2": -100}  # no special tokens, one of which would end an answer


@dataclass(frozen=True)
class Models:
    """A tiny Llama in float32 with a tokenizer of letters, as a folder and as GGUF, and adapters of it.

    Its tokens are characters, so that an answer's text is its tokens.
    """

    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def gguf(self) -> Path:
        return self.folder / "base.gguf"

    def adapter(self, number: int) -> Path:
        return self.folder / f"a{number}"

    @functools.cache  # noqa: B019
    def answer(self, prompt: str, number: int | None = None, count: int = COUNT, *, ends: bool = False) -> str:
        """What transformers answers with the weights of an adapter merged in, or with the base: the likeliest tokens.

        Args:
            ends: Let the answer end where it ends; else it has no special tokens (see BIAS).
        """
        import torch

        ids = torch.tensor([self.tokens(prompt)])
        suppressing = {} if ends else {"suppress_tokens": [0, 1, 2]}
        sequences = self._model(number).generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0, **suppressing)
        text: str = self._tokenizer().decode(sequences[0, ids.shape[1] :].tolist())
        return text

    def embedding(self, text: str, number: int | None = None) -> list[float]:
        """The mean of what transformers has for the tokens of a text before the last layer, of length 1."""
        import torch

        with torch.no_grad():
            hidden_state = self._model(number).base_model(torch.tensor([self.tokens(text)])).last_hidden_state[0].mean(0)
        numbers: list[float] = (hidden_state / hidden_state.norm()).tolist()
        return numbers

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text."""
        ids: list[int] = self._tokenizer().encode(text).ids
        return ids

    @functools.cache  # noqa: B019
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.base / "tokenizer.json"))

    @functools.cache  # noqa: B019
    def _model(self, number: int | None) -> Any:
        import peft
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(self.base)
        if number is not None:
            model = peft.PeftModel.from_pretrained(model, self.adapter(number)).merge_and_unload()
        return model.eval()


def make_models(folder: Path, *, adapters: int = 4, hidden: int = 64, head: int = 16) -> Models:
    """Make a base and so many adapters."""
    import peft
    import torch
    import transformers

    import adapterhub as ah

    models = Models(folder)
    letters = [*map(chr, range(33, 127)), "Ġ", "Ċ"]
    vocabulary = [*SPECIAL, *letters, "th"]
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=hidden, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=head, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, initializer_range=0.15,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).float().save_pretrained(models.base)
    write_tokenizer(models.base, vocabulary, [("t", "h")])
    for number in range(adapters):
        torch.manual_seed(10 + number)
        base = transformers.AutoModelForCausalLM.from_pretrained(models.base)
        peft_model = peft.get_peft_model(
            base, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        )
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        peft_model.save_pretrained(str(models.adapter(number)))
    ah.convert_model(models.base, models.gguf, to="gguf")
    return models


def registry(folder: Path, models: Models, count: int = 4) -> Registry:
    """A registry with the adapters as `team/a0:prod` and so on."""
    opened = Registry(folder)
    for number in range(count):
        opened.push(models.adapter(number), f"team/a{number}:prod")
    return opened


# ---- the gateway


@dataclass(frozen=True)
class Reply:
    """An answer of HTTP."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def document(self) -> Any:
        return json.loads(self.body)

    @property
    def version(self) -> str:
        return self.headers.get("x-adapterhub-version", "")

    @property
    def text(self) -> str:
        assert self.status == 200, self.body
        choice_text: str = self.document["choices"][0]["text"]
        return choice_text


@dataclass
class Gateway:
    """A running `adapterhub serve`; `started` is what it printed when it was ready."""

    url: str
    process: subprocess.Popen[str]
    log: Path
    headers: dict[str, str] = field(default_factory=dict)
    started: Mapping[str, Any] = field(default_factory=dict)

    def request(self, method: str, path: str, body: bytes | None = None, /, **headers: str) -> Reply:
        parts = urlsplit(self.url)
        connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=600)
        try:
            request_headers = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, {**self.headers, **request_headers})
            answer = connection.getresponse()
            values = {name.lower(): value for name, value in answer.getheaders()}
            return Reply(answer.status, values, answer.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Reply:
        return self.request("GET", path, **headers)

    def post(self, path: str, document: object, **headers: str) -> Reply:
        return self.request("POST", path, json.dumps(document).encode(), content_type="application/json", **headers)

    def complete(
        self,
        model: str,
        prompt: str | list[str],
        *,
        count: int = COUNT,
        headers: Mapping[str, str] | None = None,
        **fields: Any,
    ) -> Reply:
        """The likeliest tokens after a prompt."""
        request = {"model": model, "prompt": prompt, "max_tokens": count, "temperature": 0, "logit_bias": BIAS, **fields}
        return self.post("/v1/completions", request, **(headers or {}))

    def memory(self) -> int:
        """The bytes that its process has in memory, without the engine's."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def children(self) -> list[int]:
        """The processes that it has started."""
        text = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in text.split()]

    def reload(self) -> None:
        self.process.send_signal(signal.SIGHUP)


@contextmanager
def gateway(
    base: Path, registry: Path, folder: Path, *options: object, env: Mapping[str, str] | None = None
) -> Iterator[Gateway]:
    """Run `adapterhub serve` until the block ends.

    Args:
        folder: For its log and caches.
        options: More of the command's.
        env: More variables.
    """
    folder.mkdir(exist_ok=True)
    words = [
        sys.executable,
        "-m",
        "adapterhub",
        "serve",
        "--base",
        base,
        "--registry",
        registry,
        "--json",
        "--port",
        0,
        *options,
    ]
    environ = {key: value for key, value in os.environ.items() if not key.startswith("ADAPTERHUB_")}
    environ |= {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "converters", ROOT / "schemas")))}
    environ |= {
        "XDG_CACHE_HOME": str(folder / "cache"),
        "XDG_CONFIG_HOME": str(folder / "config"),
        "OMP_NUM_THREADS": "1",
        **(env or {}),
    }
    log = folder / "gateway.log"
    with open(log, "wb") as errors:
        process = subprocess.Popen(
            [str(word) for word in words], cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=errors, text=True
        )
    try:
        assert process.stdout is not None
        text = ""
        while not text.endswith("}\n"):
            line = process.stdout.readline()
            assert line, log.read_text()[-4000:]
            text += line
        document = json.loads(text)
        yield Gateway(document["url"], process, log, started=document)
    finally:
        process.terminate()
        process.wait(60)
        if process.stdout is not None:
            process.stdout.close()
