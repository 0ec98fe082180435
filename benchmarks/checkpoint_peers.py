"""What the peers of `benchmarks/checkpoint.py --parts recovery` train, as their documentation recommends.

`ray-train`: a TorchTrainer of Ray Train v2 with two workers and DDP, a DCP checkpoint reported at every step, resumed
from the newest one. `torchft`: one replica group of one rank with TorchFT's manager; the benchmark starts two of
them and a lighthouse. Every rank notes each finished step in a file of its own.

Not meant to be started by hand: see benchmarks/checkpoint.py.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

VOCAB, WIDTH, LAYERS, HEADS, SEQ, BATCH = 4096, 192, 4, 3, 128, 2  # the sizes of the preset tiny


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in self.qkv(self.norm1(h)).chunk(3, -1))
        h = h + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return h + self.down(F.gelu(self.up(self.norm2(h))))


class GPT(nn.Module):
    """A small decoder with tied embeddings; forward returns the mean loss."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCAB, WIDTH), nn.Embedding(SEQ, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        h = self.tokens(tokens[:, :-1]) + self.places.weight
        for block in self.blocks:
            h = block(h)
        logits = F.linear(self.norm(h), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def batch() -> torch.Tensor:
    return torch.randint(VOCAB, (BATCH, SEQ + 1))


def note(folder: str, rank: int, step: int) -> None:
    """Write down that a step is done."""
    line = json.dumps({"rank": rank, "step": step, "pid": os.getpid(), "time": time.time()}) + "\n"
    with open(f"{folder}/steps-{rank}.jsonl", "a") as file:
        file.write(line)


# -- Ray Train v2 with DCP ---------------------------------------------------------------------------------------------


def ray_loop(config: dict[str, Any]) -> None:
    """Train as one worker of Ray Train."""
    import ray.train
    import torch.distributed.checkpoint as dcp
    from ray.train.torch import prepare_model
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    torch.set_num_threads(1)
    rank = ray.train.get_context().get_world_rank()
    torch.manual_seed(rank)
    model = prepare_model(GPT())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    done = 0
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as place:
            weights, moments = get_state_dict(model, optimizer)
            state: dict[str, Any] = {"model": weights, "optimizer": moments, "step": torch.zeros(())}
            dcp.load(state, checkpoint_id=place)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        done = int(state["step"])
    for step in range(done + 1, config["steps"] + 1):
        optimizer.zero_grad()
        model(batch()).backward()
        optimizer.step()
        note(config["folder"], rank, step)
        weights, moments = get_state_dict(model, optimizer)
        with tempfile.TemporaryDirectory(dir=config["folder"]) as place:
            state = {"model": weights, "optimizer": moments, "step": torch.tensor(float(step))}
            dcp.save(state, checkpoint_id=place)
            ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(place))


def ray_train(given: argparse.Namespace) -> None:
    """Run the driver until training ends."""
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=80 << 20, _temp_dir=given.temp)
    trainer = TorchTrainer(
        ray_loop,
        train_loop_config={"folder": str(given.folder), "steps": given.steps},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(
            name="run",
            storage_path=str(given.folder / "results"),
            failure_config=FailureConfig(max_failures=3),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    trainer.fit()
    ray.shutdown()


# -- TorchFT -----------------------------------------------------------------------------------------------------------


def lighthouse(given: argparse.Namespace) -> None:
    """Serve until killed; the address goes to a file."""
    from torchft.coordination import LighthouseServer

    # The example of its documentation; other timeouts are its defaults.
    server = LighthouseServer(
        bind="[::]:0",
        min_replicas=1,
        join_timeout_ms=10_000,
        quorum_tick_ms=100,
        heartbeat_timeout_ms=given.heartbeat_ms,
    )
    draft = given.folder / "lighthouse.tmp"
    draft.write_text(server.address())
    draft.rename(given.folder / "lighthouse")
    signal.pause()


def torchft_replica(given: argparse.Namespace) -> None:
    """Train as one replica group of one rank until killed."""
    from torch.distributed import TCPStore
    from torch.nn.utils import parameters_to_vector, vector_to_parameters
    from torchft import Manager, Optimizer, ProcessGroupGloo

    torch.set_num_threads(1)
    torch.manual_seed(given.replica)
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    module = GPT()
    inner = torch.optim.AdamW(module.parameters(), lr=3e-4, fused=True)

    def state_dict() -> dict[str, Any]:
        return {"model": module.state_dict(), "optimizer": inner.state_dict()}

    def load_state_dict(state: dict[str, Any]) -> None:
        module.load_state_dict(state["model"])
        inner.load_state_dict(state["optimizer"])

    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=10)),
        min_replica_size=1,
        load_state_dict=load_state_dict,
        state_dict=state_dict,
        replica_id=f"replica_{given.replica}",
        store_addr="localhost",
        store_port=store.port,
        rank=0,
        world_size=1,
        lighthouse_addr=(given.folder / "lighthouse").read_text(),
        timeout=timedelta(seconds=30),
    )
    optimizer = Optimizer(manager, inner)
    stepped: list[bool] = []
    inner.register_step_post_hook(lambda *_: stepped.append(True))
    while True:
        optimizer.zero_grad()
        module(batch()).backward()
        # In one piece, where its DDP would: with gloo that one ends survivors by an assertion (0.2.0).
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        flat = parameters_to_vector(gradients)
        manager.allreduce(flat).wait()
        vector_to_parameters(flat, gradients)
        optimizer.step()  # does nothing unless all have agreed
        if stepped:
            stepped.clear()
            note(str(given.folder), given.replica, manager.current_step())


def measure() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=("ray-train", "lighthouse", "torchft"), required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--temp", help="of Ray: its path must be short")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--replica", type=int, default=0)
    parser.add_argument("--heartbeat-ms", type=int, default=5000, help="of the lighthouse: silence that means death")
    given = parser.parse_args()
    {"ray-train": ray_train, "lighthouse": lighthouse, "torchft": torchft_replica}[given.what](given)


if __name__ == "__main__":
    measure()
