"""A causal language model and its tokenizer from a local folder, checked before and after the weights are read.

In order, cheap checks first: config.json; the headers of the safetensors files; a rehearsal, in which transformers
fills a model without storage from tensors without storage, so that its own rules of names decide what is missing, left
over or of another shape; then the weights; then whether all are finite, and whether the model is causal and its logits
are finite on a few tokens; then the tokenizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..headers import AGAIN, CONFIG, FLOATS, TensorHeader, check_folder, read_headers, read_json, some
from . import pangu
from .checkpoint import read_config
from .linears import as_linears
from .tokenizer import check_tokenizer, load_tokenizer, quiet

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EIGHT_BIT_STATE = "fp8_"  # how buffers of converted layers are named; convert makes them anew, a plain model has none
LAYERS = ("num_hidden_layers", "n_layer", "num_layers")  # how configs call their number
TRIAL = 4  # tokens; what comes after the first must not change its logits


def load_causal_lm(
    folder: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    tokenizer: Any = None,
) -> tuple[Any, Any]:
    """Any causal LM that transformers knows, and openPangu-Embedded as a Llama, with its tokenizer.

    folder     config.json and safetensors, as save_pretrained or `hf download` writes them. Nothing is fetched, nothing
               is unpickled, no code of the folder is run. Scales that a converted model saved beside its weights are
               left out: this is the plain model
    dtype      of the weights, torch's or its name; None: the one that config.json names, else that of the files
    tokenizer  another folder's, or a tokenizer itself; None takes the folder's own
    returns    (model in eval mode with gradients on, tokenizer). Linear layers in classes of transformers' own (GPT-2's
               Conv1D) are torch.nn.Linear, and are saved as their own again (models/linears.py)

    raises     FileNotFoundError for what is not there (the folder, its config, weights, shards, tokenizer), ValueError
               for what does not fit or is broken, each with the way out; ImportError naming the extra to install
    warns      UserWarning where the tokenizer looks like another model's (models/tokenizer.py)
    """
    _transformers()
    folder = check_folder(folder)
    wanted = _dtype(dtype)
    described = read_config(folder)
    headers = read_headers(folder)
    config = _config(folder, described, headers)
    model_class = _model_class(folder, config)
    if tokenizer is None or isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(folder if tokenizer is None else tokenizer)
    with quiet():
        _rehearse_plain(folder, model_class, config, headers)
        model = model_class.from_pretrained(
            folder,
            config=config,
            dtype="auto" if wanted is None else wanted,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    check_finite(model)
    as_linears(model)
    model = model.to(device).eval()
    check_causal(model)
    check_tokenizer(tokenizer, model, where=f"the tokenizer of {getattr(tokenizer, 'name_or_path', '') or folder}")
    return model, tokenizer


def check_finite(model: nn.Module) -> None:
    """Refuse a model with NaN or Inf in a parameter or buffer that is saved.

    raises   ValueError with the tensor's name, how many values, where the first stands
    """
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()):
            continue
        bad = torch.nonzero(~torch.isfinite(tensor))
        fits = ""
        if tensor.dtype == torch.float16:
            fits = f"; float16 ends at {torch.finfo(torch.float16).max:g}, try dtype='float32'"
        raise ValueError(
            f"{name} {list(tensor.shape)} holds {len(bad)} values that are NaN or Inf in {tensor.dtype}, the first at "
            f"{bad[0].tolist()}{fits}; the checkpoint is broken, take an earlier one"
        )


def check_causal(model: Any) -> None:
    """Refuse a model whose logits or their gradients are not finite, or in which a token sees those that come after it.

    The second is found by the gradient of the first token's logits with respect to the later embeddings: zero to the
    bit where they are masked. An encoder loaded as a causal LM would show a loss near 0 in training and know nothing.

    raises   ValueError with the finding
    """
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    embedding = model.get_input_embeddings()
    ids = torch.arange(TRIAL, device=embedding.weight.device)[None] % embedding.weight.shape[0]  # [1, TRIAL] int64
    hook = embedding.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            logits = model(input_ids=ids, use_cache=False).logits  # [1, TRIAL, vocabulary]
            (gradient,) = torch.autograd.grad(logits[0, 0].float().sum(), seen[:1])  # [1, TRIAL, hidden]
    except (RuntimeError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{type(model).__name__} does not compute logits of {TRIAL} tokens: {error}") from error
    finally:
        hook.remove()
    if not (bool(torch.isfinite(logits).all()) and bool(torch.isfinite(gradient).all())):
        raise ValueError(
            f"{type(model).__name__} in {logits.dtype} gives logits or gradients that are NaN or Inf; its weights are "
            "finite, so either they are damaged or the numbers between outgrow the dtype: try 'bfloat16' or 'float32'"
        )
    if bool(gradient[0, 1:].count_nonzero()):
        raise ValueError(
            f"{type(model).__name__} is not causal: the logits of a token depend on the tokens after it. An encoder "
            "needs is_decoder: true in config.json, and training, before it is a language model"
        )


def _config(folder: Path, described: dict[str, Any], headers: dict[str, TensorHeader]) -> Any:
    """The config of transformers; config.json's auto_map is not looked at."""
    import transformers

    layers = max((value for name in LAYERS if isinstance(value := described.get(name), int)), default=0)
    if layers > len(headers):  # which would take long to build before it failed
        raise ValueError(
            f"{folder}: {CONFIG} has {layers} layers, the weights have {len(headers)} tensors in all; "
            f"one of them is another model's, or {AGAIN}"
        )
    if pangu.is_pangu(described):
        return pangu.from_pangu_config(described)
    name = described["model_type"]
    if name not in transformers.CONFIG_MAPPING:
        own = " Its own code (auto_map) is not run." if described.get("auto_map") else ""
        raise ValueError(
            f"{folder}: transformers {transformers.__version__} has no model_type {name!r}.{own} "
            "A newer transformers may have it; otherwise convert the model to a type that it has"
        )
    try:
        return transformers.CONFIG_MAPPING[name].from_pretrained(folder, local_files_only=True)
    except Exception as error:  # each config has its own checks and errors
        raise ValueError(f"{folder / CONFIG} does not describe a {name}: {str(error).strip()[:500]}") from error


def _model_class(folder: Path, config: Any) -> Any:
    import transformers

    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{folder}: model_type {config.model_type!r} is no causal language model in transformers")
    if (folder / "generation_config.json").exists():
        read_json(folder / "generation_config.json")
    return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def rehearse(folder: Path, model_class: Any, config: Any, state: dict[str, Tensor], **settings: Any) -> Any:
    """Load tensors without storage into a model without storage; what does not fit there would not fit for real.

    state     name -> tensor on the meta device, as the files have them
    settings  further ones of from_pretrained
    returns   the model, on the meta device
    raises    ValueError naming the tensors that are missing, left over, or of another shape
    """
    try:
        model, report = model_class.from_pretrained(
            None,
            config=config,
            state_dict=dict(state),
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **settings,
        )
    except ImportError:
        raise
    except Exception as error:  # a config that builds no model, or tensors that cannot be joined as its type joins them
        raise ValueError(
            f"{folder}: {CONFIG} and the weights do not make a {model_class.__name__}: {str(error).strip()[:500]}"
        ) from error
    wrong = [
        f"{name} is {list(found)}, the model has {list(needed)}" for name, found, needed in report["mismatched_keys"]
    ]
    if wrong:
        raise ValueError(
            f"{folder}: {len(wrong)} tensors have another shape than {CONFIG} says: {'; '.join(sorted(wrong)[:3])}"
        )
    if report["missing_keys"]:
        raise ValueError(
            f"{folder}: the weights hold {len(state)} tensors and lack {len(report['missing_keys'])} that a "
            f"{model_class.__name__} of this {CONFIG} has: {some(report['missing_keys'])}; {AGAIN}"
        )
    if report["unexpected_keys"]:
        raise ValueError(
            f"{folder}: the weights hold {len(report['unexpected_keys'])} tensors that a {model_class.__name__} of "
            f"this {CONFIG} does not have: {some(report['unexpected_keys'])}; one of the two is another model's"
        )
    return model


def _rehearse_plain(folder: Path, model_class: Any, config: Any, headers: dict[str, TensorHeader]) -> None:
    stored = {name: header for name, header in headers.items() if not _is_state(name)}
    state = {name: torch.empty(header.shape, device="meta") for name, header in stored.items()}
    parameters = dict(rehearse(folder, model_class, config, state).named_parameters())
    codes = {name: header.dtype for name, header in stored.items() if name in parameters and header.dtype not in FLOATS}
    if codes:
        raise ValueError(
            f"{folder}: {len(codes)} weights are stored as {sorted(set(codes.values()))}, such as {some(codes, 1)}; "
            "they are quantized already, give the model in BF16, FP16 or FP32"
        )


def _is_state(name: str) -> bool:
    return name.rpartition(".")[2].startswith(EIGHT_BIT_STATE)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if found is not None and found not in DTYPES:
        names = ", ".join(str(known).removeprefix("torch.") for known in DTYPES)
        raise ValueError(f"dtype {dtype!r} is none of {names}")
    return found


def _transformers() -> Any:
    try:
        import accelerate  # noqa: F401, used by transformers to build models without storage
        import transformers
    except ImportError as error:
        raise ImportError(
            "language models need transformers and accelerate: pip install 'fp8kernels[train]'"
        ) from error
    return transformers
