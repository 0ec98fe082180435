"""The plan: the ZeRO paper's table, verdicts, the nearest change, and that it is a pure function."""

from __future__ import annotations

import json
import re
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from windlass.dist.cluster import ClusterConfig
from windlass.dist.errors import PlanError
from windlass.dist.mesh import ParallelismConfig
from windlass.launch import cli
from windlass.launch.config import CONFIGS, load_job
from windlass.launch.job import JobConfig
from windlass.launch.nearest import nearest_change
from windlass.launch.plan import DOES_NOT_FIT, FITS, UNKNOWN, Planner, make_plan
from windlass.launch.plan_view import show_bytes
from windlass.model.build import build_model, materialise
from windlass.model.config import ModelConfig
from windlass.parallel.activation import ActivationConfig
from windlass.parallel.footprint import measure_footprint
from windlass.parallel.memory import MODEL_STATES, plan_gathers
from windlass.parallel.pipeline.policy import PipelineConfig
from windlass.parallel.precision import PrecisionConfig
from windlass.parallel.units import ALIGN, plan_units
from windlass.parallel.zero import ZeroConfig

UNKNOWN_CLUSTER = ClusterConfig()
SMALL = ModelConfig(vocab_size=512, hidden_size=64, num_layers=3, num_heads=2, loss_chunk_tokens=64)


def small_job(**changes: object) -> JobConfig:
    job = JobConfig(model=SMALL)
    return replace(job, train=replace(job.train, seq_len=64, micro_batch=2, device="cpu"), **changes)  # type: ignore[arg-type]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        cli.main(list(arguments))
    out = capsys.readouterr()
    return int(left.value.code or 0), out.out, out.err


def test_the_table_of_the_zero_paper_is_reproduced() -> None:
    config = load_job("zero-7.5b").config
    planner = Planner(config)
    plans = [
        planner.plan(replace(config, zero=ZeroConfig(stage)), 64, UNKNOWN_CLUSTER, activations=False)
        for stage in range(4)
    ]
    assert [show_bytes(p.model_state_bytes) for p in plans] == ["120 GB", "31.4 GB", "16.6 GB", "1.9 GB"]
    assert all(abs(p.num_parameters - 7.5e9) < 1e7 for p in plans)


def test_the_command_prints_the_table_of_the_zero_paper(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", "zero-7.5b", "--world", "64", "--stages")
    assert code == 0
    rows = [line for line in out.splitlines() if line.strip()[:1] in set("0123") and "Psi" in line]
    for row, states in zip(rows, ("120 GB", "31.4 GB", "16.6 GB", "1.9 GB"), strict=True):
        assert states in row


@settings(max_examples=30)
@given(
    ranks=st.sampled_from([1, 2, 3, 8, 64]),
    accumulate=st.sampled_from([1, 3]),
    stage=st.integers(0, 3),
    reshard=st.sampled_from(["each", "turnaround", "never"]),
)
def test_traffic_follows_the_formulas_of_zero(ranks: int, accumulate: int, stage: int, reshard: str) -> None:
    job = small_job(zero=ZeroConfig(stage, reshard))
    job = replace(job, train=replace(job.train, global_batch=2 * ranks * accumulate))
    plan = PLANNER.plan(job, ranks, UNKNOWN_CLUSTER, activations=False)
    psi = sum(u.padded for u in plan.units)
    assert plan.num_micro_batches == accumulate
    if ranks == 1:
        assert plan.elements_per_step == 0 and not plan.traffic
    elif stage < 2:
        assert plan.elements_per_step == 2 * psi
    elif stage == 2:
        assert plan.elements_per_step == (1 + accumulate) * psi
    elif reshard == "each":
        assert plan.elements_per_step == 3 * accumulate * psi
    elif reshard == "never":
        assert plan.elements_per_step == 2 * accumulate * psi
    else:
        assert 2 * accumulate * psi < plan.elements_per_step < 3 * accumulate * psi


PLANNER = Planner(small_job())


@given(ranks=st.integers(1, 300))
def test_padding_is_less_than_a_cache_line_per_parameter_and_shard(ranks: int) -> None:
    plan = plan_units(build_model(SMALL), ranks)
    for unit in plan.units:
        assert unit.padded % (ALIGN * ranks) == 0
        assert unit.numel <= unit.padded < unit.numel + ALIGN * (ranks + len(unit.parameters))


def test_a_higher_stage_never_holds_more_model_state() -> None:
    sizes = [
        PLANNER.plan(small_job(zero=ZeroConfig(s)), 8, UNKNOWN_CLUSTER, activations=False).model_state_bytes
        for s in range(4)
    ]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4


def test_fp32_keeps_no_second_copy_of_the_weights() -> None:
    held = PLANNER.plan(small_job(), 2, UNKNOWN_CLUSTER, activations=False).bytes["device"]
    assert held.get("master", 0) == 0
    assert held["param"] == held["grad"] == held["exp_avg"] == held["exp_avg_sq"]


def test_without_resharding_every_unit_is_gathered_once_and_all_are_held() -> None:
    units = plan_units(build_model(SMALL), 2)
    never, each = (plan_gathers(units, ZeroConfig(3, reshard)) for reshard in ("never", "each"))
    assert sorted(never.units) == list(range(len(units.units)))
    assert sorted(each.units) == sorted([*range(len(units.units))] * 2)
    assert sum(n * c for n, c in never.buffers.items()) == sum(u.padded for u in units.units)
    assert sum(n * c for n, c in each.buffers.items()) < sum(u.padded for u in units.units)


def test_the_plan_is_pure_and_its_digest_tells_plans_apart() -> None:
    job = small_job()
    first, again = make_plan(job, 2, UNKNOWN_CLUSTER), make_plan(job, 2, UNKNOWN_CLUSTER)
    assert first == again and first.digest() == again.digest()
    others = [
        make_plan(job, 4, UNKNOWN_CLUSTER),
        make_plan(replace(job, zero=ZeroConfig(1)), 2, UNKNOWN_CLUSTER),
        make_plan(replace(job, train=replace(job.train, seq_len=32)), 2, UNKNOWN_CLUSTER),
    ]
    assert len({p.digest() for p in [first, *others]}) == 4
    assert json.loads(json.dumps(first.as_json()))["world_size"] == 2


def test_the_verdict_compares_with_the_device_or_the_share_of_the_host() -> None:
    job = small_job()
    need = make_plan(job, 2, UNKNOWN_CLUSTER).device_bytes
    assert make_plan(job, 2, UNKNOWN_CLUSTER).verdict == UNKNOWN
    assert make_plan(job, 2, ClusterConfig(device_bytes=2 * need)).verdict == FITS
    assert make_plan(job, 2, ClusterConfig(device_bytes=need)).verdict == DOES_NOT_FIT
    assert make_plan(job, 2, ClusterConfig(host_bytes=3 * need)).verdict == FITS
    assert make_plan(job, 4, ClusterConfig(host_bytes=3 * need)).verdict == DOES_NOT_FIT
    assert make_plan(job, 4, ClusterConfig(nodes=2, host_bytes=3 * need)).verdict == FITS


def test_the_nearest_change_is_the_least_that_fits() -> None:
    config = load_job("pretrain-7b", ["zero.stage=1", "activation.policy=keep", "parallelism.dp_replicate=1"]).config
    config = replace(config, parallelism=replace(config.parallelism, dp_shard=-1))
    planner = Planner(config)

    def cluster_for(wanted: JobConfig) -> ClusterConfig:
        return ClusterConfig(
            device_bytes=int(planner.plan(wanted, 64, UNKNOWN_CLUSTER, "cuda").device_bytes / 0.95) + 1
        )

    stage2 = replace(config, zero=ZeroConfig(2))
    recompute = replace(config, activation=ActivationConfig("recompute"), zero=ZeroConfig(3))
    smaller = replace(recompute, train=replace(config.train, micro_batch=1))
    for wanted, overrides in (
        (stage2, ["zero.stage=2"]),
        (recompute, ["zero.stage=3", "activation.policy=recompute"]),
        (smaller, ["zero.stage=3", "activation.policy=recompute", "train.micro_batch=1"]),
    ):
        change = nearest_change(config, 64, cluster_for(wanted), "cuda")
        assert change is not None
        assert (change.overrides, change.world_size, change.plan.verdict) == (overrides, 64, FITS)
        assert change.plan.sequences_per_step == 1024
    least = cluster_for(smaller).device_bytes
    change = nearest_change(config, 64, ClusterConfig(device_bytes=int(0.9 * least)), "cuda")
    assert change is not None and change.world_size > 64
    assert nearest_change(config, 64, ClusterConfig(device_bytes=10**9), "cuda") is None


def test_the_command_says_what_would_fit_and_exits_with_3(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("device_bytes: 40GB\n")
    arguments = ["plan", "zero-7.5b", "--world", "64", "--cluster", str(cluster)]
    code, out, _ = run(capsys, *arguments)
    assert code == 3 and "does not fit" in out and "Nearest change that fits: zero.stage=1" in out
    code, out, _ = run(capsys, *arguments, "zero.stage=1")
    assert code == 0 and "Verdict: fits" in out
    code, out, _ = run(capsys, *arguments, "--json")
    assert code == 3
    assert json.loads(out)["nearest_change"] == {"overrides": ["zero.stage=1"], "world_size": 64}


def test_a_mesh_that_does_not_divide_is_an_error_before_anything_is_built(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "plan", "zero-7.5b", "--world", "6", "zero.stage=1", "parallelism.dp_shard=4")
    assert code == PlanError.exit_code and "6 ranks" in err


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_job_plans(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_job(path).config
    devices = config.cluster.nodes * config.cluster.devices_per_node
    plan = make_plan(config, devices or config.launch.workers, config.cluster)
    assert plan.verdict in (FITS, UNKNOWN) and plan.device_bytes > plan.model_state_bytes
    assert sum(n for held in plan.bytes.values() for name, n in held.items() if name in MODEL_STATES) > 0
    assert set(plan.bytes) == {"device", "host", "nvme"}


# -- pipelines --------------------------------------------------------------------------------------------------------


def pipelined(schedule: str = "1f1b", vocab: str = "off", batch: int = 32, **changes: object) -> JobConfig:
    """Two pipeline ranks; on four ranks and with a batch of 32, eight micro-batches."""
    changes = {"parallelism": ParallelismConfig(pp=2), "pipeline": PipelineConfig(schedule, vocab)} | changes
    job = small_job(model=replace(SMALL, num_layers=4), **changes)
    return replace(job, train=replace(job.train, global_batch=batch))


@pytest.mark.parametrize("vocab", ["off", "2"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_ranks_of_a_pipeline_share_the_model(vocab: str, tied: bool) -> None:
    job = pipelined(vocab=vocab)
    job = replace(job, model=replace(job.model, tie_embeddings=tied))
    plan, alone = (
        make_plan(job, 4, UNKNOWN_CLUSTER),
        make_plan(replace(job, parallelism=ParallelismConfig()), 2, UNKNOWN_CLUSTER),
    )
    assert plan.num_parameters == alone.num_parameters == sum(rank.num_parameters for rank in plan.ranks)
    assert plan.num_trainable == plan.num_parameters and plan.num_micro_batches == alone.num_micro_batches == 8
    assert [rank.stages for rank in plan.ranks] == [[(0, 2)], [(2, 4)]]
    assert [rank.vocabulary for rank in plan.ranks] == ([(0, 256), (256, 512)] if vocab == "2" else [None, None])
    assert (plan.sequences_per_step, plan.tokens_per_step) == (32, 32 * 64)
    assert plan.flops_per_step == pytest.approx(alone.flops_per_step / 2)
    assert alone.pipeline is None and len(alone.ranks) == 1 and alone.ranks[0].bytes == alone.bytes["device"]


def test_the_fullest_rank_of_a_pipeline_decides() -> None:
    plan = make_plan(pipelined(), 4, UNKNOWN_CLUSTER)
    sizes = [sum(rank.bytes.values()) for rank in plan.ranks]
    assert plan.device_bytes == max(sizes) > min(sizes)
    assert (
        plan.worst_rank == 2 * sizes.index(max(sizes)) and plan.traffic == plan.ranks[sizes.index(max(sizes))].traffic
    )
    assert make_plan(pipelined(), 4, ClusterConfig(device_bytes=int(max(sizes) / 0.95) + 1)).verdict == FITS
    assert make_plan(pipelined(), 4, ClusterConfig(device_bytes=max(sizes))).verdict == DOES_NOT_FIT


def test_activations_of_a_pipeline_grow_with_what_is_in_flight() -> None:
    first, last = (rank.bytes["activation"] for rank in make_plan(pipelined(), 4, UNKNOWN_CLUSTER).ranks)
    alone = make_plan(replace(pipelined(), parallelism=ParallelismConfig()), 2, UNKNOWN_CLUSTER)
    block = (
        measure_footprint(build_model(SMALL), ActivationConfig(), micro_batch=2, seq_len=64, dtype=torch.float32)
        .parts[1]
        .kept
    )
    assert 2 * 2 * block < first < 2.2 * 2 * block  # two blocks of two micro-batches, and messages
    assert 2 * block < last < alone.bytes["device"]["activation"]
    gpipe = make_plan(pipelined("gpipe"), 4, UNKNOWN_CLUSTER)
    assert gpipe.ranks[0].bytes["activation"] > 3 * first
    assert gpipe.ranks[0].in_flight == 8 and gpipe.ranks[0].bytes["context"] == 8 * alone.bytes["device"]["context"]
    again = make_plan(pipelined("gpipe", activation=ActivationConfig("recompute")), 4, UNKNOWN_CLUSTER)
    assert again.ranks[0].bytes["activation"] < 0.5 * gpipe.ranks[0].bytes["activation"]


def test_a_chunk_of_the_vocabulary_bounds_the_scores() -> None:
    whole = pipelined(vocab="2", precision=PrecisionConfig("bf16"))
    chunked = replace(whole, pipeline=replace(whole.pipeline, vocab_chunk=32))
    held = [make_plan(job, 4, UNKNOWN_CLUSTER).bytes["device"] for job in (whole, chunked)]
    assert held[1]["workspace"] < held[0]["workspace"] and held[1]["activation"] < held[0]["activation"]


def test_plans_of_pipelines_differ_where_their_actions_do() -> None:
    one, other = (make_plan(pipelined(name), 4, UNKNOWN_CLUSTER, activations=False) for name in ("1f1b", "gpipe"))
    assert one.digest() != other.digest()
    lists = [plan.as_json()["pipeline"]["schedule"]["ranks"] for plan in (one, other)]
    assert lists[0][0][:2] == ["0F0", "0SEND_F0"] and lists[0] != lists[1]
    json.dumps(one.as_json())


def test_a_choice_does_not_depend_on_what_a_machine_detects_about_itself() -> None:
    job = pipelined("auto", "auto")
    plans = [
        make_plan(job, 4, cluster, activations=False)
        for cluster in (ClusterConfig(), ClusterConfig(device_flops=1e9, device_bytes=10))
    ]
    assert plans[0].pipeline == plans[1].pipeline


def test_too_few_micro_batches_are_noted_with_a_batch_that_is_enough() -> None:
    lonely = make_plan(pipelined(vocab="2", batch=4), 4, UNKNOWN_CLUSTER, activations=False)
    assert lonely.num_micro_batches == 1
    found = re.match(
        r"the pipeline is idle for (\d+)% of a step of 1 micro-batch; with train.global_batch=(\d+)", lonely.notes[0]
    )
    assert found is not None and int(found[1]) >= 40
    enough = make_plan(pipelined(vocab="2", batch=int(found[2])), 4, UNKNOWN_CLUSTER, activations=False)
    assert enough.pipeline is not None and enough.pipeline.mean_idle < 0.1 and enough.notes == ["activations left out"]


def test_a_pipeline_that_no_cut_makes_fit_is_refused_by_the_cluster_of_the_job() -> None:
    job = pipelined(cluster=ClusterConfig(device_bytes=10**9))
    assert make_plan(job, 4, job.cluster).verdict == FITS
    with pytest.raises(PlanError, match=r"pipeline rank \d with 2 blocks does not fit"):
        make_plan(replace(job, cluster=ClusterConfig(device_bytes=632 * 2**20)), 4, UNKNOWN_CLUSTER)


def test_the_command_shows_every_pipeline_rank(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", "pipeline-vocab")
    assert code == 0 and "vhalf with vocabulary algorithm 2: as asked for" in out and "pp 2 x dp_shard 2" in out
    table = [line.split() for line in out.splitlines() if "(2048)" in line]
    assert [row[:5] for row in table] == [["0", "0,", "3", "0-2047", "(2048)"], ["1", "1,", "2", "2048-4095", "(2048)"]]
    assert all(row[-1].endswith("%") for row in table) and "pipeline STATS" in out
    code, out, _ = run(capsys, "plan", "pipeline-vocab", "pipeline.vocab=off", "pipeline.schedule=auto", "zero.stage=3")
    assert (
        code == 0 and re.search(r"of 5 (choices|simulated steps)", " ".join(out.split())) and "with the stages" in out
    )
    code, out, _ = run(capsys, "plan", "pipeline-vocab", "--stages")
    assert code == 0 and "ZeRO stages" in out


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["parallelism.pp=8", "--world", "8"],
            "4 blocks and every pipeline rank needs one. Use parallelism.pp=4 or less",
        ),
        (["pipeline.schedule=zbv", "model.num_layers=3"], "Use pipeline.schedule=gpipe or 1f1b or zb1p"),
        (["pipeline.cut=[3, 1]"], "vhalf has 4 stages"),
        (["model.vocab_size=1"], "vocabulary of 1 rows"),
    ],
)
def test_a_pipeline_that_cannot_be_is_one_line(
    overrides: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, "plan", "pipeline-vocab", *overrides)
    assert code == PlanError.exit_code and words in err and err.count("\n") == 1


def test_a_custom_model_without_the_parts_keeps_its_vocabulary_whole() -> None:
    model = replace(SMALL, num_layers=4, kind="custom", factory="tests.unit.test_plan:build_plain")
    job = replace(pipelined("1f1b", "auto"), model=model)
    plan = make_plan(job, 4, UNKNOWN_CLUSTER, activations=False)
    assert plan.pipeline is not None and plan.pipeline.schedule.layout.vocab == 0
    with pytest.raises(PlanError, match=r"no head\.norm.*Use pipeline\.vocab=off"):
        make_plan(replace(job, pipeline=PipelineConfig("1f1b", "2")), 4, UNKNOWN_CLUSTER, activations=False)


def build_plain(config: ModelConfig) -> object:
    model = build_model(replace(config, kind="decoder", factory=None))
    del model.head.norm
    return model


# -- activations ------------------------------------------------------------------------------------------------------


class Kept:
    """Counts the bytes of real tensors that autograd saves, parameters and inputs left out."""

    def __init__(self, ignored: list[torch.Tensor]) -> None:
        self._ignored = {t.untyped_storage().data_ptr() for t in ignored}
        self.storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.bytes: dict[int, int] = {}

    def __enter__(self) -> Kept:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)  # type: ignore[arg-type]

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._ignored:
            self.bytes[storage.data_ptr()] = storage.nbytes()
        return tensor


@pytest.mark.parametrize("model", [SMALL, replace(SMALL, norm="layernorm", mlp="gelu_tanh", positions="learned")])
@pytest.mark.parametrize("seq_len", [64, 384])
def test_the_footprint_of_a_block_is_what_autograd_really_keeps(model: ModelConfig, seq_len: int) -> None:
    rows, width = 2, model.hidden_size
    planned = measure_footprint(
        build_model(model), ActivationConfig(), micro_batch=rows, seq_len=seq_len, dtype=torch.float32
    )
    real = build_model(model)
    materialise(real, lambda name, start, stop, out: out.normal_(std=0.02).__class__, torch.float32)
    positions_BT = torch.arange(seq_len).expand(rows, seq_len).contiguous()
    context = real.context(positions_BT, (positions_BT >= seq_len // 2).long(), torch.float32)
    h = torch.randn(rows, seq_len, width, requires_grad=True)
    block: nn.Module = real.blocks[0]
    ignored = [h, *block.parameters(), *tensors(context)]
    with Kept(ignored) as kept:
        out = block(h, context)
    measured = sum(kept.bytes.values()) + out.untyped_storage().nbytes()
    assert planned.parts[1].output == out.nbytes
    assert abs(planned.parts[1].kept - measured) <= 0.1 * measured


def tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    members = value if isinstance(value, (list, tuple)) else vars(value).values() if hasattr(value, "__dict__") else []
    return [t for member in members for t in tensors(member)]


def test_recomputing_keeps_block_inputs_only_and_pays_with_one_block_at_a_time() -> None:
    keep, recompute = (
        measure_footprint(build_model(SMALL), ActivationConfig(policy), micro_batch=2, seq_len=64, dtype=torch.bfloat16)
        for policy in ("keep", "recompute")
    )
    block = keep.parts[1]
    assert keep.kept - recompute.kept == SMALL.num_layers * (block.kept - block.output)
    assert recompute.workspace <= keep.workspace + block.kept


def test_a_part_that_looks_at_values_makes_activations_unknown_not_the_plan() -> None:
    job = replace(small_job(), model=replace(SMALL, kind="custom", factory="tests.unit.test_plan:build_curious"))
    plan = make_plan(job, 2, ClusterConfig(device_bytes=10**12))
    assert plan.verdict == UNKNOWN and "without values" in plan.notes[0]
    assert "activation" not in plan.bytes["device"] and sum(plan.bytes["device"].values()) > 0


class CuriousBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(64))

    def forward(self, h: torch.Tensor, context: object) -> torch.Tensor:
        return h * self.weight if bool((h > 0).any()) else h


def build_curious(config: ModelConfig) -> object:
    model = build_model(SMALL)
    model.blocks = nn.ModuleList([CuriousBlock()])  # type: ignore[misc]
    return model
