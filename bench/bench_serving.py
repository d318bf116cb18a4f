"""Serving a language model with 8-bit weights, inputs and cache against transformers in bf16: speed and memory.

Both sides are the same random weights, written once as a plain checkpoint and once by `fp8kernels.export`, and both are
loaded and asked for tokens as a user would: `generate` of transformers, greedy, a prompt of 512 tokens.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fp8kernels
from fp8kernels.export import export
from fp8kernels.export.calibrate import calibrate
from fp8kernels.nn.inference import InferenceLinear
from fp8kernels.serving import load

from .case import ANY, MEMORY, SPEED, Case, device_of, noted
from .measure import Samples, synchronize

PROMPT = 512  # tokens
NEW = 14  # tokens a round; the first two are left out: one of the prompt, one that finds its buffers
PREFILL = 128  # tokens
WEIGHT = 0.03  # largest magnitude of a random weight
PLAIN = "bf16"  # the name of the folder in bf16
RECIPES = {"hif8": "hif8-qat", "e4m3": "e4m3-delayed"}
KERNELS = ("linear/cpu", "quantize/cpu", "gemm/cpu", "decode_attention/cpu", "dequantize/cpu")
LARGEST_ERROR = 0.5  # of the norm of logits: random weights pass rounding on unweakened; wrong scales make 1 and more


@dataclass(frozen=True)
class Size:
    """A decoder of Llama's kind with a tied head and biases of q, k, v and the output projection."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    prompt: int = PROMPT

    def __str__(self) -> str:
        return f"{self.layers}x{self.hidden}x{self.intermediate}, vocabulary {self.vocabulary}, prompt {self.prompt}"


PANGU = Size(26, 1536, 6144, 12, 6, 153_376)  # openPangu-Embedded-1B: 1.16 billion parameters
TINY = Size(2, 128, 256, 2, 1, 320, prompt=120)

_scratch: list[tempfile.TemporaryDirectory[str]] = []  # removed when the process ends


def config_of(size: Size) -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched to build a model from a size
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=size.intermediate,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.kv_heads,
        attention_bias=True, tie_word_embeddings=True, max_position_embeddings=4096, bos_token_id=1, pad_token_id=0,
        eos_token_id=None, dtype="bfloat16",
    )  # fmt: skip


def decoder(size: Size) -> Any:
    """The model in bf16, its weights random."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = LlamaForCausalLM(config_of(size))
    finally:
        torch.set_default_dtype(before)
    model = model.to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # its buffers are no parameters
    model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1)
            else:
                parameter.uniform_(-WEIGHT, WEIGHT)
    return model.eval()


@lru_cache(maxsize=4)
def folders(size: Size, fmt: str) -> tuple[Path, Path]:
    """The same model as a plain checkpoint in bf16, and as export writes it after a calibration."""
    _scratch.append(tempfile.TemporaryDirectory(prefix="bench-serving-"))
    root = Path(_scratch[-1].name)
    model = decoder(size)
    model.save_pretrained(root / PLAIN)
    fp8kernels.convert(model, RECIPES[fmt], verbose=False)
    calibrate(model, [prompt_of(size, 64)])
    export(model, root / fmt)
    return root / PLAIN, root / fmt


def load_plain(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True).eval()


@lru_cache(maxsize=4)
def pair(size: Size, fmt: str, head: str | None, kv_cache: str | None, device: str) -> tuple[Any, Any]:
    """Ours and the baseline, loaded; kept, because a case is built several times."""
    plain, eight_bit = folders(size, fmt)
    return load(eight_bit, head=head, kv_cache=kv_cache).to(device), plain_of(size, plain, device)


@lru_cache(maxsize=1)
def plain_of(size: Size, folder: Path, device: str) -> Any:
    return load_plain(folder).to(device)


def prompt_of(size: Size, tokens: int, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(2, size.vocabulary, (1, tokens), generator=generator).to(device)


def generated(model: Any, ids: Tensor, tokens: int = NEW, **kwargs: Any) -> list[float]:
    """Seconds of each token after the first two."""
    from transformers.generation.streamers import BaseStreamer

    class Clock(BaseStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Tensor) -> None:
            synchronize()
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    clock = Clock()
    with torch.inference_mode():
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
            streamer=clock, **kwargs,
        )  # fmt: skip
    times = clock.times[3:]  # without the prompt itself, the token that ends the prefill and the one after it
    return [b - a for a, b in itertools.pairwise(times)]


def check_pair(ours: Any, theirs: Any, ids: Tensor, head: str | None) -> None:
    """Raises AssertionError where ours is not what its row says, or computes something else."""
    plain = [name for name, module in ours.named_modules() if type(module) is nn.Linear]
    assert plain == ([] if head else ["lm_head"]), f"in high precision: {plain}"
    assert isinstance(ours.get_output_embeddings(), InferenceLinear) == (head is not None)
    with torch.inference_mode():
        a, b = (model(ids[:, :32], logits_to_keep=1).logits.float() for model in (ours, theirs))
    error = float((a - b).norm() / b.norm())
    assert error < LARGEST_ERROR, f"the logits are {error:.2f} of their norm apart"


def decode(
    fmt: str,
    size: Size = PANGU,
    backend: str = "cpu",
    head: str | None = None,
    kv_cache: str | None = None,
    device: str | None = None,
) -> Case:
    """Seconds of one token at batch 1, the prompt behind it.

    head      format of the head and the tied embedding; None leaves both in bf16
    kv_cache  format of the keys and values; None leaves them in bf16
    device    "cuda" compiles both sides over a static cache, as transformers does by itself
    """
    device = device_of(backend) if device is None else needed(device)
    ours, theirs = pair(size, fmt, head, kv_cache, device)
    ids = prompt_of(size, size.prompt, device)
    static: dict[str, Any] = {"cache_implementation": "static"} if device == "cuda" else {}

    def samples(*_: Any) -> Samples:
        return Samples(generated(ours, ids, **static), generated(theirs, ids, **static), "tokens")

    return Case(
        "serving", f"token at batch 1, head {head or 'bf16'}, cache {kv_cache or 'bf16'}", fmt, backend, str(size),
        "transformers in bf16", lambda: generated(ours, ids, **static), lambda: generated(theirs, ids, **static),
        lambda: check_pair(ours, theirs, ids, head), kernels_of(backend, ours, ids), unit=SPEED, device=device,
        clock=samples,
        extra={"parameters": sum(p.numel() for p in theirs.parameters()), "head": head, "kv_cache": kv_cache},
    )  # fmt: skip


def prefill(
    fmt: str, size: Size = PANGU, backend: str = "cpu", head: str | None = None, device: str | None = None
) -> Case:
    """The forward of a prompt, to the logits of its last token."""
    device = device_of(backend) if device is None else needed(device)
    ours, theirs = pair(size, fmt, head, None, device)
    ids = prompt_of(size, min(PREFILL, size.prompt) if device == "cpu" else size.prompt, device)
    forward = {id(model): torch.compile(model) if device == "cuda" else model for model in (ours, theirs)}

    def run(model: Any) -> None:
        with torch.inference_mode():
            forward[id(model)](ids, logits_to_keep=1, use_cache=False)

    return Case(
        "serving", f"prompt of {ids.shape[1]} tokens, head {head or 'bf16'}", fmt, backend, str(size),
        "transformers in bf16", lambda: run(ours), lambda: run(theirs), lambda: check_pair(ours, theirs, ids, head),
        kernels_of(backend, ours, ids), unit=SPEED, device=device, extra={"head": head},
    )  # fmt: skip


@dataclass(frozen=True)
class Held:
    """Bytes that a process holds for a model that has answered a prompt.

    tensors    parameters, buffers, and keys and values
    kv         keys and values alone
    growth     of the resident memory since before the model was loaded
    load_s     seconds of loading, from files that the system has in memory
    """

    tensors: int
    kv: int
    growth: int
    load_s: float


def memory(
    fmt: str,
    size: Size = PANGU,
    backend: str = "cpu",
    head: str | None = None,
    kv_cache: str | None = None,
    counted: str = "tensors",
) -> Case:
    """Memory of a loaded model and its cache, each measured in a process of its own.

    counted  "tensors" or "growth", fields of Held
    """
    plain, eight_bit = folders(size, fmt)

    def both(run: int = 0) -> tuple[Held, Held]:
        return in_a_process(size, eight_bit, head, kv_cache, run), in_a_process(size, plain, None, None, run)

    def check() -> None:
        ours, theirs = both()
        assert theirs.kv > 0 and ours.kv == theirs.kv if kv_cache is None else 0 < ours.kv < theirs.kv

    def samples(*_: Any) -> Samples:
        runs = [both(run) for run in range(2)]
        ours, theirs = ([getattr(run[side], counted) / 1e9 for run in runs] for side in (0, 1))
        return Samples(ours, theirs, "bytes")

    what = {"tensors": "parameters, buffers and cache", "growth": "growth of the process"}[counted]
    return Case(
        "serving", f"{what}, head {head or 'bf16'}, cache {kv_cache or 'bf16'}", fmt, backend, str(size),
        "transformers in bf16", both, both, check, KERNELS, unit=MEMORY, clock=samples,
        extra={"ours": asdict(both()[0]), "baseline": asdict(both()[1]), "head": head, "kv_cache": kv_cache},
    )  # fmt: skip


@lru_cache(maxsize=16)
def in_a_process(size: Size, folder: Path, head: str | None, kv_cache: str | None, run: int = 0) -> Held:
    """Load a folder in a new process, answer a prompt there, and bring back what it holds. A run is not redone."""
    asked = {"size": asdict(size), "folder": str(folder), "head": head, "kv_cache": kv_cache}
    done = subprocess.run(
        [sys.executable, "-m", "bench.bench_serving", json.dumps(asked)],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    if done.returncode:
        raise AssertionError(f"the process that loads {folder.name} failed: {done.stderr.strip()[-500:]}")
    return Held(**json.loads(done.stdout.strip().splitlines()[-1]))


def held(size: Size, folder: Path, head: str | None, kv_cache: str | None) -> Held:
    """What this process comes to hold; called in one of its own."""
    prepare()
    before, start = resident(), time.perf_counter()
    model = load_plain(folder) if folder.name == PLAIN else load(folder, head=head, kv_cache=kv_cache)
    load_s = time.perf_counter() - start
    ids = prompt_of(size, size.prompt)
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4, do_sample=False,
            return_dict_in_generate=True,
        )  # fmt: skip
    cache = out.past_key_values
    kv = getattr(cache, "nbytes", None) or sum(x.nbytes for each in cache.layers for x in (each.keys, each.values))
    return Held(fp8kernels.nn.inference.nbytes(model) + kv, kv, resident() - before, load_s)


def prepare() -> None:
    """Bring in all code that loading and generating need, so that it is not counted: a tiny model does both."""
    with tempfile.TemporaryDirectory() as root:
        decoder(TINY).save_pretrained(root)
        generated(load_plain(Path(root)), prompt_of(TINY, 4), 4)


def resident() -> int:
    """Bytes of this process that are in memory.

    raises   ValueError where the system does not say
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError as error:
        raise ValueError(f"the memory of a process is read from /proc, which is not there: {error}") from None
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))


def needed(device: str) -> str:
    """The device. raises ValueError where it is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("this case needs a GPU")
    return device


def kernels_of(backend: str, model: Any, ids: Tensor) -> tuple[str, ...]:
    """The kernels that a row answers for: the CPU's, or those that the table chooses for a prompt."""
    if backend != ANY:
        return KERNELS
    with noted() as kernels, torch.inference_mode():
        model(ids, use_cache=False)
    return tuple(sorted(kernels))


def test_decode(fmt: str, backend: str, race: Callable[[Case], None]) -> None:
    race(decode(fmt, TINY, backend, head="hif8", kv_cache="hif8"))


def test_prefill(fmt: str, backend: str, race: Callable[[Case], None]) -> None:
    race(prefill(fmt, TINY, backend))


def test_memory(backend: str, race: Callable[[Case], None]) -> None:
    race(memory("hif8", TINY, backend, head="hif8", kv_cache="hif8"))


if __name__ == "__main__":
    _asked = json.loads(sys.argv[1])
    torch.set_num_threads(2)
    print(json.dumps(asdict(held(Size(**_asked.pop("size")), Path(_asked.pop("folder")), **_asked))))
