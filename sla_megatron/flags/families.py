"""What a family of Megatron's flags is, for the table in ``support.py``; and those of which nothing works.

Why not is not here: the refusal says so itself.  Pure data.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Flags that a user turns on for one purpose.

    Attributes:
        name: the purpose.
        flags: command lines, each of which turns it on; variables of the environment, ``NAME=value``, come first.
        tests: ``file::function``, which show that it works.
        gpu_checks: the same of what only a GPU can show, and no GPU has yet.
        limits: command lines of the family that are refused; where nothing of it works, these are ``flags``.
    """

    name: str
    flags: tuple[str, ...]
    tests: tuple[str, ...] = ()
    gpu_checks: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()

    @property
    def is_refused(self) -> bool:
        """Whether nothing of it works."""
        return not (self.tests or self.gpu_checks)

    @property
    def accepted(self) -> tuple[str, ...]:
        """Command lines that are accepted beside ``--sla``."""
        return () if self.is_refused else self.flags

    @property
    def refused(self) -> tuple[str, ...]:
        """Command lines that are refused beside ``--sla``."""
        return self.flags if self.is_refused else self.limits


#: Flags that a Megatron of this project's range lacks, it has them from 0.20 on or in the branch dev alone; and whether
#: they have values.
OF_OTHER_VERSIONS = {
    "--enable-mhc-connections": False,
    "--enable-hyper-connections": False,
    "--head-wise-attn-gate": False,
    "--rotary-base-per-layer": True,
    "--moe-n-hash-layers": True,
    "--dynamic-context-parallel": False,
    "--sequence-packing-scheduler": True,
    "--use-varlen-dataset": False,
    "--pad-packed-seq-alignment": True,
    "--sft-mock-dataset-config-json": True,
}

#: At most five: a test counts.
REFUSED = (
    Family(
        "layers of another kind",
        (
            "--multi-latent-attention --q-lora-rank 8",
            "--linear-attention-freq 2",
            "--experimental-attention-variant dsa",
            "--qk-clip",
            "--heterogeneous-layers-config-path layers.json",
            "--heterogeneous-layers-config-encoded-json {}",
            "--enable-mhc-connections",
            "--enable-hyper-connections",
            "--head-wise-attn-gate",
            "--rotary-base-per-layer 1e4 1e4 1e4 1e4",
            "--moe-n-hash-layers 1",
        ),
    ),
    Family(
        "Megatron-side generation, reinforcement learning",
        ("--perform-rl-step", "--transformer-impl inference_optimized"),
    ),
    Family(
        "what trains a GPT on something else than text or conversations",
        (
            "--fim-data",
            "--logits-load-dir logits",
            "--per-dataset-sequences-path sequences.json",
            "--dataloader-type external",
            "--titles-data-path titles",
            "--vision-pretraining",
            "--dynamic-context-parallel",
            "--sequence-packing-scheduler dp_balanced",
            "--use-varlen-dataset",
            "--pad-packed-seq-alignment 8",
            "--sft-mock-dataset-config-json {}",
        ),
    ),
)

#: Groups of Megatron's parser of which no row has a flag, by their titles.
UNTESTED = (
    "profiling",
    "autoresume",
    "straggler",
    "workload inspector",
    "inference",
    "Transformer-Engine",
    "one logger",
    "ft_package",
    "rerun engine",
    "msc",
    "fault injector",
)
