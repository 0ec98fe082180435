"""Weights into a Hugging Face folder that `transformers` loads: one tensor in memory at a time.

The folder appears whole or not at all: it is written beside its place, synced, and renamed.
Must not know: where parameters come from (`read` hands them over), checkpoints.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from windlass.dist.errors import ModelError
from windlass.model.config import ModelConfig
from windlass.model.hf import HfTensor, hf_layout
from windlass.model.hf_config import write_hf_config
from windlass.model.safetensors_file import DTYPE_NAMES, pack_header

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


def export_hf(
    folder: str | Path,
    config: ModelConfig,
    read: Callable[[str], torch.Tensor],
    dtype: torch.dtype,
    *,
    tokenizer_folder: str | Path | None = None,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write the model as a Hugging Face folder and return its path.

    `config` is what `model.hf_config.resolve_model` returned, as checkpoints record it;
    `read(name)` returns the whole parameter of that name ("embed.tokens.weight", ...); a tied one is asked for once.
    Raises:      ModelError if the folder exists, the architecture has no Hugging Face class, a parameter has another
                 shape, or the disk refuses; nothing is left behind then
    """
    folder = Path(folder)
    if config.kind == "decoder":
        config = replace(config, hf_folder=None)  # where its weights once came from; that folder may be gone
    if dtype not in DTYPE_NAMES:
        raise ModelError(f"cannot export {dtype}: use one of {', '.join(str(d) for d in DTYPE_NAMES)}.")
    if folder.exists():
        raise ModelError(f"{folder} exists: name a folder that does not, or remove it.")
    layout = hf_layout(config)
    described = _describe(config, dtype, bos_token_id, eos_token_id)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.tmp-", dir=folder.parent))
    except OSError as error:
        raise ModelError(f"cannot write {folder}: {error}.") from error
    try:
        for name, content in described.items():
            _write_json(temporary / name, content)
        _write_weights(temporary, layout, read, dtype, max_shard_bytes)
        if tokenizer_folder is not None:
            _copy_tokenizer(Path(tokenizer_folder), temporary, config.max_seq_len)
        temporary.chmod(0o755)
        _sync(temporary)
        temporary.rename(folder)
        _sync(folder.parent)
    except OSError as error:
        raise ModelError(f"cannot write {folder}: {error}. Nothing was left there.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _describe(
    config: ModelConfig, dtype: torch.dtype, bos_token_id: int | None, eos_token_id: int | None
) -> dict[str, dict[str, Any]]:
    if config.kind == "transformers":
        source = Path(config.hf_folder or "")
        model = json.loads((source / "config.json").read_text(encoding="utf-8"))
        name = str(dtype).removeprefix("torch.")
        model |= {"dtype": name, "torch_dtype": name}
    else:
        model = write_hf_config(config, dtype, bos_token_id, eos_token_id)
    ids = {key: model.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    generation = {key: value for key, value in ids.items() if value is not None}
    return {"config.json": model, "generation_config.json": {"_from_model_config": True, **generation}}


def _write_weights(
    folder: Path, layout: list[HfTensor], read: Callable[[str], torch.Tensor], dtype: torch.dtype, limit: int
) -> None:
    shards: list[list[HfTensor]] = [[]]
    filled = total = 0
    for tensor in layout:
        num_bytes = torch.Size(tensor.shape).numel() * dtype.itemsize
        if shards[-1] and filled + num_bytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled, total = filled + num_bytes, total + num_bytes
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        places = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})
    for name, shard in zip(names, shards, strict=True):
        with (folder / name).open("wb") as stream:
            stream.write(pack_header({tensor.name: tensor.shape for tensor in shard}, dtype))
            for tensor in shard:
                stream.write(_assemble(tensor, read, dtype).view(-1).view(torch.uint8).numpy().data)
            stream.flush()
            os.fsync(stream.fileno())


def _assemble(tensor: HfTensor, read: Callable[[str], torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    parts = []
    for name, shape in zip(tensor.parts, tensor.part_shapes, strict=True):
        part = read(name).detach()
        if tuple(part.shape) != shape:
            raise ModelError(f"parameter {name} has shape {list(part.shape)}, the model's is {list(shape)}.")
        parts.append(part.to("cpu", dtype))
    stacked = parts[0] if len(parts) == 1 else torch.cat(parts)
    return (stacked.t() if tensor.transposed else stacked).contiguous()


def _copy_tokenizer(source: Path, target: Path, max_seq_len: int) -> None:
    found = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not found:
        raise ModelError(f"{source} holds no tokenizer: none of {', '.join(TOKENIZER_FILES)}.")
    for name in found:
        shutil.copyfile(source / name, target / name)
    if "tokenizer.json" in found and "tokenizer_config.json" not in found:
        # Without it the library guesses a tokenizer class from the model's family.
        facts = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_seq_len}
        _write_json(target / "tokenizer_config.json", facts)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    with file.open("w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=2)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
