"""The real conversion scripts of llama.cpp, from the source distribution of `llama-cpp-python` on PyPI.

    python -m tests.support.llama_cpp_scripts        # downloads them once: 77 MB, nothing is compiled

They need torch and transformers, and a newer gguf package than PyPI has, which comes with them: whatever runs them is a
process of its own.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

CACHE = Path.home() / ".cache" / "adapterhub-benchmarks"
_WANTED = ("vendor/llama.cpp/convert", "vendor/llama.cpp/conversion/", "vendor/llama.cpp/gguf-py/")


def scripts_folder() -> Path | None:
    """The folder with the scripts; None when they were never downloaded."""
    return max(CACHE.glob("llama_cpp_python-*/vendor/llama.cpp"), default=None)


def downloaded() -> Path:
    """The folder with the scripts, from PyPI if need be."""
    if folder := scripts_folder():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    name = "llama-cpp-python"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", name, name, "--dest", str(CACHE)]
    subprocess.run(pip, check=True)
    archive = max(CACHE.glob("llama_cpp_python-*.tar.gz"))
    with tarfile.open(archive) as tar:
        members = [member for member in tar if member.name.partition("/")[2].startswith(_WANTED)]
        tar.extractall(CACHE, members=members, filter="data")
    return max(CACHE.glob("llama_cpp_python-*/vendor/llama.cpp"))


# Converts one model folder for each line "source\ttarget\tflags" it reads and answers with a line. Unless "vocabulary" is
# among the flags, it is left out, as convert_lora_to_gguf.py leaves it out: most of these models have no tokenizer, and
# llama.cpp runs token ids without one. A flag such as MOSTLY_BF16 is the type to write.
_CHILD = """
import logging, os, sys
from pathlib import Path
import torch
import gguf
from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
logging.disable(logging.WARNING)
answers = os.fdopen(os.dup(1), "w")
sys.stdout = sys.stderr
for line in sys.stdin:
    source, target, *flags = line.rstrip("\\n").split("\\t")
    try:
        with torch.inference_mode():
            known = get_model_class(get_model_architecture(ModelBase.load_hparams(Path(source), False), ModelType.TEXT))
            known = getattr(known, "Ministral3Model", known)  # what Mistral3Model delegates to
            known.no_mtp = True  # tiny models have no layers for the prediction of several tokens
            class WithoutVocabulary(known):
                model_arch = known.model_arch
                def set_vocab(self):
                    self.gguf_writer.add_tokenizer_model("none")
            kind = next((flag for flag in flags if flag.isupper() and hasattr(gguf.LlamaFileType, flag)), "ALL_F32")
            whole = "vocabulary" in flags
            others = dict.fromkeys([flag for flag in flags if flag not in (kind, "vocabulary")], True)
            cls = known if whole else WithoutVocabulary
            made = cls(Path(source), gguf.LlamaFileType[kind], Path(target), **others)
            if not whole and f"{made.gguf_writer.arch}.vocab_size" not in made.gguf_writer.kv_data[0]:
                made.gguf_writer.add_vocab_size(made.hparams["vocab_size"])
            made.write()
        print("done", file=answers, flush=True)
    except Exception as error:
        print(f"{type(error).__name__}: {error}".replace("\\n", " "), file=answers, flush=True)
"""


# Runs `convert_lora_to_gguf.py` with the words of each line, and answers with a line.
_LORA_CHILD = """
import os, runpy, sys
answers = os.fdopen(os.dup(1), "w")
sys.stdout = sys.stderr
for line in sys.stdin:
    sys.argv = line.rstrip("\\n").split("\\t")
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        print("done", file=answers, flush=True)
    except (Exception, SystemExit) as error:
        print(f"{type(error).__name__}: {error}".replace("\\n", " "), file=answers, flush=True)
"""


class _Script:
    """A process of llama.cpp's scripts, which answers each line of words with a line."""

    def __init__(self, scripts: Path, code: str) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={"PYTHONPATH": f"{scripts}:{scripts / 'gguf-py'}", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        )

    def answer(self, *words: object) -> str:
        """Return what the process says to a line of words: `done`, or an error."""
        assert self._child.stdin
        assert self._child.stdout
        print(*words, sep="\t", file=self._child.stdin, flush=True)
        return self._child.stdout.readline().strip() or "it died"

    def close(self) -> None:
        """End the process."""
        self._child.communicate()


class Converter(_Script):
    """A running `convert_hf_to_gguf.py` that turns model folders into GGUF files, in float32 and without a vocabulary unless
    it is told otherwise."""

    def __init__(self, scripts: Path) -> None:
        super().__init__(scripts, _CHILD)

    def __call__(self, source: Path, target: Path, *flags: str) -> Path:
        """`target`, written from the Hugging Face folder `source`; `flags` such as `fuse_qkv`,
        `vocabulary` and `MOSTLY_Q8_0`."""
        answer = self.answer(source, target, *flags)
        if answer != "done":
            raise RuntimeError(f"llama.cpp did not convert {source}: {answer}")
        return target


class LoraConverter(_Script):
    """A running `convert_lora_to_gguf.py`, which turns PEFT adapters into GGUF files in float32."""

    def __init__(self, scripts: Path) -> None:
        super().__init__(scripts, _LORA_CHILD)
        self._script = scripts / "convert_lora_to_gguf.py"

    def __call__(self, adapter: Path, base: Path, target: Path) -> str:
        """Write `target`, and return the error that the script raises, empty for none."""
        answer = self.answer(self._script, adapter, "--base", base, "--outfile", target, "--outtype", "f32")
        return "" if answer == "done" else answer


if __name__ == "__main__":
    print(downloaded())
