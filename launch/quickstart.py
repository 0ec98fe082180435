"""The quick start: the whole story of a run, told through the public commands on text that every machine has.

Every step is one `windlass ...` command, printed as a user would type it. The text is the source code of the running
Python's standard library. Must not know: anything that a user's script could not.
"""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from windlass.dist import env
from windlass.dist.errors import ConfigError, DataError, ModelError, NumericsError, WorkerError
from windlass.launch.report import duration

MARKER = ".windlass-quickstart"
JOB = "quickstart"
# Not the library itself: tests, installed packages, the 2to3 grammar, translations of Tcl.
EXCLUDED = ("site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "turtledemo", "lib2to3")
MIN_TEXT_BYTES = 2 << 20
SHORTER_BY = 1 / 3  # least drop of the validation loss that counts as learning
LOGITS_TOLERANCE = 1e-5
_STEP = re.compile(r"^step: (\d+) loss: ")


@dataclass
class Quickstart:
    """Runs the story in `folder`, which it may empty (a marker file says that it is its own)."""

    folder: Path
    chapters: list[tuple[str, float]] = field(default_factory=list)

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer"

    @property
    def tokens(self) -> Path:
        return self.folder / "tokens"

    @property
    def run_folder(self) -> Path:
        return self.folder / "run"

    @property
    def export(self) -> Path:
        return self.folder / "hf"

    def tell(self) -> None:
        """Run every chapter.

        Raises: ConfigError, DataError before anything ran; WorkerError if a command failed; NumericsError or ModelError
                if what came out is not what was promised
        """
        library = find_text()
        claim(self.folder)
        patterns = ["--include=*.py", *(f"--exclude={name}" for name in EXCLUDED)]
        with self._chapter(
            f"a tokenizer, trained on the sources of Python {sys.version_info[0]}.{sys.version_info[1]}"
        ):
            command(["data", "tokenizer", library, *patterns, "--vocab=4096", f"--out={self.tokenizer}"])
        with self._chapter("text to token shards"):
            out, tokenizer = f"--out={self.tokens}", f"--tokenizer={self.tokenizer}"
            command(["data", "prepare", library, *patterns, tokenizer, out, "--validation=0.03"])
        job = [JOB, f"data.path={self.tokens}", f"train.run_dir={self.run_folder}"]
        with self._chapter("what the job will need, before anything starts"):
            command(["plan", *job, "launch.workers=2"])
        with self._chapter("training on two workers, stopped in the middle"):
            self._train_and_stop(["train", *job, "launch.workers=2"])
            command(["checkpoint", "ls", str(self.run_folder)])
        with self._chapter("the same run, resumed on one worker"):
            command(["train", *job, "launch.workers=1"])
        before, after = self._losses()
        with self._chapter("a Hugging Face folder"):
            command(["checkpoint", "export", str(self.run_folder), "--to=hf", f"--out={self.export}"])
        with self._chapter("the same model, loaded by transformers"):
            difference, sample = compare_with_transformers(self.export, self.run_folder)
            print(f"largest difference of the logits: {difference:.1e} of the largest logit")
            print("it writes:")
            print("\n".join(f"    | {line}" for line in sample.splitlines()))
        self._summarise(before, after)

    @contextmanager
    def _chapter(self, title: str) -> Iterator[None]:
        print(f"\n=== {len(self.chapters) + 1}. {title}\n", flush=True)
        began = time.perf_counter()
        yield
        self.chapters.append((title, time.perf_counter() - began))

    def _train_and_stop(self, arguments: Sequence[str]) -> None:
        from windlass.launch.config import load_job

        middle = load_job(JOB, arguments[2:]).config.train.steps // 2
        show(arguments)
        process = subprocess.Popen(
            spelled(arguments), stdout=subprocess.PIPE, text=True, bufsize=1, env=env.copy(), errors="replace"
        )
        assert process.stdout is not None
        stopped = False
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                step = _STEP.match(line)
                if step and int(step[1]) >= middle and not stopped:
                    stopped = True
                    print(f"\n$ kill -TERM {process.pid}\n", flush=True)
                    process.send_signal(signal.SIGTERM)
            code = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        if code != 0:
            raise WorkerError(
                f"`windlass {shlex.join(arguments)}` ended with exit code {code}; its lines above say why"
            )
        if not stopped:
            raise WorkerError(f"the run ended before its step {middle}, so there was nothing to stop; see above")

    def _losses(self) -> tuple[float, float]:
        """Return validation bits per byte before and after; raise unless the run resumed and learned."""
        from windlass.launch.metrics import read_metrics

        history = read_metrics(self.run_folder / "metrics.jsonl")
        bits = [entry["bits_per_byte"] for entry in history if entry.get("event") == "eval"]
        if len(bits) < 2 or not any(entry.get("event") == "resume" for entry in history):
            raise NumericsError(f"{self.run_folder}/metrics.jsonl has no evaluation before and after, or no resume")
        before, after = float(bits[0]), float(bits[-1])
        if after > before * (1 - SHORTER_BY):
            raise NumericsError(
                f"validation loss went from {before:.3f} to {after:.3f} bits per byte: less than the third it should. "
                f"Look at {self.run_folder}/metrics.jsonl"
            )
        return before, after

    def _summarise(self, before: float, after: float) -> None:
        total = sum(seconds for _, seconds in self.chapters)
        print(f"\n=== Done in {duration(total)}\n")
        print(f"validation loss: {before:.3f} -> {after:.3f} bits per byte ({1 - after / before:.0%} lower)\n")
        for number, (title, seconds) in enumerate(self.chapters, 1):
            print(f"  {seconds:6.1f} s  {number}. {title}")
        written = {
            self.tokenizer: "the tokenizer (transformers loads it too)",
            self.tokens: "token shards and facts.json",
            self.run_folder / "config.yaml": "the resolved job",
            self.run_folder / "metrics.jsonl": "every step as JSON; TensorBoard's files lie beside it",
            self.run_folder / "checkpoints": "sharded, checksummed; torch.distributed.checkpoint reads them",
            self.export: "the model as a Hugging Face folder",
        }
        print("\nWritten:")
        width = max(len(str(path)) for path in written)
        for path, what in written.items():
            print(f"  {path!s:<{width}}  {what}")
        job = f"{JOB} data.path={self.tokens} train.run_dir={self.folder}/another"
        print(
            "\nTry next:\n"
            f"  windlass train {job} launch.workers=2 zero.stage=1 activation.policy=recompute\n"
            f"  torchrun --nproc-per-node 2 -m windlass train {job}-torchrun\n"
            f"  windlass launch {job}-ray --ray local launch.workers=2\n"
            f"  windlass config show {JOB}\n"
            "  windlass plan zero-7.5b --world 64 --stages\n"
            f"  tensorboard --logdir {self.run_folder}/tensorboard\n"
            "  windlass data prepare YOUR_TEXT/ --out tokens --tokenizer " + str(self.tokenizer)
        )


def find_text() -> str:
    """Return the folder of the standard library.

    Raises: DataError if this Python keeps no sources there
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    size = sum(path.stat().st_size for path in library.glob("*.py"))
    if size < MIN_TEXT_BYTES:
        raise DataError(
            f"{library}: this Python keeps {size >> 10} KiB of its library as source files, not the usual "
            f"{MIN_TEXT_BYTES >> 10} KiB or more. Use another Python, or your own text with `windlass data prepare`"
        )
    return str(library)


def claim(folder: Path) -> None:
    """Make the folder ours: create it, or empty what an earlier quick start trained (its tokens stay).

    Raises: ConfigError if it holds something else
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--dir {folder}: this is a file. Give a folder that is new or empty.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARKER).exists():
        raise ConfigError(
            f"--dir {folder}: not empty, and not from an earlier quick start. Give a new or empty folder."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARKER).write_text("made by `windlass quickstart`, which may delete run/ and hf/ here\n")
        for stale in ("run", "hf"):
            if (folder / stale).exists():
                shutil.rmtree(folder / stale)
    except OSError as error:
        raise ConfigError(
            f"--dir {folder}: {error.strerror} ({error.filename}). Give a folder you can write."
        ) from error


def show(arguments: Sequence[str]) -> None:
    """Print a command as one types it."""
    print(f"$ windlass {shlex.join(arguments)}", flush=True)


def spelled(arguments: Sequence[str]) -> list[str]:
    """Return how a process runs the command with this very Python, on PATH or not."""
    return [sys.executable, "-m", "windlass", *arguments]


def command(arguments: Sequence[str]) -> None:
    """Print a command and run it.

    Raises: WorkerError if it fails
    """
    show(arguments)
    code = subprocess.run(spelled(arguments), env=env.copy()).returncode
    print(flush=True)
    if code != 0:
        raise WorkerError(f"`windlass {shlex.join(arguments)}` ended with exit code {code}; its lines above say why")


def compare_with_transformers(export: Path, run_folder: Path) -> tuple[float, str]:
    """Load the export with transformers and compare its logits with those of the checkpoint itself.

    Returns the largest difference as a share of the largest logit, and a few lines that the model writes.
    Raises: ModelError if they differ
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from windlass.data.batch import IGNORE, Batch
    from windlass.launch.evaluate import hidden_states, load_checkpoint

    disable_progress_bar()
    print(f"transformers.AutoModelForCausalLM.from_pretrained('{export}')", flush=True)
    theirs = AutoModelForCausalLM.from_pretrained(str(export), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(export))
    prompt = "def read_file(path):\n"
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        wanted = theirs(ids).logits
        positions = torch.arange(ids.shape[1])[None]
        rows = Batch(ids, positions, torch.zeros_like(positions), torch.full_like(ids, IGNORE), torch.zeros(1))
        model, _, _ = load_checkpoint(run_folder)
        ours = cast(Any, model.head).logits(hidden_states(model, rows))
        torch.manual_seed(0)
        sampling = {"do_sample": True, "top_k": 40, "temperature": 0.8, "repetition_penalty": 1.2, "max_new_tokens": 48}
        ids = theirs.generate(ids, attention_mask=torch.ones_like(ids), **sampling)
    difference = ((wanted - ours).abs().max() / ours.abs().max()).item()
    if difference > LOGITS_TOLERANCE:
        raise ModelError(
            f"{export}: logits of transformers differ by {difference:.1e}, {LOGITS_TOLERANCE:.0e} is allowed"
        )
    written = str(tokenizer.decode(ids[0], skip_special_tokens=True))
    return difference, "\n".join(line for line in written.splitlines() if line.strip())
