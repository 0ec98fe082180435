"""Weights out of a Hugging Face folder: exactly the byte ranges a rank asks for, never a pickle.

Legend: R rows and C columns of one of our parameters; the folder may hold it transposed (C, R) inside a wider tensor.
Must not know: who asks for which range, config.json.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import torch

from windlass.dist.errors import ModelError
from windlass.model.config import ModelConfig
from windlass.model.hf import HfTensor, hf_layout
from windlass.model.safetensors_file import DTYPES, Stored, read_header

_CHUNK_BYTES = 16 << 20  # staging memory of one read that must be converted
# Buffers that old versions of the library saved beside the parameters.
_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|\.attn\.(bias|masked_bias))$")
_BASE = re.compile(r"^(transformer|model)\.")


class HfReader:
    """An open Hugging Face folder; `fill` reads any range of any of our parameters.

    `bytes_read` counts the tensor bytes read so far. A context manager.
    Raises:      ModelError naming file and tensor: missing, truncated, of another shape or dtype, or unknown
    """

    def __init__(self, folder: str | Path, config: ModelConfig) -> None:
        self.folder = Path(folder)
        self.bytes_read = 0
        self._files: dict[Path, int] = {}
        stored = _find_tensors(self.folder)
        layout = hf_layout(config)
        self._sources: dict[str, tuple[Stored, HfTensor, int, tuple[int, ...]]] = {}
        used = set()
        for tensor in layout:
            name = _locate(tensor.name, stored, self.folder)
            used.add(name)
            _check(name, tensor, stored[name])
            row = 0
            for part, shape in zip(tensor.parts, tensor.part_shapes, strict=True):
                self._sources[part] = (stored[name], tensor, row, shape)
                row += shape[0]
        _refuse_unknown(stored, used, tied="head.proj.weight" not in self._sources)

    def fill(self, name: str, start: int, stop: int, out_1d: torch.Tensor) -> None:
        """Write row-major elements [start, stop) of our parameter `name` to `out_1d`, in its dtype.

        Blocks:      host, for the read
        """
        stored, tensor, row, shape = self._sources[name]
        if tensor.transposed:
            self._fill_transposed(stored, row, shape, start, stop, out_1d)
            return
        first = row * torch.Size(shape[1:]).numel() + start
        dtype = DTYPES[stored.dtype]
        if out_1d.dtype == dtype and out_1d.device.type == "cpu" and out_1d.is_contiguous():
            self._read(stored, first, out_1d)
            return
        step = _CHUNK_BYTES // dtype.itemsize
        staging = torch.empty(min(step, stop - start), dtype=dtype)
        for begin in range(0, stop - start, step):
            part = staging[: min(step, stop - start - begin)]
            self._read(stored, first + begin, part)
            out_1d[begin : begin + len(part)].copy_(part)

    def _fill_transposed(
        self, stored: Stored, row: int, shape: tuple[int, ...], start: int, stop: int, out_1d: torch.Tensor
    ) -> None:
        # Our element (r, c) lies at (c, row + r) of the stored tensor: per c one run of rows, shorter by one where the
        # range begins or ends inside a row.
        num_columns, stride = shape[1], stored.shape[1]
        first_row, first_column = divmod(start, num_columns)
        last_row, last_column = divmod(stop, num_columns)
        grid_CR = torch.empty(num_columns, last_row - first_row + 1, dtype=DTYPES[stored.dtype])
        if (start, stop, stride) == (0, shape[0] * shape[1], shape[0]):
            whole = torch.empty(stored.shape, dtype=grid_CR.dtype)
            self._read(stored, 0, whole.view(-1))
            out_1d.copy_(whole.t().reshape(-1))
            return
        for c in range(num_columns):
            low, high = first_row + (c < first_column), last_row + (c < last_column)
            if low < high:
                self._read(stored, c * stride + row + low, grid_CR[c, low - first_row : high - first_row])
        out_1d.copy_(grid_CR.t().reshape(-1)[first_column : first_column + stop - start])

    def _read(self, stored: Stored, first: int, out_1d: torch.Tensor) -> None:
        fd = self._files.get(stored.file)
        if fd is None:
            fd = self._files[stored.file] = os.open(stored.file, os.O_RDONLY)
        view = out_1d.view(torch.uint8).numpy().data
        offset = stored.offset + first * out_1d.itemsize
        while view:
            count = os.preadv(fd, [view], offset)
            if count == 0:
                raise ModelError(f"{stored.file} ends at byte {offset} while being read: was it changed?")
            self.bytes_read += count
            view, offset = view[count:], offset + count

    def close(self) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()

    def __enter__(self) -> HfReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _find_tensors(folder: Path) -> dict[str, Stored]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return read_header(single)
    if not index.exists():
        pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        if pickles:
            raise ModelError(
                f"{folder} holds its weights as a pickle ({pickles[0].name}), which can run any code when read. Where "
                'you trust it, convert it once: python -c "from transformers import AutoModelForCausalLM as M; '
                f"M.from_pretrained('{folder}', dtype='auto').save_pretrained('{folder}-safetensors')\""
            )
        raise ModelError(f"{folder} holds neither {single.name} nor {index.name}: is it a Hugging Face model folder?")
    try:
        files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{index} cannot be read: {error!r}.") from error
    headers = {}
    for file in sorted(set(files.values())):
        if not (folder / file).exists():
            lost = min(name for name, where in files.items() if where == file)
            raise ModelError(f"{folder / file} does not exist, but {index.name} places tensor {lost} there.")
        headers[file] = read_header(folder / file)
    for name, file in files.items():
        if name not in headers[file]:
            raise ModelError(f"{folder / file} lacks tensor {name}, which {index.name} places there.")
    return {name: headers[file][name] for name, file in files.items()}


def _locate(name: str, stored: dict[str, Stored], folder: Path) -> str:
    # Folders saved from the model without its head (the original GPT-2 ones) lack the outer prefix.
    for candidate in (name, _BASE.sub("", name)):
        if candidate in stored:
            return candidate
    raise ModelError(f"{folder} lacks tensor {name}, which its config.json calls for.")


def _check(name: str, tensor: HfTensor, stored: Stored) -> None:
    if stored.shape != tensor.shape:
        raise ModelError(
            f"{stored.file}: tensor {name} has shape {list(stored.shape)}, the model's is {list(tensor.shape)}."
        )
    if stored.dtype not in DTYPES:
        raise ModelError(f"{stored.file}: tensor {name} is stored as {stored.dtype}, use one of {', '.join(DTYPES)}.")
    wanted = torch.Size(tensor.shape).numel() * DTYPES[stored.dtype].itemsize
    if stored.num_bytes != wanted:
        raise ModelError(f"{stored.file}: tensor {name} has {stored.num_bytes} bytes, its shape needs {wanted}.")


def _refuse_unknown(stored: dict[str, Stored], used: set[str], tied: bool) -> None:
    for name in sorted(stored.keys() - used):
        if not _BUFFERS.search(name) and not (tied and name == "lm_head.weight"):
            raise ModelError(
                f"{stored[name].file}: tensor {name} belongs to no parameter of the model that config.json describes: "
                "training without it would train another model."
            )
