"""The checks of the set-ups fail where the step law is broken: one deliberate fault after another, each caught."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from distributed.ranks import run
from setups import test_accumulation as accumulation
from setups import test_checkpoints as checkpoints
from setups import test_copies as copies
from setups import test_modes as modes
from setups import test_optimizers as optimizers
from setups import test_recompute as recompute
from setups.faults import Edit, applied, edited
from setups.runs import FULL, converted, loss_of, same, sgd, state

from fp8kernels.kernels.commit import reference as commit_reference
from fp8kernels.kernels.quantize import reference as quantize_reference
from fp8kernels.nn import function as products
from fp8kernels.nn import roots
from fp8kernels.nn import state as states
from fp8kernels.nn import step as commits
from fp8kernels.nn.prepared import Prepared
from fp8kernels.nn.state import ScaledLayer
from fp8kernels.ops.commit import prepare
from fp8kernels.ops.quantize import _observed
from fp8kernels.scaling import delayed


class Fault(NamedTuple):
    """What is done to the code, and a check that must not pass then.

    reference  the fault is in a reference, which has to run instead of the compiled kernel
    """

    check: Callable[[], Any]
    edits: tuple[Edit, ...]
    reference: bool = False


QUANTIZE = quantize_reference.quantize
NOTED = "torch.where(worst.isfinite(), observer.pending.maximum(worst), observer.pending)"
START = "    recipe = self.fp8_recipe\n"


def together(rank: int, fault: str | None = None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A rank of two, with data of its own: its state after some steps, and what it had noted before each commit."""
    with applied(RANKS[fault] if fault else ()):
        net = converted("bert")
        optimizer, noted = sgd(net), []
        for n in range(FULL.window):
            loss_of(net, "bert", 10 * n + rank).backward()
            for p in net.parameters():
                if p.grad is not None:
                    torch.distributed.all_reduce(p.grad)
            noted.append({key: value for key, value in state(net).items() if key.endswith("fp8_pending")})
            optimizer.step()
            optimizer.zero_grad()
        return {key: value for key, value in state(net).items() if not key.endswith("fp8_counters")}, noted


def ranks_share_the_largest(fault: str | None = None) -> None:
    """Both ranks have one state, and its histories hold the larger of what the two have noted."""
    (first, noted), (second, others) = run(together, 2, fault)
    same(first, second)
    for slot, (ours, theirs) in enumerate(zip(reversed(noted), reversed(others), strict=True)):
        for key, pending in ours.items():
            newest = first[key.replace("pending", "history")][:, slot]
            assert torch.equal(newest, pending.maximum(theirs[key])), f"{key}, {slot} against the larger one"


ALL_REDUCE = "distributed.all_reduce(flat, distributed.ReduceOp.MAX, group=share.group)"
RANKS = {
    "no reduction across ranks": (Edit(Prepared.reduce, ALL_REDUCE, "pass"),),
    "amax is added up across ranks": (Edit(Prepared.reduce, "ReduceOp.MAX", "ReduceOp.SUM"),),
}

FAULTS = {
    "a commit in every forward": Fault(
        partial(accumulation.test_micro_batches_enter_as_their_maximum, "llama"),
        (Edit(ScaledLayer._quantize, START, f"{START}    __import__('fp8kernels').commit(self)\n"),),
    ),
    "the last micro-batch wins": Fault(
        partial(accumulation.test_micro_batches_enter_as_their_maximum, "vit"),
        (Edit(QUANTIZE, NOTED, "torch.where(worst.isfinite(), worst, observer.pending)"),),
        reference=True,
    ),
    "micro-batches are added up": Fault(
        partial(accumulation.test_micro_batches_enter_as_their_maximum, "bert"),
        (Edit(QUANTIZE, "observer.pending.maximum(worst)", "observer.pending + worst"),),
        reference=True,
    ),
    "a recomputed forward counts as a step": Fault(
        partial(recompute.test_checkpointed_blocks, "llama", reentrant=False),
        (Edit(ScaledLayer._quantize, START, f"{START}    self.fp8_step.add_(int(self.training))\n"),),
    ),
    "histories roll when nothing was seen": Fault(
        partial(accumulation.test_a_branch_not_taken, fuse=False),
        (Edit(commit_reference.commit, "torch.where(seen[:, None], rolled, state.history)", "rolled"),),
        reference=True,
    ),
    "a second optimizer rolls what the first one committed": Fault(
        partial(optimizers.test_an_optimizer_for_each_part, wrapped=False),
        (Edit(commit_reference.commit, "torch.where(seen[:, None], rolled, state.history)", "rolled"),),
        reference=True,
    ),
    "steps count where nothing was seen": Fault(
        partial(accumulation.test_a_branch_not_taken, fuse=True),
        (Edit(prepare, "(flat > 0) & flat.isfinite()", "flat >= 0"),),
        reference=True,
    ),
    "an Inf enters a history": Fault(
        optimizers.test_an_inf_gradient_enters_no_history,
        (
            Edit(QUANTIZE, NOTED, "observer.pending.maximum(worst)"),
            Edit(commit_reference.commit, "(state.pending > 0) & state.pending.isfinite()", "state.pending > 0"),
        ),
        reference=True,
    ),
    "an Inf in a gradient is hidden by its codes": Fault(
        partial(optimizers.test_an_inf_behind_layers_without_bias_is_not_hidden, "hif8"),
        (Edit(products._quantize_grad, "propagate=True", "propagate=False"),),
    ),
    "scales move while a backward runs": Fault(
        partial(optimizers.test_optimizer_in_backward, "llama", "hooks"),
        (Edit(commits._after_step, "torch._C._current_graph_task_id() == -1", "True"),),
    ),
    "weights that move within a step are taken for steps": Fault(
        optimizers.test_lbfgs_commits_once_a_step,
        (Edit(commits._before_step, "stepping.add(optimizer)", "pass"),),
    ),
    "scales are those of this very tensor": Fault(
        modes.test_a_forward_multiplies_codes_of_the_committed_scales,
        (Edit(ScaledLayer._quantize, "self.fp8_scale[index : index + 1]", "torch.zeros(1)"),),
    ),
    "codes of a weight outlive its update": Fault(
        partial(optimizers.test_an_optimizer_of_your_own, through_data=True, none=False, own_class=True),
        (Edit(Prepared.run, "layer.fp8_kept.drop(allowed=keeps)", "layer.fp8_kept.allowed = True"),),
    ),
    "eval is noted": Fault(
        partial(modes.test_looking_at_a_model_changes_nothing, "bert", (False, torch.no_grad)),
        (
            Edit(
                ScaledLayer._quantize,
                "self.fp8_counters[index]) if self.training else None",
                "self.fp8_counters[index])",
            ),
        ),
    ),
    "inference mode is noted": Fault(
        partial(modes.test_looking_at_a_model_changes_nothing, "bert", (True, torch.inference_mode)),
        (
            Edit(
                _observed,
                "None if torch.is_inference_mode_enabled() else Observer(pending, counters)",
                "Observer(pending, counters)",
            ),
        ),
    ),
    "readers of fused codes are not told": Fault(
        partial(accumulation.test_fused_modules_keep_the_same_books, "vit"),
        (Edit(Prepared.share, "if not self.readers:", "if True:"),),
    ),
    "state is cast with the weights": Fault(
        partial(copies.test_dtypes_leave_the_state_alone, torch.bfloat16),
        (Edit(states.keep_dtypes, "module._buffers[key] = value.to(after.device)", "pass"),),
    ),
    "a copy is not known to optimizers": Fault(
        copies.test_a_copy_where_only_an_adapter_trains,
        (Edit(roots.Root.__deepcopy__, "None if copied is None else Root(copied, self.group)", "None"),),
    ),
    "scales of another recipe are kept": Fault(
        partial(checkpoints.test_a_checkpoint_of_another_recipe, "format"),
        (
            Edit(
                ScaledLayer._follow_histories, "self.fp8_scale.copy_(torch.where(moves, scale, self.fp8_scale))", "pass"
            ),
        ),
    ),
    "a shorter window keeps the oldest": Fault(
        partial(checkpoints.test_a_window_that_shrank, "bert"),
        (Edit(delayed.fit_window, "history[:, :window]", "history[:, -window:]"),),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = FAULTS[name]
    if fault.reference:
        monkeypatch.setenv("FP8KERNELS_BACKEND", "reference")
    fault.check()  # without the fault it passes, on the same kernels
    with applied(fault.edits), pytest.raises(AssertionError) as caught:
        fault.check()
    assert "has to be written anew" not in str(caught.value)


@pytest.mark.parametrize("name", RANKS)
def test_a_fault_over_ranks_is_caught(name: str) -> None:
    with pytest.raises(AssertionError, match="against"):
        ranks_share_the_largest(name)


def test_without_a_fault_ranks_share_the_largest() -> None:
    ranks_share_the_largest()


def test_a_fault_that_no_longer_fits_the_source_is_told() -> None:
    with pytest.raises(AssertionError, match="has to be written anew"), edited(Edit(delayed.fit_window, "nowhere", "")):
        pass
