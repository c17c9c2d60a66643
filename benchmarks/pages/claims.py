"""What skip-layer attention brings and costs: a line a claim, with the worst figure of all rows that it holds for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..plan_steps import AIM as PLAN_AIM
from ..record import Table
from . import figures
from .evidence import Result, device, is_on_gpu
from .figures import COUNTED, Figure
from .sections import (
    CONVERSION,
    DATATROVE,
    ENCODER,
    GENERATION,
    LOSS,
    PIPELINES,
    PLAN,
    RECOVERY,
    SWEEPS,
    TRAINING,
    VISION,
    Section,
    page_of,
)

NOT_MEASURED, NO_GPU = "not measured", "uses no GPU"


@dataclass(frozen=True)
class Aim:
    """What a figure should be: in words, and whether one is; ``None`` where it is too few to say."""

    text: str
    is_reached: Callable[[Figure], bool | None]


@dataclass(frozen=True)
class Claim:
    """One line.

    Attributes:
        title: what the figure is, of what.
        section: with the rows.
        sources: benchmark -> what its results have for the claim.
        aim: ``None`` if there is none.
        badness: of a figure's value: the row that has most of it is shown.
        files: words of files' names, such as ``questions``: of the first that has several seeds, those alone.
    """

    title: str
    section: Section
    sources: Mapping[str, Callable[[Result], list[Figure]]]
    aim: Aim | None = None
    badness: Callable[[float], float] = float
    files: tuple[str, ...] = ()

    def cells(self, results: Mapping[Path, Result]) -> tuple[str, str, str, str, str]:
        """Of the table: title, CPU, GPU, aim, whether it is reached."""
        on_cpu, on_gpu = (self._figures(results, on_gpu) for on_gpu in (False, True))
        shown = [self._worst(on_cpu), self._worst(on_gpu)]
        if not on_gpu and not self.section.on_gpu:
            shown[1] = NO_GPU
        reached = [self._reached("CPU", on_cpu), self._reached("GPU", on_gpu)]
        aim = self.aim.text if self.aim else "none"
        return f"[{self.title}](results/{page_of(self.section)})", *shown, aim, "; ".join(filter(None, reached))

    def is_measured(self, results: Mapping[Path, Result]) -> bool:
        """Whether a result on a CPU has a figure."""
        return bool(self._figures(results, on_gpu=False))

    def _figures(self, results: Mapping[Path, Result], on_gpu: bool) -> list[tuple[Figure, Result]]:
        found = {
            path: [(figure, result) for figure in self.sources[path.stem.split("-")[0]](result)]
            for path, result in results.items()
            if path.stem.split("-")[0] in self.sources and is_on_gpu(result) == on_gpu
        }
        if not self.files:
            return [each for its in found.values() for each in its]
        by_word = [[e for p, its in found.items() if w in p.stem.split("-") for e in its] for w in self.files]
        # A grid that has only begun has one seed.
        with_interval = (its for its in by_word if any(figure.most is not None for figure, _ in its))
        return next(with_interval, next(filter(None, by_word), []))

    def _worst(self, found: list[tuple[Figure, Result]]) -> str:
        """Figure, of how many, on what; of a counted one, whose rows are exact, the best too."""
        if not found:
            return NOT_MEASURED
        by_badness = sorted(found, key=lambda each: self.badness(each[0].value))
        (best, _), (worst, result) = by_badness[0], by_badness[-1]
        text = worst.text
        if worst.sample == COUNTED and best.text != worst.text:
            text += f", best {best.text}"
        return f"{text}; {worst.sample}; {device(result)}"

    def _reached(self, where: str, found: list[tuple[Figure, Result]]) -> str:
        """``CPU yes, 9 of 9 rows``; empty where there is no aim, or too little to say."""
        said = [self.aim.is_reached(figure) for figure, _ in found] if self.aim else []
        holds = [each for each in said if each is not None]
        if not holds:
            return ""
        count = f", {sum(holds)} of {len(holds)} rows" if len(holds) > 1 else ""
        return f"{where} {'yes' if all(holds) else 'no'}{count}"


def at_least(limit: float) -> Aim:
    """Of a ratio."""
    return Aim(f"≥ {limit:.2f}", lambda figure: figure.value >= limit)


def at_most(limit: float) -> Aim:
    """Of a ratio."""
    return Aim(f"≤ {limit:.2f}", lambda figure: figure.value <= limit)


BELOW_DENSE = Aim("interval below 0", lambda figure: None if figure.most is None else figure.most < 0)
AS_PLANNED = Aim("exactly the formula's", lambda figure: figure.as_planned)
NEAR_PLAN = Aim(f"{1 - PLAN_AIM:.2f} to {1 + PLAN_AIM:.2f}", lambda figure: abs(figure.value - 1) <= PLAN_AIM)


def lowest(value: float) -> float:
    """Less is worse."""
    return -value


def _loss(title: str, text: str | None, *files: str) -> Claim:
    """Of the default setting in sweeps of ``text``, or of all."""
    return Claim(title, SWEEPS, {"sweep": partial(figures.loss_of_sweep, text=text)}, BELOW_DENSE, files=files)


BRINGS = (
    _loss("loss minus dense's, nats a token: code", "code", "questions", "methods"),
    _loss("the same: prose", "prose", "questions"),
    _loss("the same: a larger model, code and prose", None, "larger"),
    _loss("the same: twice the tokens, a longer context too", None, "longer"),
    Claim("the same: a short run of one seed", LOSS, {"loss": figures.loss_of_run}, BELOW_DENSE),
    Claim(
        "an encoder's masked loss minus dense's",
        ENCODER,
        {"encoder": partial(figures.over_seeds, quantity="loss")},
    ),
    Claim(
        "accuracy on images minus dense's",
        VISION,
        {"vision": partial(figures.over_seeds, quantity="accuracy")},
        badness=lowest,
    ),
    Claim("cache of keys and values, bytes / dense's", GENERATION, {"generation": figures.cache}, AS_PLANNED),
)

COSTS = (
    Claim(
        "training speed / dense's, `pruned`",
        TRAINING,
        {"throughput": partial(figures.speed, variant="pruned")},
        at_least(1.00),
        lowest,
    ),
    Claim(
        "training speed / dense's, `full`",
        TRAINING,
        {"throughput": partial(figures.speed, variant="full")},
        at_least(0.99),
        lowest,
    ),
    Claim(
        "the same in a pipeline, either",
        TRAINING,
        {"throughput": partial(figures.speed, variant="any", pipelined=True)},
        badness=lowest,
    ),
    Claim("peak memory of training / dense's", TRAINING, {"throughput": figures.peak}, at_most(1.02)),
    Claim("bytes between a pipeline's stages / dense's", PIPELINES, {"transport": figures.wire}, AS_PLANNED),
    Claim(
        "decoding speed / dense's, GPT-2 124M",
        GENERATION,
        {"generation": partial(figures.decoding, narrow=False)},
        at_least(1.00),
        lowest,
    ),
    Claim(
        "the same, a tiny model",
        GENERATION,
        {"generation": partial(figures.decoding, narrow=True)},
        at_least(1.00),
        lowest,
    ),
)

TOOLS = (
    Claim("`sla-convert`, 355M parameters, seconds", CONVERSION, {"convert": figures.conversion}),
    Claim("Slurm: from a fault to the next new step, seconds", RECOVERY, {"recovery": figures.recovery}),
    Claim("`sla-plan`'s step / the real one", PLAN, {"plan": figures.predicted}, NEAR_PLAN, lambda v: abs(v - 1)),
    Claim(
        "`sla-data tokenize`, tokens a CPU second / datatrove's",
        DATATROVE,
        {"datatrove": figures.datatrove},
        badness=lowest,
    ),
    Claim(
        "decoding speed of a dense export / transformers' own model",
        GENERATION,
        {"generation": figures.over_peer},
        at_least(1.00),
        lowest,
    ),
)

HEADER = ("", "CPU", "GPU", "aim", "reached")


def table(claims: Iterable[Claim], results: Mapping[Path, Result]) -> Table:
    """One line a claim."""
    return Table("", HEADER, [claim.cells(results) for claim in claims], left=(0, 1, 2, 3, 4))
