"""Random contents of every file that fastgpt reads, and random command lines.

A command must either do what it is for or end with a :class:`RequestError` of one line. Files are those of a small run
and its dataset, edited entry by entry and byte by byte. So that the readers' deeper checks are reached, checksums are
made to agree with an edit that is ``sealed``, as somebody would who edits a file. :mod:`corruption` looks at what a
disk does to files instead, and whether any of it goes unnoticed.
"""

import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import torch
from hypothesis import strategies as st

from bench.robustness.child import FLAGS, finish, prepare
from fastgpt import json_files, plan, sample
from fastgpt.data import __main__ as data
from fastgpt.data.dataset import open_dataset
from fastgpt.data.loader import BatchLoader
from fastgpt.data.verify import ShardVerifier
from fastgpt.errors import RequestError
from fastgpt.files import file_sha256
from fastgpt.train import __main__ as train
from fastgpt.train import checkpoint
from fastgpt.train.config import TrainConfig

COMMANDS = {"train": train.main, "sample": sample.main, "data": data.main, "plan": plan.main}

# ---- what an example is made of: its repr is Python ----


@dataclass(frozen=True)
class Entry:
    """A change of an entry of JSON: which one, counted as they come, and what becomes of it.

    Attributes:
        at: number of the entry; of a file of lines, of an entry of any of them.
        how: ``set``, ``remove``, ``rename`` or ``add``.
        value: the new value, or the new name.
    """

    at: int
    how: str
    value: Any = None


@dataclass(frozen=True)
class Bytes:
    """A change of bytes: ``data`` put over those at ``at``, or between them, or everything from there on cut off."""

    at: int
    how: str
    data: bytes = b""


@dataclass(frozen=True)
class Damage:
    """A file of a run or a dataset that is changed.

    Attributes:
        file: its path; ``BARE`` is for a dataset of bare token files.
        edits: of its content, one after the other; or what it is replaced with, one of ``REPLACED``.
        sealed: whether the checksums are made to agree.
    """

    file: str
    edits: tuple[Entry | Bytes, ...] | str
    sealed: bool = True


@dataclass(frozen=True)
class Text:
    """A text that a dataset is made of."""

    content: bytes
    tokenizer: str
    val_fraction: str = "0.1"


@dataclass(frozen=True)
class Line:
    """A command line; ``{folder}`` stands for the folder of the base run."""

    command: str
    arguments: tuple[str, ...]


RUN, STEP, DATASET, BARE = "run", "run/checkpoints/step-0000020", "d", "bare"
RUN_FILES = (
    f"{RUN}/config.json", f"{RUN}/metrics.jsonl", f"{STEP}/state.json", f"{STEP}/manifest.json",
    f"{STEP}/model.safetensors", f"{STEP}/optimizer.safetensors",
)  # fmt: skip
DATA_FILES = (f"{DATASET}/meta.json", f"{DATASET}/train_000000.bin", f"{DATASET}/val_000000.bin")
BARE_FILES = (f"{BARE}/train.bin", f"{BARE}/val.bin")

# ---- drawing them ----

NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2, 3, 16, 20, 255, 256, 65535, 65536, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, -(2**63)]),
    st.sampled_from([0.0, -0.0, 0.5, 1e-320, 1e308, -1e308, math.nan, math.inf, -math.inf]),
    st.sampled_from([10**30, 10**400]),
    st.integers(-5, 100),
)
WORDS = st.sampled_from(
    ["", "char", "byte", "gpt2", "auto", "float32", "stdlib", "d", "train", "F32", "BF16", "I64", "U8", "BOOL",
     "F8_E4M3", "F4", "C64", "../x", "/", "train_000000.bin", "x" * 300, "\ud800", "\0", "é\n", "ab", "aa",
     "train_loss", "eval"]
)  # fmt: skip
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=2)),
    max_leaves=4,
)
ENTRIES = st.one_of(
    st.builds(Entry, st.integers(0, 200), st.just("set"), VALUES),
    st.builds(Entry, st.integers(0, 200), st.sampled_from(["remove"])),
    st.builds(Entry, st.integers(0, 200), st.sampled_from(["rename", "add"]), WORDS),
)
PACKED = st.one_of(
    st.sampled_from([0, 1, 2, 20240520, 20240801, 2**31 - 1, -1, -(2**31)]).map(lambda n: struct.pack("<i", n)),
    st.sampled_from([0, 1, 100, 2**40, 2**63, 2**64 - 1]).map(lambda n: struct.pack("<Q", n)),
    st.sampled_from([b"\xff\xff", b"\0" * 64, b"[" * 2000, b"{", b'"', b"\n", b"NaN", b"1e999", b"\xef\xbb\xbf"]),
    st.binary(max_size=16),
)
PLACES = st.one_of(st.sampled_from([0, 4, 8, 12, 1024, 1025]), st.integers(0, 30_000))
BYTES = st.builds(Bytes, PLACES, st.sampled_from(["over", "over", "between", "cut"]), PACKED)
REPLACED = ("missing", "empty", "folder", "link to itself", "random")


def edits_of(file: str) -> st.SearchStrategy[Any]:
    """Edits that suit the kind of a file."""
    kinds = [BYTES] if file.endswith(".bin") else [ENTRIES, ENTRIES, BYTES]
    return st.one_of(
        st.lists(st.one_of(kinds), min_size=1, max_size=3).map(tuple),
        st.lists(st.one_of(kinds), min_size=1, max_size=3).map(tuple),
        st.sampled_from(REPLACED),
    )


FILES = st.sampled_from([*RUN_FILES, *DATA_FILES, *BARE_FILES])
DAMAGES = FILES.flatmap(
    lambda file: st.builds(Damage, st.just(file), edits_of(file), st.sampled_from([True, True, False]))
)

TEXTS = st.builds(
    Text,
    st.one_of(
        st.binary(max_size=200),
        st.text(max_size=200).map(lambda text: text.encode(errors="surrogatepass")),
        st.text(min_size=30, max_size=200).map(lambda text: text.encode(errors="replace")),
        st.text("ab\r\n \t", max_size=100).map(str.encode),
    ),
    st.sampled_from(["char", "byte", "gpt2"]),
    st.sampled_from(["0.1", "0.5", "0.999"]),
)

# Values of flags that say nothing of how long the command will take.
NO_NUMBERS = ["", "x", "nan", "-inf", "1e400", "1.5", "True", "-1", "0x10", " 2", "1_0", "٣", "²", "None", "\udcff"]
HUGE = ["9" * 19, "9" * 40, "9" * 5000, "-" + "9" * 40]
FLOATS = ["0", "1", "0.1", "-0.0", "1e308", "1e-320", "1e-45", "inf"]
NAMES = [
    "",
    ".",
    "..",
    "/",
    "x" * 300,
    "x/" * 3000,
    "a/b",
    "~",
    "*",
    "[",
    "é",
    "\udcff",
    "a b",
    "-",
    "--x",
    "auto",
    "d",
]

# Flags whose large values ask for much work or memory, which is no fault.
WORK = {
    "max_iters", "eval_iters", "n_layer", "n_embd", "block_size", "batch_size", "gradient_accumulation_steps",
    "total_batch_size", "max_new_tokens", "num_samples",
}  # fmt: skip
LEFT_OUT = {"compile", "wandb", "tensorboard", "max_hours"}  # other programs, and minutes


def values_of(name: str, kind: Any) -> st.SearchStrategy[str]:
    """Values of a flag, as they are typed."""
    if name == "dataset":
        return st.sampled_from([*NAMES, "stdlibx", "{folder}/bare/train.bin", "{folder}/text.txt", "{folder}/d"])
    if name in ("out_dir", "data_dir"):
        return st.sampled_from([f"{{folder}}/{text}" for text in NAMES])
    if name == "preset":
        return st.sampled_from([*NAMES, "quickstart", "gpt2-124"])
    if get_origin(kind) is None and kind is str:
        return st.sampled_from([*NAMES, "cpu", "cuda", "cuda:9", "cpu:3", "mps", "float16", "10M", "1e400", "12GB"])
    small = st.sampled_from([*NO_NUMBERS, "0", "1", "2", "3", "4"])
    if name in WORK:
        return small
    return st.one_of(small, st.sampled_from(HUGE), st.sampled_from([*FLOATS, "9" * 400] if kind is float else FLOATS))


def flag(name: str, kind: Any) -> st.SearchStrategy[str]:
    """A flag with a value."""
    return values_of(name, kind).map(lambda value: f"--{name}={value}")


HINTS = {name: kind for name, kind in get_type_hints(TrainConfig).items() if name not in LEFT_OUT}
TRAIN_FLAGS = st.one_of([flag(name, kind) for name, kind in HINTS.items()])
PLAN_FLAGS = st.one_of(
    st.sampled_from(["rtx-4070", "4070", "h100", "", "x", "gpu", "é"]).map(lambda gpu: f"--gpu={gpu}"),
    st.sampled_from(["8GB", "0", "-1", "1e3", "9" * 400, "x", "0.0001"]).map(lambda vram: f"--vram={vram}"),
    st.sampled_from(["10B", "0", "1e400", "inf", "nan", "-1", "x", "BBB", "1K", "9" * 400]).map(
        lambda n: f"--tokens={n}"
    ),
    st.sampled_from(["--json", "--points"]),
    TRAIN_FLAGS,
)
SAMPLE_FLAGS = st.one_of(
    st.sampled_from(["", "1", "é", "\n", "\udcff", "x" * 5000]).map(lambda prompt: f"--prompt={prompt}"),
    *(flag(name, kind) for name, kind in [
        ("max_new_tokens", int), ("num_samples", int), ("temperature", float), ("top_k", int), ("seed", int),
        ("device", str),
    ]),
)  # fmt: skip
DATA_FLAGS = st.one_of(
    st.sampled_from(["char", "byte", "gpt2", "", "x"]).map(lambda name: f"--tokenizer={name}"),
    st.sampled_from(NAMES).map(lambda name: f"--name={name}"),
    flag("val_fraction", float), flag("shards", int),
)  # fmt: skip
ODD = st.one_of(
    st.sampled_from(
        ["--", "-", "", "--x", "-h", "--version", "--no", "--n-layer=1", "--n_layer", "=", "--=", "1", "-1"]
    ),
    st.text(max_size=10).map(lambda text: text.replace("\0", "")),
)
SOURCES = st.sampled_from([["text", "{folder}/text.txt"], ["text"], ["text", "{folder}/none"], ["text", "{folder}"],
                           ["stdlib", "x"], ["fineweb10b", "x"], ["x" * 5000], ["é"], []])  # fmt: skip

# In front of the drawn flags, which override them.
SMALL = (*FLAGS, "--dataset=d", "--data_dir={folder}", "--out_dir={folder}/new", "--max_iters=1", "--eval_iters=1")
STARTS = {
    "train": st.just(SMALL),
    "plan": st.just(("--gpu=rtx-4070", *SMALL)),
    "sample": st.just(("{folder}/run", "--max_new_tokens=3")),
    "data": SOURCES.map(lambda source: ("prepare", *source, "--data_dir={folder}/made")),
}
FLAGS_OF = {"train": TRAIN_FLAGS, "plan": PLAN_FLAGS, "sample": SAMPLE_FLAGS, "data": DATA_FLAGS}


@st.composite
def lines(of: Any) -> Line:
    """A command line."""
    name = of(st.sampled_from(list(STARTS)))
    drawn = of(st.lists(FLAGS_OF[name], min_size=1, max_size=4))
    return Line(name, (*of(STARTS[name]), *drawn, *of(st.lists(ODD, max_size=1))))


def examples() -> st.SearchStrategy[Any]:
    """All of them."""
    return st.one_of(DAMAGES, DAMAGES, TEXTS, lines(), lines())


# ---- making them ----


def places(content: Any) -> list[tuple[Any, Any]]:
    """Every entry of JSON as its container and its key."""
    found = []
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        found += [(content, key), *places(value)]
    return found


def with_entry(content: Any, edit: Entry) -> None:
    """Change ``content`` in place."""
    found = places(content)
    if not found:
        return
    container, key = found[edit.at % len(found)]
    if edit.how == "set":
        container[key] = edit.value
    elif edit.how == "remove":
        del container[key]
    elif isinstance(container, dict):
        container[edit.value] = container[key]
        if edit.how == "rename" and edit.value != key:
            del container[key]
    else:
        container.append(edit.value)


def with_bytes(content: bytes, edit: Bytes) -> bytes:
    """A changed copy."""
    at = edit.at % (len(content) + 1)
    rest = {"over": content[at + len(edit.data) :], "between": content[at:], "cut": b""}[edit.how]
    return content[:at] + (b"" if edit.how == "cut" else edit.data) + rest


def edited(content: bytes, edit: Entry | Bytes, suffix: str) -> bytes:
    """A changed copy of a file's content; of one that an edit has made unreadable before, only bytes can be changed."""
    if isinstance(edit, Bytes):
        return with_bytes(content, edit)
    try:
        if suffix == ".safetensors":
            (length,) = struct.unpack("<Q", content[:8])
            head = json.loads(content[8 : 8 + length])
            with_entry(head, edit)
            text = json.dumps(head).encode()
            return struct.pack("<Q", len(text)) + text + content[8 + length :]
        if suffix == ".jsonl":
            lines = [json.loads(line) for line in content.splitlines()]
            with_entry(lines, edit)
            return b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        table = json.loads(content)
        with_entry(table, edit)
        return json.dumps(table, indent=1).encode()
    except (ValueError, struct.error, RecursionError):
        return content


def apply(damage: Damage, folder: Path) -> None:
    """Change the file below ``folder``."""
    path = folder / damage.file
    content = path.read_bytes()
    if isinstance(damage.edits, str):
        path.unlink()
        if damage.edits == "folder":
            path.mkdir()
        elif damage.edits == "link to itself":
            path.symlink_to(path)
        elif damage.edits != "missing":
            path.write_bytes(b"" if damage.edits == "empty" else hashlib.sha512(content).digest() * 100)
        return
    for edit in damage.edits:
        content = edited(content, edit, path.suffix)
    path.write_bytes(content)
    if damage.sealed:
        seal(path)


def seal(path: Path) -> None:
    """Make the checksums agree with a changed file."""
    if path.suffix == ".json":
        with contextlib.suppress(ValueError, RecursionError, AttributeError):
            table = json.loads(path.read_bytes())
            table.pop(json_files.CHECKSUM, None)
            path.write_text(json.dumps(table, indent=1))
    for name, place in ((checkpoint.MANIFEST, ("sha256",)), ("meta.json", ("train", "val"))):
        holder = path.with_name(name)
        if holder != path and holder.is_file():
            table = json.loads(holder.read_bytes())
            table.pop(json_files.CHECKSUM)
            if name == checkpoint.MANIFEST:
                table["sha256"][path.name] = file_sha256(path)
            for shard in itertools.chain(*(table[split] for split in place if name != checkpoint.MANIFEST)):
                if shard["file"] == path.name:
                    shard |= {"sha256": file_sha256(path), "tokens": max(0, (path.stat().st_size - 1024) // 2)}
            holder.write_text(json.dumps(table))


# ---- what becomes of them ----


class Fault(AssertionError):
    """A command that neither did its work nor said in one line why not."""


def command(name: str, *arguments: str) -> None:
    """Run a command in this process.

    Raises:
        Fault: it ended otherwise than it may.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = COMMANDS[name](arguments)
    except RequestError as error:
        typed = any("\n" in text for text in arguments)  # which is shown as typed, and escaped as the command ends
        if not str(error) or ("\n" in str(error) and not typed):
            raise Fault(f"not one line: {str(error)!r}") from error
        return
    except SystemExit as error:
        if error.code:
            raise Fault(f"ended with status {error.code}") from error
        return
    if status and "not finite" not in said.getvalue():
        raise Fault(f"ended with status {status}: {said.getvalue()[-1000:]}")


def read_dataset(name_or_path: Path, folder: Path) -> None:
    """Open a dataset, and draw batches of both splits."""
    try:
        dataset = open_dataset(name_or_path, folder)
        tokenizer = dataset.tokenizer()
        ShardVerifier(dataset).wait()
        assert len(dataset.identity) == 64
        for shards in (dataset.train, dataset.val):
            loader = BatchLoader(shards, 4, 16, seed=1, vocab_size=dataset.vocab_size)
            x, _ = loader.next()
            next(loader.evenly_spaced(2, 4))
            if tokenizer is not None:
                tokenizer.decode(x[0].tolist())
    except RequestError as error:
        if "\n" in str(error):
            raise Fault(f"not one line: {str(error)!r}") from error
    except ValueError as error:  # an id that the model's vocabulary has and the tokenizer's has not
        if "outside the vocabulary" not in str(error):
            raise


class Checker:
    """Checks examples in copies of a small run with two checkpoints and its dataset.

    Args:
        folder: for them all.
    """

    def __init__(self, folder: Path) -> None:
        self._base, self._copy = folder / "base", folder / "copy"
        self._base.mkdir()
        prepare(self._base)
        flags = [*FLAGS, "--dataset=d", f"--data_dir={self._base}", f"--out_dir={self._base / RUN}"]
        for last, start in ((10, "scratch"), (20, "resume")):
            ended = finish("train", *flags, "--lr_decay_iters=26", f"--max_iters={last}", f"--init_from={start}")
            assert ended.status == 0, ended.output
        (self._base / BARE).mkdir()
        for split in ("train", "val"):  # as nanoGPT writes them
            shard = (self._base / DATASET / f"{split}_000000.bin").read_bytes()
            (self._base / BARE / f"{split}.bin").write_bytes(shard[1024:])
        torch.set_num_threads(1)

    def __call__(self, example: Any) -> None:
        """Raise if the example shows a fault."""
        shutil.rmtree(self._copy, ignore_errors=True)
        shutil.copytree(self._base, self._copy)
        before = os.getcwd()
        os.chdir(self._copy)
        try:
            self._check(example)
        finally:
            os.chdir(before)

    def _check(self, example: Any) -> None:
        folder = self._copy
        if isinstance(example, Line):
            command(example.command, *(text.replace("{folder}", str(folder)) for text in example.arguments))
        elif isinstance(example, Text):
            (folder / "new.txt").write_bytes(example.content)
            command(
                "data", "prepare", "text", str(folder / "new.txt"), f"--data_dir={folder}", "--name=new",
                f"--tokenizer={example.tokenizer}", f"--val_fraction={example.val_fraction}",
            )  # fmt: skip
            if (folder / "new").exists():
                read_dataset(Path("new"), folder)
        else:
            apply(example, folder)
            if example.file in RUN_FILES:
                command("sample", str(folder / RUN), "--max_new_tokens=3")
                command(
                    "train", f"--out_dir={folder / RUN}", f"--data_dir={folder}", "--init_from=resume", "--max_iters=21"
                )
            else:
                read_dataset(folder / BARE / "train.bin" if example.file in BARE_FILES else Path(DATASET), folder)


def checker(folder: Path) -> Callable[[Any], None]:
    """What checks an example, in ``folder``."""
    return Checker(folder)
