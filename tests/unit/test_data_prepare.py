"""From text to token folders: what is read, what is refused; interruptions, order and workers do not matter."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from windlass.data import documents
from windlass.data import prepare as prepare_module
from windlass.data.documents import Findings, read_documents
from windlass.data.facts import Facts, check_same_tokenizer, check_vocab, read_facts
from windlass.data.inspect import inspect_folder, read_texts
from windlass.data.prepare import prepare
from windlass.data.sources import Filter, find_pieces, plan_units
from windlass.data.tokenizer import END, Tokenizer, load_tokenizer, train_tokenizer
from windlass.dist.errors import DataError
from windlass.launch.cli.data import app

TEXTS = [f"document {i}: " + "the quick brown fox " * (i % 7 + 1) for i in range(60)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def stored(folder: Path) -> list[str]:
    return [text for split in ("train", "validation") for text in read_texts(folder, split, 10**6)]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_every_kind_of_input_gives_its_documents(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep" / "er").mkdir(parents=True)
    (source / "a.txt").write_text("plain text\n")
    (source / "deep" / "er" / "code.py").write_text("print('é')\n")
    (source / "with_bom.md").write_bytes(b"\xef\xbb\xbfbom text")
    write_jsonl(source / "rows.jsonl", ["row one", "row two"])
    (source / "b.txt.gz").write_bytes(gzip.compress(b"gzip text"))
    two_frames = zstandard.compress(b'{"text": "zstd one"}\n') + zstandard.compress(b'{"text": "zstd two"}\n')
    (source / "c.jsonl.zst").write_bytes(two_frames)
    pq.write_table(pa.table({"text": ["column one", None, "column two"]}), source / "d.parquet")
    (source / "picture.bin").write_bytes(b"\x89PNG\0\0")
    (source / "latin.txt").write_bytes("caf\u00e9 au lait".encode("latin-1"))
    (source / ".hidden").write_text("not wanted")
    (source / "empty.txt").write_text("")
    facts = prepare([source], tmp_path / "out", validation=0.0, workers=1)
    expected = ["plain text\n", "print('é')\n", "bom text", "row one", "row two", "gzip text"]
    expected += ["zstd one", "zstd two", "column one", "column two"]
    assert sorted(stored(tmp_path / "out")) == sorted(expected)
    assert [Path(p).name for p in facts.skipped["not_text"]["first"]] == ["latin.txt", "picture.bin"]
    assert facts.skipped["empty_documents"] == 2
    assert facts.splits["train"].text_bytes == sum(len(text.encode()) for text in expected)
    assert facts.bytes_per_token("train") == 1.0


def test_include_and_exclude_choose_among_the_files_of_a_folder(tmp_path: Path) -> None:
    for name in ("a.py", "b.txt", "tests/c.py", "lib/d.py", "lib/old/e.py"):
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    pieces = find_pieces([tmp_path / "source"], tmp_path / "out", Filter(("*.py",), ("tests", "lib/old")))
    assert [os.path.relpath(piece.path, tmp_path / "source") for piece in pieces] == ["a.py", "lib/d.py"]


def test_the_output_folder_is_not_an_input_of_its_own_source(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("only this")
    for _ in range(2):
        prepare([tmp_path, tmp_path / "a.txt"], tmp_path / "out", validation=0.0, workers=1)
        assert stored(tmp_path / "out") == ["only this"]


@given(
    lines=st.lists(st.text(st.sampled_from("ab é🙂\t"), max_size=60), min_size=1, max_size=12),
    unit_bytes=st.integers(1, 200),
    limit=st.integers(16, 80),
)
@settings(max_examples=40)
def test_cutting_a_file_into_pieces_and_documents_loses_nothing(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], unit_bytes: int, limit: int
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    text = folder / "text.txt"
    text.write_bytes("\n".join(lines).encode())
    rows = write_jsonl(folder / "rows.jsonl", [line + "." for line in lines])

    def read(path: Path) -> list[str]:
        findings = Findings(stop=True)
        units = plan_units(find_pieces([path], folder / "out", Filter()), unit_bytes)
        return [
            document
            for unit in units
            for piece in unit.pieces
            for document in read_documents(piece, findings, text_field="text", max_document_bytes=limit)
        ]

    cut = read(text)
    assert "".join(cut) == "\n".join(lines)
    assert all(len(document.encode()) <= limit for document in cut)
    assert read(rows) == [line + "." for line in lines]


def test_the_output_is_the_same_for_any_number_of_workers(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", TEXTS)
    for workers in (1, 2):
        prepare([source], tmp_path / str(workers), validation=0.2, workers=workers, unit_bytes=1500)
    one, two = files_of(tmp_path / "1"), files_of(tmp_path / "2")
    assert one == two
    assert sum(name.startswith("train-") for name in one) > 3


def test_the_split_of_a_document_depends_on_its_content_only(tmp_path: Path) -> None:
    held_out = []
    for number, texts in enumerate([TEXTS, TEXTS[::-1], TEXTS[20:]]):
        source = write_jsonl(tmp_path / f"{number}.jsonl", texts)
        prepare([source], tmp_path / str(number), validation=0.3, workers=1)
        held_out.append(set(read_texts(tmp_path / str(number), "validation", 10**6)))
    assert held_out[0] == held_out[1]
    assert held_out[2] == held_out[0] & set(TEXTS[20:])
    assert 5 < len(held_out[0]) < 35


def test_only_what_changed_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(4):
        (source / f"{number}.txt").write_text(f"file {number} " * 20)
    done: list[int] = []
    real = prepare_module.tokenize_unit

    def counted(unit: Any, *rest: Any) -> Any:
        done.append(unit.index)
        return real(unit, *rest)

    monkeypatch.setattr(prepare_module, "tokenize_unit", counted)

    def run(**changes: Any) -> list[int]:
        done.clear()
        prepare([source], tmp_path / "out", validation=0.0, workers=1, unit_bytes=200, **changes)
        return list(done)

    assert run() == [0, 1, 2, 3]
    assert run() == []
    (source / "2.txt").write_text("new text " * 20)
    assert run() == [2]
    (tmp_path / "out" / "train-00001.parquet").unlink()
    assert run() == [1]
    (source / "3.txt").unlink()
    assert run() == []
    assert "train-00003.parquet" not in files_of(tmp_path / "out")
    assert run(text_field="body") == [0, 1, 2]


KILLED = """
import os, signal, sys
from windlass.data import shards
from windlass.data.prepare import prepare
real = shards._publish
def publish(temporary, path):
    if path.suffix == ".parquet" and "00002" in path.name:
        os.kill(os.getpid(), signal.SIGKILL)
    real(temporary, path)
shards._publish = publish
prepare([sys.argv[1]], sys.argv[2], validation=0.2, workers=1, unit_bytes=1500)
"""


def test_a_killed_prepare_leaves_no_half_written_shard_and_is_completed_by_running_it_again(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", TEXTS)
    out = tmp_path / "out"
    root = Path(documents.__file__).resolve().parents[1]
    ended = subprocess.run([sys.executable, "-c", KILLED, source, out], cwd=root, timeout=120)
    assert ended.returncode == -signal.SIGKILL
    finished = sorted(path.name for path in out.glob("*.parquet"))
    assert finished == [f"{s}-0000{n}.parquet" for s in ("train", "validation") for n in (0, 1)]
    assert list(out.glob(".*.tmp"))
    with pytest.raises(DataError, match=r"interrupted.*Run the same"):
        read_facts(out)
    prepare([source], out, validation=0.2, workers=1, unit_bytes=1500)
    prepare([source], tmp_path / "whole", validation=0.2, workers=1, unit_bytes=1500)
    assert files_of(out) == files_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("cut.txt.gz", gzip.compress(os.urandom(9000))[:-9], "cut.txt.gz.*runcated"),
        ("cut.jsonl.zst", zstandard.compress(b'{"text": "x"}\n' * 9)[:-3], "cut.jsonl.zst.*runcated"),
        ("bad.jsonl", b'{"text": "a"}\n\n{"text": \n', "bad.jsonl: line 3: not JSON"),
        ("bare.jsonl", b'{"body": "a", "id": 1}\n', "line 1: no field 'text' .it has body, id.; --text-field"),
        ("number.jsonl", b'{"text": 5}\n', "line 1: field 'text' is a int"),
        ("list.jsonl", b"[1]\n", "line 1: a JSON list"),
        ("half.jsonl", b'{"text": "\\ud800"}\n', "line 1: field 'text' holds half a surrogate pair"),
        ("latin.txt", b"good\nbad \xff here", "latin.txt: not UTF-8 at byte 9 .0xff."),
        ("torn.parquet", b"PAR1 torn", "torn.parquet: cannot be read"),
    ],
)
def test_a_damaged_input_is_named_and_can_be_skipped(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    good = tmp_path / "good.txt"
    good.write_text("good text")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        prepare([good, tmp_path / name], tmp_path / "out", validation=0.0, workers=1)
    facts = prepare([good, tmp_path / name], tmp_path / "out", validation=0.0, workers=1, on_error="skip")
    assert facts.skipped["problems"]["count"] == 1
    assert name in facts.skipped["problems"]["first"][0]
    assert "good text" in stored(tmp_path / "out")


def test_a_bad_line_far_into_a_file_is_named_by_its_number_in_the_file(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", TEXTS)
    with open(path, "a") as file:
        file.write("{oops\n")
    with pytest.raises(DataError, match=f"line {len(TEXTS) + 1}: not JSON"):
        prepare([path], tmp_path / "out", workers=1, unit_bytes=700)


def test_parquet_without_the_column_names_the_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"], "size": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no column 'text' .it has body, size.; --text-field"):
        prepare([tmp_path / "a.parquet"], tmp_path / "out", workers=1)
    with pytest.raises(DataError, match="column 'size' is int64, text"):
        prepare([tmp_path / "a.parquet"], tmp_path / "out", workers=1, text_field="size")
    prepare([tmp_path / "a.parquet"], tmp_path / "out", workers=1, validation=0.0, text_field="body")
    assert stored(tmp_path / "out") == ["a"]


def test_an_unreadable_file_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"gone.txt: cannot be read .No such file"):
        prepare([tmp_path / "source"], tmp_path / "out", workers=1)


def test_nothing_to_do_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no input files in"):
        prepare([tmp_path / "empty"], tmp_path / "out")
    with pytest.raises(DataError, match=r"source .*nowhere: no such file or folder"):
        prepare([tmp_path / "nowhere"], tmp_path / "out")
    (tmp_path / "empty" / "picture").write_bytes(b"\0\1\2")
    with pytest.raises(DataError, match=r"no documents in .* 1 files are not UTF-8"):
        prepare([tmp_path / "empty"], tmp_path / "out", workers=1)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match="fell into the validation split"):
        prepare([tmp_path / "a.txt"], tmp_path / "out2", workers=1, validation=0.999999)


def test_a_folder_of_other_things_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match="not empty and not written by"):
        prepare([tmp_path / "a.txt"], tmp_path, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_two_prepares_into_one_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with (
        prepare_module._claimed(tmp_path / "out"),
        pytest.raises(DataError, match="another `windlass data prepare` is writing"),
    ):
        prepare([tmp_path / "a.txt"], tmp_path / "out", workers=1)


def test_a_full_disk_is_named_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"train-00000.parquet: cannot be written .*No space left"):
        prepare([tmp_path / "a.txt"], tmp_path / "out", workers=1, validation=0.0)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".units"]


def test_a_trained_tokenizer_gives_back_every_text_and_cannot_be_fooled(tmp_path: Path) -> None:
    trained, num_documents = train_tokenizer(TEXTS, 300)
    trained.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert num_documents == len(TEXTS)
    assert loaded.facts == trained.facts == load_tokenizer(tmp_path / "tokenizer.json").facts
    assert loaded.facts.vocab_size == 300
    texts = ["the quick 🙂 fox\n", f"a fake {END} inside"]
    encoded = loaded.encode_batch(texts)
    assert [loaded.decode(ids) for ids in encoded] == texts
    assert not any(loaded.facts.eos_id in ids for ids in encoded)
    assert len(encoded[0]) < len(texts[0].encode())
    assert {"tokenizer_config.json", "special_tokens_map.json"} <= set(files_of(tmp_path))


def test_the_byte_tokenizer_means_the_same_when_loaded_as_a_tokenizer_file(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("bytes")
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).facts == tokenizer.facts
    text = "".join(map(chr, range(300))) + "🙂"
    as_bpe = Tokenizer.encode_batch(tokenizer, [text])[0]
    assert tokenizer.encode_batch([text])[0].tolist() == list(text.encode()) == as_bpe.tolist()
    assert tokenizer.decode(as_bpe) == text


def test_a_tokenizer_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file or folder.*windlass data tokenizer"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no tokenizer.json in this folder"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read"):
        load_tokenizer(tmp_path)
    plain = json.loads(load_tokenizer("bytes")._files["tokenizer.json"])
    plain["added_tokens"] = []
    del plain["model"]["vocab"][END]
    (tmp_path / "tokenizer.json").write_text(json.dumps(plain))
    with pytest.raises(DataError, match="no end-of-document token"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match="at least 257"):
        train_tokenizer(TEXTS, 100)
    with pytest.raises(DataError, match="no text to train"):
        train_tokenizer([], 300)


def folder_of(tmp_path: Path, name: str, **more: Any) -> Facts:
    return prepare([write_jsonl(tmp_path / f"{name}.jsonl", TEXTS)], tmp_path / name, workers=1, **more)


def test_a_token_that_the_model_does_not_have_is_an_error(tmp_path: Path) -> None:
    facts = folder_of(tmp_path, "tokens")
    check_vocab(facts, 257)
    with pytest.raises(DataError, match=r"token id 256.*model.vocab_size = 256.*at least 257"):
        check_vocab(facts, 256)


def test_members_with_different_tokenizers_are_an_error(tmp_path: Path) -> None:
    train_tokenizer(TEXTS, 300)[0].save(tmp_path / "bpe")
    members = [folder_of(tmp_path, "a"), folder_of(tmp_path, "b", tokenizer=tmp_path / "bpe")]
    check_same_tokenizer([members[0], members[0]])
    with pytest.raises(DataError, match=r"/b was tokenized by .*300 ids.*/a by .*257 ids"):
        check_same_tokenizer(members)


def test_damaged_facts_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such folder.*windlass data prepare"):
        read_facts(tmp_path / "nowhere")
    with pytest.raises(DataError, match="is empty"):
        read_facts(tmp_path)
    (tmp_path / "other").write_text("")
    with pytest.raises(DataError, match="holds no prepared tokens"):
        read_facts(tmp_path)
    for content, said in (("{", "cannot be read"), ('{"format": 99}', "format 99"), ('{"format": 1}', "damaged")):
        (tmp_path / "facts.json").write_text(content)
        with pytest.raises(DataError, match=said):
            read_facts(tmp_path)


def test_inspect_finds_a_flipped_bit(tmp_path: Path) -> None:
    facts = folder_of(tmp_path, "tokens")
    assert inspect_folder(facts.folder, verify=True).damaged == ()
    shard = facts.folder / "train-00000.parquet"
    content = bytearray(shard.read_bytes())
    content[200] ^= 1
    shard.write_bytes(content)
    damaged = inspect_folder(facts.folder, verify=True).damaged
    assert len(damaged) == 1
    assert "train-00000.parquet" in damaged[0]


def test_the_commands_prepare_train_a_tokenizer_and_inspect(tmp_path: Path) -> None:
    source, out, bpe = write_jsonl(tmp_path / "rows.jsonl", TEXTS), tmp_path / "out", tmp_path / "bpe"

    def run(*arguments: str | Path) -> str:
        done = CliRunner().invoke(app, [str(a) for a in arguments])
        assert done.exit_code == 0, (done.output, done.exception)
        return done.output

    assert "300 ids from 60 documents" in run("tokenizer", source, "--vocab", "300", "--out", bpe)
    said = run("prepare", source, "--out", out, "--tokenizer", bpe, "--workers", "1", "--validation", "0.2")
    assert f"data.path={out}" in said
    assert "tokenizing: 100%" in said
    said = run("inspect", out, "--verify", "--documents", "1")
    assert "every shard is intact" in said
    assert "document 1: the quick brown fox" in said or "document 0: the quick brown fox" in said
    assert json.loads(run("inspect", out, "--json"))["tokenizer"]["vocab_size"] == 300
    for command in ("prepare", "tokenizer", "inspect"):
        assert "Example" in run(command, "--help")
