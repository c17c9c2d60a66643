"""The plan as tables of text.  Pure Python."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

from ...attention.roles import SharedTensor
from ...attention.sla_config import compact_ranges
from ...common.tables import table
from .costs import Cost, Costs
from .figures import Figures
from .job import Job
from .predict import Prediction, Rates
from .suggest import Layout, VirtualStages
from .traffic import HopTraffic, RankMemory, Totals

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def report(figures: Figures) -> str:
    """Everything that ``sla-plan`` prints, as lines."""
    job, what = figures.job, figures.job.sla.shared_name
    parts = [summary(job)]
    if job.layout.num_stages == 1:
        parts.append("One pipeline stage: nothing crosses.")
    else:
        parts += [hop_table(job, figures.hops), rank_table(figures.ranks, what), totals_table(job, figures.totals)]
        parts.append(virtual_stage_table(job, figures.stages))
    parts.append(cost_table(job, figures.costs))
    if figures.prediction is not None:
        parts.append(step_lines(figures.prediction, figures.rates))
    if figures.layouts:
        parts.append(layout_table(figures.layouts))
    parts.append(assumptions(job, figures.rates is not None))
    return "\n\n".join(parts)


def summary(job: Job) -> str:
    """Model, skip-layer attention, layout and batch."""
    shape, layout, schedule = job.shape, job.layout, job.schedule
    sizes = sorted({len(stage) for stage in layout.stages})
    held = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    chunks = "1F1B" if layout.num_chunks == 1 else f"interleaved 1F1B, {layout.num_chunks} virtual stages a rank"
    lines = [
        f"Model: {layout.num_layers} layers{_kinds(job)}, hidden size {shape.hidden_size}, "
        f"{job.sla.num_query_groups} K/V groups of {job.work.head_size}, sequence {shape.sequence_length}, "
        f"microbatch {shape.microbatch_size}, "
        f"{job.element_bytes} bytes an element",
        f"SLA: {job.description}",
        f"GPUs: {job.num_gpus} = TP {shape.tensor_parallel_size} x CP {shape.context_parallel_size} x "
        f"PP {layout.pipeline_size} x DP {job.data_parallel_size}"
        + ("; sequence parallel" if shape.sequence_parallel else "")
        + (f"; a stage's experts over {job.expert_gpus}" if job.expert_gpus != shape.tensor_parallel_size else ""),
        f"Pipeline: {chunks}; {held} layers a stage; {schedule.num_microbatches} microbatches a step",
    ]
    return "\n".join(lines)


def _kinds(job: Job) -> str:
    return f" {job.pattern}, {job.sla.num_layers} of attention" if job.pattern else ""


def hop_table(job: Job, hops: Sequence[HopTraffic]) -> str:
    """One row a hop."""
    what = job.sla.shared_name
    rows = [
        (
            str(hop.hop),
            f"{hop.source_rank} -> {hop.target_rank}",
            in_units(hop.hidden_bytes),
            in_units(hop.kv_bytes),
            in_units(hop.payload_bytes),
            f"{hop.ratio:.3f}",
            crossing(hop.shared) or f"no {what}",
        )
        for hop in hops
    ]
    title = "Each hop, one microbatch, forward; the gradients that come back are as large"
    if len(job.tensor_ranks) > 1:
        title += f" ({what}: of the tensor-parallel rank that holds most; they differ)"
    whose = f"{'attention ' * bool(job.pattern)}layers: groups"
    if job.sla.share != "kv":
        whose = f"{what} of {whose}"
    return f"{title}\n" + table(("hop", "ranks", "hidden", what, "payload", "/ dense", whose), rows, left=(6,))


def rank_table(ranks: Sequence[RankMemory], what: str) -> str:
    """One row for neighbouring ranks that hold the same; ``what``: ``SLAConfig.shared_name``."""

    def row(one: RankMemory) -> tuple[str, ...]:
        return in_units(one.resident_bytes), str(one.arrival_buffers), in_units(one.arriving_kv_bytes)

    rows = [(compact_ranges([one.rank for one in same]), *cells) for cells, same in groupby(ranks, key=row)]
    title = "Each rank at its schedule's peak, beside what the dense model holds"
    return f"{title}\n" + table(("rank", f"resident {what}", "payloads waiting", f"{what} in them"), rows)


def totals_table(job: Job, totals: Totals) -> str:
    """Bytes of a pipeline over all hops, in both directions."""
    microbatches, what = job.schedule.num_microbatches, job.sla.shared_name

    def row(name: str, size: int) -> tuple[str, ...]:
        return name, in_units(size), in_units(size * microbatches), f"{size / totals.dense:.3f}"

    rows = [
        row("hidden states (dense)", totals.dense),
        row(f"with skip-layer {what}", totals.payload),
        row(f"  of which {what}", totals.kv),
        row(f"{what} relayed over every hop", totals.relayed),
        row("every hop as wide as the widest", totals.padded),
    ]
    title = "All hops, forward and backward, of one GPU's pipeline; the last two rows are ways not taken"
    return f"{title}\n" + table(("", "a microbatch", "a step", "/ dense"), rows, left=(0,))


def virtual_stage_table(job: Job, stages: Sequence[VirtualStages]) -> str:
    """Which numbers of virtual stages make what is shared local to its rank."""
    size, what = job.layout.pipeline_size, job.sla.shared_name
    if not stages:
        return f"Virtual stages: {job.layout.num_layers} layers do not split evenly over {size} ranks."
    rows = [
        (
            str(one.num_chunks) + ("*" if one.num_chunks == job.layout.num_chunks else ""),
            str(one.layers),
            "none: local to their rank" if one.kv_bytes == 0 else in_units(one.kv_bytes),
            "yes" if one.obstacle is None else f"no: {one.obstacle}",
        )
        for one in stages
    ]
    title = (
        f"Virtual stages a rank that split {job.layout.num_layers} layers evenly over PP {size} (* this run's number)"
        + (", with a | in the pattern after each" if job.pattern else "")
    )
    header = ("stages", "layers each", f"{what} on the wire a microbatch", "runs")
    return f"{title}\n" + table(header, rows, left=(2, 3))


def cost_table(job: Job, costs: Costs) -> str:
    """The model beside the dense one, with the projections that nobody reads and without."""

    def row(name: str, of: Callable[[Cost], int | None], shown: Callable[[int], str]) -> tuple[str, ...]:
        dense, *others = map(of, (costs.dense, costs.full, costs.pruned))
        return name, shown(dense), *(cell for one in others for cell in (shown(one), f"{one / dense:.3f}"))

    rows = [
        row("operations a token, forward", lambda cost: cost.operations, in_counts),
        row("K/V kept for a token in generation", lambda cost: cost.cache_bytes, in_units),
    ]
    if costs.dense.parameters is not None:
        rows.insert(0, row("parameters", lambda cost: cost.parameters, in_counts))
    if costs.dense.wire_bytes:
        rows.append(row("on the wire a microbatch", lambda cost: cost.wire_bytes, in_units))
    names = [f"{name}{'*' * (name == job.sla.kv_projection)}" for name in ("full", "pruned")]
    title = "Beside the dense model, with K/V projections that nobody reads and without (* this run's)"
    return f"{title}\n" + table(("", "dense", names[0], "/ dense", names[1], "/ dense"), rows, left=(0,))


def step_lines(prediction: Prediction, rates: Rates) -> str:
    """The simulated step."""
    sla, dense = prediction.sla, prediction.dense
    lines = [
        f"Predicted step at {rates.link_bytes / 1e9:g} GB/s{' one way at a time' * rates.half_duplex}, "
        f"{rates.link_latency * 1e6:g} us and "
        f"{rates.operations / 1e12:g} TFLOP/s a GPU",
    ]
    rows = []
    for name, one in (("dense", dense), ("SLA", sla)):
        transfer = one.durations.transfer or (0.0,)
        rows.append(
            (
                name,
                in_seconds(one.step_time),
                f"{100 * one.busy:.1f} %",
                _span(one.durations.forward),
                _span(one.durations.backward),
                _span(transfer),
            )
        )
    header = ("", "step", "computing", "forward of a stage", "backward of a stage", "transfer of a hop")
    lines.append(table(header, rows, left=(0,)))
    lines.append(f"Predicted step-time overhead: {100 * prediction.overhead:+.2f} %")
    return "\n".join(lines)


def layout_table(layouts: Sequence[Layout]) -> str:
    """The ranking of layouts."""
    has_rates, what = layouts[0].prediction is not None, layouts[0].job.sla.shared_name
    rows = []
    for place, one in enumerate(layouts, 1):
        layout = one.job.layout
        row = [
            f"{place}{'*' if one.is_given else ''}",
            str(layout.pipeline_size),
            str(layout.num_chunks),
            str(one.job.data_parallel_size),
            str(one.job.schedule.num_microbatches),
            in_units(one.totals.kv),
            in_units(one.resident_bytes),
        ]
        if has_rates:
            row += [in_seconds(one.prediction.sla.step_time), f"{100 * one.prediction.overhead:+.2f} %"]
        rows.append(tuple(row))
    header = ("place", "PP", "stages a rank", "DP", "microbatches")
    header += (f"{what} on the wire a microbatch", f"most resident {what}")
    by = "step time" if has_rates else f"{what} on the wire, then resident {what}"
    title = f"Layouts of two pipeline ranks or more, by {by} (* this run's); memory for weights is not weighed"
    pattern = layouts[0].job.pattern
    first = f"\nThe first: --hybrid-layer-pattern={shlex.quote(pattern)}" if pattern else ""
    return f"{title}\n" + table(header + (("step", "overhead") if has_rates else ()), rows) + first


def assumptions(job: Job, simulated: bool) -> str:
    """What the figures hold and what they do not."""
    what = job.sla.shared_name
    lines = [
        "Bytes are exact, and those of one GPU: the transport allocates by the same code.",
        f"Resident {what} include the gradients that wait to be collected for them.",
    ]
    if simulated:
        lines += [
            "The step follows from the two rates: GPUs and links are alike, and no transfer slows another rank's.",
            "Tensor- and context-parallel communication is in the compute rate.",
            "A backward pass is twice its forward pass and what it recomputes.",
            "Not modelled: gradient reduction, optimizer, data loading, embeddings, copies that pack and unpack "
            f"{what}.",
            "Interleaved transfers meet compute as upstream's do: what arrives overlaps, what leaves is waited for.",
        ]
        if job.pattern and set(job.pattern) & set(job.work.mixers):
            lines.append(
                "Mamba layers and gated delta networks are as much work as Megatron's throughput figure counts."
            )
        if not job.work.vocabulary:
            lines.append("Not modelled: the output layer, whose size no flag tells (--vocab-size would).")
    return "\n".join(lines)


def crossing(shared: Iterable[tuple[SharedTensor, tuple[int, ...]]]) -> str:
    """``1-3: 1-3,5-7``: source layers and groups, one part for each set of groups.

    What several layers read names them: ``1: 1,3 for 2-12``.
    """
    layers_of: dict[str, list[int]] = {}
    for each, groups in shared:
        readers = f" for {compact_ranges(each.readers)}" if len(each.readers) > 1 else ""
        layers_of.setdefault(f"{compact_ranges(groups)}{readers}", []).append(each.source)
    return "; ".join(f"{compact_ranges(layers)}: {groups}" for groups, layers in layers_of.items())


def in_units(size: int) -> str:
    """``1536`` as ``1.50 KiB``."""
    scaled, unit = float(size), 0
    while scaled >= 1024 and unit < len(_UNITS) - 1:
        scaled, unit = scaled / 1024, unit + 1
    return f"{size} B" if unit == 0 else f"{scaled:.2f} {_UNITS[unit]}"


def in_counts(count: int) -> str:
    """``1536`` as ``1.54k``; M are millions, B billions, T trillions."""
    for factor, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= factor:
            return f"{count / factor:.2f}{unit}"
    return str(count)


def in_seconds(seconds: float) -> str:
    """Seconds, or milliseconds or microseconds where there are fewer."""
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3f} {unit}"
    return f"{seconds * 1e6:.1f} us"


def _span(values: Sequence[float]) -> str:
    least, most = in_seconds(min(values)), in_seconds(max(values))
    return least if least == most else f"{least} .. {most}"
