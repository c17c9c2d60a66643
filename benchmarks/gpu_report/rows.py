"""What is measured, the most telling first, each as a command with the time that it takes."""

from __future__ import annotations

from dataclasses import dataclass

#: In a command: the row's own folder, which it may write to.
FOLDER = "{folder}"


@dataclass(frozen=True)
class Row:
    """One command of the report.

    Attributes:
        name: also that of its folder.
        command: what ``python`` is given; ``{folder}`` stands for its folder.
        seconds: what it takes, about, on an H200: with less time left it is not started.
        gpus: how many it needs.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    gpus: int = 1

    @property
    def limit(self) -> float:
        """Seconds after which it is ended: another GPU is slower, and a row that hangs is not waited for."""
        return 3 * self.seconds


def rows_for(device: str) -> list[Row]:
    """All rows of ``cuda``, those of several GPUs among them, or tiny ones of ``cpu``."""
    return _on_gpus() if device == "cuda" else _on_a_processor()


def _tests(*what: str) -> tuple[str, ...]:
    # No cache is written into the repository.
    return ("-m", "pytest", "-m", "gpu", "-rA", "--tb=short", "-p", "no:cacheprovider", *what)


def _benchmark(name: str, label: str, *flags: str) -> tuple[str, ...]:
    """Its result is named as the results page wants it."""
    return ("-m", f"benchmarks.{name}", *flags, "--out", f"{FOLDER}/{name}-{label}.json")


def _throughput(model: str, context: int, micro_batch_size: int) -> Row:
    label = f"{model.removeprefix('gpt2-')}-{context // 1024}k"
    flags = ("--models", model, "--contexts", str(context), "--micro-batch-size", str(micro_batch_size))
    return Row(f"throughput-{label}", _benchmark("throughput", f"gpu-{label}", *flags, "--rounds", "20"), 40)


def _generation(label: str, seconds: int, *flags: str) -> Row:
    bounded = ("--model", "gpt2-124m", "--prompts", "128", "--seconds", str(seconds))
    # Importing, building and warming up come on top.
    return Row(f"generation-{label}", _benchmark("generation", f"gpu-{label}", *bounded, *flags), seconds + 30)


def _on_gpus() -> list[Row]:
    loss = ("--model", "gpt2-124m", "--context", "1024", "--iterations", "150", "--global-batch-size", "32")
    return [
        Row("checks", _tests("tests/test_gpu.py", "tests/test_gpu_mixing.py"), 120),
        *_on_several_gpus(),
        _throughput("gpt2-124m", 4096, 4),
        _generation("124m", 30),
        _throughput("1b", 4096, 2),
        Row("operations", _benchmark("operations", "gpu", "--layouts", "1"), 60),
        Row("loss", _benchmark("loss", "gpu-124m", *loss), 130),
        _throughput("gpt2-124m", 16384, 1),
        _throughput("gpt2-350m", 4096, 4),
        _throughput("gpt2-124m", 1024, 16),
        _generation("124m-compiled", 60, "--compile"),
    ]


def _on_several_gpus() -> list[Row]:
    """What one GPU cannot show: parallelism under NCCL, transfers between GPUs, pipelines."""
    sizes = ("--layers", "16", "--hidden", "1024", "--heads", "16", "--seq-length", "2048", "--microbatches", "8")
    found = []
    for gpus in (2, 4, 8):
        transport = _benchmark("transport", f"gpu-{gpus}ranks", "--ranks", str(gpus), *sizes)
        pipeline = _benchmark(
            "throughput",
            f"gpu-pipeline-{gpus}ranks",
            *("--models", "1b", "--contexts", "4096", "--rounds", "10", "--microbatches", str(2 * gpus)),
            *("--layouts", f"{gpus}x1", f"{gpus}x2"),
        )
        found += [
            Row(f"checks-{gpus}-gpus", _tests("tests/test_gpus.py", "-k", f"ranks{gpus}"), 120, gpus),
            Row(f"transport-{gpus}-gpus", transport, 60, gpus),
            Row(f"pipeline-{gpus}-gpus", pipeline, 90, gpus),
        ]
    return found


def _on_a_processor() -> list[Row]:
    """The same commands at sizes that say nothing of speed: for trying the report itself."""
    cpu = ("--device", "cpu")
    tiny = ("--models", "tiny", "--contexts", "32", "--rounds", "2", "--warmup", "1", *cpu)
    loss = ("--model", "quickstart", "--iterations", "2", "--corpus-mb", "1", "--vocab-size", "512", *cpu)
    decoding = ("--model", "tiny", "--prompts", "8", "--tokens", "5", "--rounds", "2", "--seconds", "5", *cpu)
    counted = ("--models", "tiny", "--context", "32", "--layouts", "1", "--no-decoding", *cpu)
    return [
        Row("checks", _tests("tests/test_gpu.py", "tests/test_gpu_mixing.py"), 60),
        Row("throughput", _benchmark("throughput", "cpu-tiny", *tiny), 15),
        Row("pipeline", _benchmark("throughput", "cpu-tiny-pipeline", *tiny, "--layouts", "2x1", "2x2"), 30),
        Row("operations", _benchmark("operations", "cpu-tiny", *counted), 30),
        Row("generation", _benchmark("generation", "cpu-tiny", *decoding), 15),
        Row("loss", _benchmark("loss", "cpu-tiny", *loss), 30),
    ]
