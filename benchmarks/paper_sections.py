"""The paper's questions, one a function: an answer by rule from the figures, then the figures as a table.

What a table tests is kept in a :class:`Ledger`, so that the page can say how many tests it makes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from . import loss, position_tables
from .comparisons import BOTH, Against, Comparison, Result, against_dense
from .paired import Difference
from .record import Table

#: Results by their files' stems.
Files = dict[str, Result]
#: Mean with interval, p, pairs below.
Cells = tuple[str, str, str]
NOT_MEASURED = "Not measured.\n"
_CELLS = ("less dense (95 % interval)", "p", "below")


@dataclass(frozen=True)
class Entry:
    """One comparison that the page makes.  ``is_claim``: its being below 0 is what the method promises."""

    question: str
    what: str
    where: str
    found: Difference
    is_claim: bool


@dataclass
class Ledger:
    """Every comparison that the page makes; one that stands in two tables is one."""

    made: list[Entry] = field(default_factory=list)
    _known: set[frozenset] = field(default_factory=set)

    def cells(self, question: str, compared: Comparison | None, at: str = "", is_claim: bool = True) -> Cells:
        """Make a comparison: its mean with interval, p, and pairs below 0; nothing where there is none to make."""
        if compared is None:
            return "", "", ""
        found, values = compared.difference, frozenset(compared.values.items())
        if values not in self._known:
            self._known.add(values)
            self.made.append(Entry(question, compared.what + at, compared.where, found, is_claim))
        return found.cells


def says(found: Difference, other: str = "dense") -> str:
    """What a difference to ``other`` is, in words that follow from its interval."""
    pairs = f"{found.below} of {found.n} pairs"
    if found.low is None:
        return f"{found.mean:+.4f} to {other} in one pair, no interval"
    if found.verdict == "below":
        return f"below {other} in {pairs}, mean {found.mean:+.4f}, interval excludes 0"
    if found.verdict == "above":
        return f"above {other}, below it in {pairs}, mean {found.mean:+.4f}, interval excludes 0"
    return f"no difference to {other} beyond the spread, {found.shown()}, below in {pairs}"


def counted(found: Sequence[Difference], what: str) -> str:
    """``Of 9 shares 2 are below dense with an interval that excludes 0, 0 above, 7 differ by no more than ...``."""
    verdicts = [each.verdict for each in found]
    below, above = verdicts.count("below"), verdicts.count("above")
    return (
        f"Of {len(found)} {what} {below} are below dense with an interval that excludes 0, {above} above; "
        f"{len(found) - below - above} differ by no more than they spread"
    )


def shares(files: Files, ledger: Ledger) -> str:
    """Distance by heads."""
    found = [one for one in against_dense(files.get("sweep-cpu-questions")) if _is_share(one)]
    default = next((one for one in found if one.is_default), None)
    if default is None:
        return NOT_MEASURED
    texts = list(default.texts)
    rows, apart = [], []
    for one in found:
        other = None if one is default else one.together.less(default.together, f"{one.label}, less {default.label}")
        apart += [other.difference.verdict] if other else []
        per_text = [ledger.cells("shares", one.texts.get(text))[0] for text in texts]
        last = ledger.cells("shares", other, is_claim=False)[:2]
        heads = f"{one.group.skip_heads}/{one.group.num_heads}"
        rows.append((one.group.distance, heads, *per_text, *ledger.cells("shares", one.together), *last))
    best = min(found, key=lambda one: one.together.difference.mean)
    answer = (
        f"{counted([one.together.difference for one in found], 'shares')}. The paper's, {default.label}: "
        f"{says(default.together.difference)}; of the others {apart.count('below')} are below it beyond the spread, "
        f"{apart.count('above')} above. The lowest mean, chosen after looking at all: {best.label}, "
        f"{best.together.difference.mean:+.4f}.\n\n"
    )
    header = ("distance", "heads", *texts, BOTH, "p", "below", "less the paper's", "p of that")
    title = f"Less dense (95 % interval): shares of {default.num_layers} layers and of heads, {_size(default)}"
    return answer + Table(title, header, rows, ()).as_markdown()


def _is_share(one: Against) -> bool:
    return len(one.setting.distances) == 1 and one.setting.layers is None


def _size(one: Against) -> str:
    group = one.group
    return f"{group.tokens:,} tokens, context {one.context}, {group.parameters:,} parameters"


def readings(files: Files, ledger: Ledger) -> str:
    """The paper's nine layers: a distance, or nine layers that each read the one before."""
    rows, answers, question = [], [], "readings"
    for stem in ("sweep-cpu-questions", "sweep-cpu-longer", "sweep-cpu-larger"):
        found = against_dense(files.get(stem))
        for one in (one for one in found if one.is_default):
            other = next((each for each in found if each.is_other_reading and each.context == one.context), None)
            if other is None:
                continue
            place = (str(one.num_layers), str(one.context), f"{one.group.tokens:,}")
            at = f", {one.num_layers} layers, context {one.context}, {one.group.tokens:,} tokens"
            apart = other.together.less(one.together, f"{other.label}, less {one.label}")
            rows.append((*place, one.label, *ledger.cells(question, one.together, at)))
            rows.append((*place, other.label, *ledger.cells(question, other.together, at)))
            rows.append((*place, "the second less the first", *ledger.cells(question, apart, at, is_claim=False)))
            answers.append(apart.difference.verdict if apart else "one pair, no interval")
    if not rows:
        return NOT_MEASURED
    places = len(answers)
    verdicts = "; ".join(f"{verdict} in {answers.count(verdict)} of {places}" for verdict in dict.fromkeys(answers))
    answer = f"The reading in which each layer skips a short way, less the long distance: {verdicts}.\n\n"
    header = ("layers", "context", "tokens", "setting", *_CELLS)
    return answer + Table(f"Both readings, {BOTH} together", header, rows, (3,)).as_markdown()


def several(files: Files, ledger: Ledger) -> str:
    """More than one distance in a model, which the paper leaves open."""
    found = against_dense(files.get("sweep-cpu-questions"))
    default = next((one for one in found if one.is_default), None)
    mixed = [one for one in found if len(one.setting.distances) > 1]
    if default is None or not mixed:
        return NOT_MEASURED
    rows = []
    for one in mixed:
        rows += [(one.label, each.where, "dense", *ledger.cells("several distances", each)) for each in one.all]
        apart = one.together.less(default.together, f"{one.label}, less {default.label}")
        rows.append((one.label, BOTH, default.label, *ledger.cells("several distances", apart, is_claim=False)))
    answer = "; ".join(f"{one.label}: {says(one.together.difference)}" for one in mixed)
    header = ("setting", "text", "less", "mean (95 % interval)", "p", "below")
    return f"{answer}.\n\n" + Table("Several distances in one model", header, rows, (0, 1, 2)).as_markdown()


def methods(files: Files, ledger: Ledger) -> str:
    """Published relatives at equal tokens, and at equal parameters."""
    found = against_dense(files.get("sweep-cpu-methods"))
    if not found:
        return NOT_MEASURED
    rows = [(one.label, f"{one.group.parameters:,}", *ledger.cells("methods", one.together)) for one in found]
    below = [one.label for one in found if one.together.difference.verdict == "below"]
    answer = counted([one.together.difference for one in found], "settings")
    answer += f". Below: {'; '.join(below)}.\n\n" if below else ".\n\n"
    title = f"Methods, {len(found[0].together.values)} seeds, {_size(found[0])}"
    return answer + Table(title, ("setting", "parameters", *_CELLS), rows).as_markdown()


def contexts(files: Files, ledger: Ledger) -> str:
    """Whether the gain grows with the context, at equal tokens."""
    found = against_dense(files.get("sweep-cpu-longer"))
    rows, answers = [], []
    for setting in dict.fromkeys(one.setting for one in sorted(found, key=lambda one: not one.is_default)):
        same = sorted((one for one in found if one.setting == setting), key=lambda one: one.context)
        for one in same:
            at = f", context {one.context}"
            rows += [(one.label, each.where, str(one.context), *ledger.cells("contexts", each, at)) for each in one.all]
        for short, long in itertools.pairwise(same):
            growth = long.together.less(short.together, f"{long.label}, context {long.context} less {short.context}")
            if growth:
                apart = f"{long.context} less {short.context}"
                rows.append((long.label, growth.where, apart, *ledger.cells("contexts", growth)))
                at = f"the difference to dense at {long.context} less that at {short.context}"
                answers.append(f"{long.label}, {at}: {says(growth.difference, '0')}")
    if not answers:
        return NOT_MEASURED
    header = ("setting", "text", "context", *_CELLS)
    title = f"A short and a long context, {found[0].group.tokens:,} tokens each"
    return ". ".join(answers) + ".\n\n" + Table(title, header, rows, (0, 1)).as_markdown()


def positions(files: Files, ledger: Ledger) -> str:
    """Whether SLA gains where the context is long: late positions against early ones, in the longest context."""
    result = files.get("positions-cpu")
    found = position_tables.settings(result["rows"]) if result else {}
    if result is None or not found:
        return NOT_MEASURED
    longest = max(context for _, context, _ in found)
    rows, answers = [], []
    for setting in dict.fromkeys(setting for _, context, setting in found if context == longest):
        runs = [
            run for (_, context, of), several in found.items() if (context, of) == (longest, setting) for run in several
        ]
        bins = _by_bin(runs, result, f"distance {'+'.join(map(str, setting.distances))}")
        label = next(iter(bins.values())).what.partition(", position")[0]
        rows += [(label, place, *ledger.cells("positions", one)) for place, one in bins.items()]
        (first, early), *_, (last, late) = bins.items()
        apart = late.less(early, f"{label}, position {last} less {first}")
        rows.append((label, f"{last} less {first}", *ledger.cells("positions", apart)))
        if apart:
            answers.append(
                f"{label}, difference to dense at {last} less that at {first}: {says(apart.difference, '0')}"
            )
    header = ("setting", "position", *_CELLS)
    title = f"Loss by position, context {longest}, {BOTH} together"
    return ". ".join(answers) + ".\n\n" + Table(title, header, rows).as_markdown()


def _by_bin(runs: Sequence[dict], result: Result, label: str) -> dict[str, Comparison]:
    """Position -> a value a pair of text and seed."""
    layers = position_tables.Setting.of_row(runs[0]).layers
    label += f", layers {layers}" if layers else ""
    found: dict[str, dict[tuple[str, int], float]] = {}
    for run in runs:
        for (first, last), values in position_tables.differences([run], result["rows"]).items():
            found.setdefault(f"{first}-{last}", {})[(run["size"], run["seed"])] = values[0]
    return {place: Comparison(BOTH, f"{label}, position {place}", values) for place, values in found.items()}


def sizes(files: Files, ledger: Ledger) -> str:
    """Whether the gain grows with the model."""
    rows, answers = [], []
    small = {_role(one): one for one in against_dense(files.get("sweep-cpu-questions")) if _role(one)}
    for large in sorted(against_dense(files.get("sweep-cpu-larger")), key=lambda one: not one.is_default):
        one = small.get(_role(large))
        if one is None:
            continue
        for each in (one, large):
            place = (str(each.num_layers), f"{each.group.parameters:,}", each.label)
            rows += [(*place, text.where, *ledger.cells("sizes", text)) for text in each.all]
        growth = large.together.less(
            one.together, f"{large.label} of {large.num_layers} layers, less {one.label} of {one.num_layers}"
        )
        rows.append(("", "", "the larger less the smaller", BOTH, *ledger.cells("sizes", growth)))
        if growth:
            what = f"{_role(large)}, the larger model's difference to dense less the smaller's"
            answers.append(f"{what}: {says(growth.difference, '0')}")
    if not answers:
        return NOT_MEASURED
    header = ("layers", "parameters", "setting", "text", *_CELLS)
    return ". ".join(answers) + ".\n\n" + Table("Two sizes, equal tokens", header, rows, (2, 3)).as_markdown()


def _role(one: Against) -> str:
    return "The paper's shares" if one.is_default else "The other reading" if one.is_other_reading else ""


def on_gpu(files: Files, ledger: Ledger) -> str:
    """Runs of one seed: what they are."""
    result = files.get("loss-gpu-124m-4k")
    if result is None:
        return NOT_MEASURED
    dense, *others = result["rows"]
    apart = [f"{row['variant']}: {row['validation_loss'] - dense['validation_loss']:+.4f}" for row in others]
    answer = (
        f"{result['machine']['device']}, {dense['tokens']:,} tokens, less dense: {'; '.join(apart)}. One run of each, "
        f"from one seed, has no interval: how much is chance is not known. Data: {result['settings']['data']}.\n\n"
    )
    return answer + "\n".join(table.as_markdown() for table in loss.tables(result))


def not_holding(made: Sequence[Entry]) -> str:
    """Every claim whose interval is not below 0."""
    claims = [entry for entry in made if entry.is_claim]
    failed = [entry for entry in claims if entry.found.verdict != "below"]
    if not failed:
        return "Nothing that was measured: every interval is below 0.\n" if claims else NOT_MEASURED
    rows = [(entry.question, entry.what, entry.where, entry.found.shown(), entry.found.shown_below) for entry in failed]
    title = f"{len(failed)} of {len(claims)}: the interval includes 0, is above it, or there is none"
    return Table(title, ("question", "what", "text", "mean (95 % interval)", "below"), rows, (0, 1, 2)).as_markdown()


#: Title, question, and who answers it.
SECTIONS: tuple[tuple[str, str, Callable[[Files, Ledger], str]], ...] = (
    ("Shares of layers and of heads", "The paper's best are 9 of 12 layers and 9 of 12 heads.", shares),
    (
        "Both readings",
        "Its nine skip layers may be a distance of nine, or nine layers that each skip a short way.",
        readings,
    ),
    ("Several distances", "The paper leaves it open.", several),
    ("Other methods", "At equal tokens; pruned, at equal parameters, where weights do not begin as dense's.", methods),
    ("Longer contexts", "The paper's gain grows with the context.", contexts),
    ("Loss by position", "Is the gain where the context is long?", positions),
    ("Larger models", "The paper goes from 124M to 774M; this is a step of another size.", sizes),
    ("One look on a GPU", "GPT-2's shape of 124M with a vocabulary of 16,384, at 4,096 tokens.", on_gpu),
)
