"""Text to token ids: plain bytes, or any `tokenizer.json`, and how one is trained.

Saved folders load with transformers' AutoTokenizer. Must not know: shards, splits, where text comes from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from windlass.data.facts import TokenizerFacts
from windlass.data.shards import write_file
from windlass.dist.errors import DataError

BYTES = "bytes"
END = "<|endoftext|>"
MIN_VOCAB = 257  # every byte and the end of a document
_KNOWN_ENDS = (END, "<|end_of_text|>", "</s>", "<eos>", "<|end▁of▁sentence|>")
_FOLDER_FILES = (  # what a Hugging Face tokenizer folder may hold
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


class Tokenizer:
    """Encodes batches of documents. Special tokens in the text are ordinary text: input cannot fake a document end."""

    def __init__(self, files: dict[str, bytes], facts: TokenizerFacts) -> None:
        self.facts = facts
        self._files = files
        self._tokenizer = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned type that holds every id."""
        return np.dtype(np.uint16 if self.facts.vocab_size <= 1 << 16 else np.uint32)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids of each document, without its end."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def save(self, folder: Path) -> None:
        """Write the files that transformers loads, each atomically."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            write_file(folder / name, content)


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are the bytes of UTF-8, 256 is the end of a document."""

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8).astype(self.dtype) for text in texts]


_Tokenizer = TypeVar("_Tokenizer", bound=Tokenizer)


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """Load `bytes`, a folder with a tokenizer.json, or such a file.

    Raises: DataError if there is none, it is damaged, or it has no end-of-document token.
    """
    if str(spec) == BYTES:
        return _byte_tokenizer()
    path = Path(spec)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise DataError(
            f"tokenizer {spec}: no {'tokenizer.json in this folder' if path.is_dir() else 'such file or folder'}. "
            "Use `bytes`, a folder or tokenizer.json, or train one: `windlass data tokenizer SOURCE... --out FOLDER`."
        )
    names = _FOLDER_FILES if path.is_dir() else (file.name,)
    files = {name: (file.parent / name).read_bytes() for name in names if (file.parent / name).is_file()}
    content = files.pop(file.name)
    bytes_tokenizer = _byte_tokenizer()
    if _digest(content) == bytes_tokenizer.facts.digest:
        return bytes_tokenizer
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as e:  # the library raises plain Exception for anything wrong with the file
        raise DataError(f"tokenizer {file}: cannot be read ({e})") from e
    end, end_id = _find_end(files, tokenizer, file)
    files["tokenizer.json"] = content
    files.setdefault("tokenizer_config.json", _config(end))
    files.setdefault("special_tokens_map.json", _special_tokens(end))
    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1  # ids may have gaps
    return Tokenizer(files, TokenizerFacts(_digest(content), size, end_id, end))


def _find_end(files: dict[str, bytes], tokenizer: tokenizers.Tokenizer, file: Path) -> tuple[str, int]:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            end = json.loads(files.get(name, b"{}")).get("eos_token")
        except ValueError as e:
            raise DataError(f"tokenizer {file.parent / name}: not JSON ({e})") from e
        end = end.get("content") if isinstance(end, dict) else end
        if end and (end_id := tokenizer.token_to_id(end)) is not None:
            return end, end_id
    for end in _KNOWN_ENDS:
        if (end_id := tokenizer.token_to_id(end)) is not None:
            return end, end_id
    raise DataError(
        f"tokenizer {file}: no end-of-document token. Name one as eos_token in {file.parent / 'tokenizer_config.json'} "
        f"(looked for {', '.join(_KNOWN_ENDS)})."
    )


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, end: str = END, show_progress: bool = False
) -> tuple[Tokenizer, int]:
    """Train a byte-level BPE; return it and the number of documents it saw.

    Raises: DataError if `vocab_size` is too small, or there is no text.
    """
    if vocab_size < MIN_VOCAB:
        raise DataError(f"--vocab {vocab_size}: at least {MIN_VOCAB} (256 bytes and the end of a document)")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    num_texts = 0

    def counted() -> Iterator[str]:
        nonlocal num_texts
        for text in texts:
            num_texts += 1
            yield text

    tokenizer.train_from_iterator(counted(), trainer)
    if not num_texts:
        raise DataError("no text to train a tokenizer on: the sources hold no documents")
    return _from_json(Tokenizer, json.loads(tokenizer.to_str()), end, tokenizer.get_vocab_size()), num_texts


def _byte_tokenizer() -> ByteTokenizer:
    """Build the byte tokenizer as a BPE without merges, so that transformers can load it too."""
    vocab = {char: byte for byte, char in enumerate(_byte_alphabet())} | {END: 256}
    byte_level: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    end = {"id": 256, "content": END, "special": True, "normalized": False}
    plain: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end | {"single_word": False, "lstrip": False, "rstrip": False}],
        "normalizer": None,
        "pre_tokenizer": byte_level | {"use_regex": False},
        "post_processor": None,
        "decoder": byte_level | {"use_regex": False},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    return _from_json(ByteTokenizer, plain, END, MIN_VOCAB)


def _byte_alphabet() -> list[str]:
    """Return the printable character that stands for each byte in byte-level BPE. (Radford et al. 2019, GPT-2)"""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _from_json(kind: type[_Tokenizer], plain: dict[str, Any], end: str, vocab_size: int) -> _Tokenizer:
    content = json.dumps(plain, ensure_ascii=False, indent=1).encode("utf-8")
    files = {"tokenizer.json": content, "tokenizer_config.json": _config(end)}
    files["special_tokens_map.json"] = _special_tokens(end)
    ids = {token["content"]: token["id"] for token in plain["added_tokens"]}
    return kind(files, TokenizerFacts(_digest(content), vocab_size, ids[end], end))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _config(end: str) -> bytes:
    plain = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "bos_token": end,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**9,
    }
    return json.dumps(plain, indent=1).encode("utf-8")


def _special_tokens(end: str) -> bytes:
    return json.dumps({"eos_token": end, "bos_token": end}, indent=1).encode("utf-8")
