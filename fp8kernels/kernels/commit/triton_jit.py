"""commit in Triton: every layer of a model in one launch; NVIDIA GPUs, AMD's gfx950, and Triton's interpreter.

method  one program for each tensor of each layer. Where it finds its history, pending, scale and target stands in a
        table of addresses on the device, which is made once for the same layers and kept: a step copies nothing to the
        device, waits for nothing, and can be captured in a CUDA graph
limits  contiguous tensors; the named algorithms (a user's own function runs in the reference)
equal   to the reference to the bit, with the same order of the sum
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from ..quantize.tile.triton_jit import size_of
from ..quantize.triton_jit import pow2
from ..triton_jit import INF_BITS, jit, scale_from_amax, triton
from ..triton_jit import why_not as why_not_here
from . import ScaleRule, State

if triton is not None:
    import triton.language as tl

ALGORITHMS = {"max": 0, "moving_average": 1, "most_recent": 2}
KEPT_TABLES = 8  # models whose addresses are remembered; the one that was not used for longest goes

tables: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()


def why_not(states: Sequence[State], rule: ScaleRule) -> str | None:
    """Why these arguments cannot run here, or None."""
    if rule.algorithm not in ALGORITHMS:
        return f"the algorithm is {rule.algorithm!r}: this kernel knows {', '.join(map(repr, ALGORITHMS))}"
    if not states:
        return "there are no layers"
    reason = why_not_here(dict(zip(State._fields, states[0], strict=True)))
    if reason is not None:
        return reason
    device = states[0].history.device
    for state in states:
        for name, x in zip(State._fields, state, strict=True):
            if x.dtype is not torch.float32 or x.device != device or not x.is_contiguous():
                return f"{name} is {x.dtype} on {x.device}: this kernel takes contiguous fp32 tensors of one device"
    return None


def commit(states: Sequence[State], rule: ScaleRule) -> None:
    """Roll every history that has something pending, make its scale, and clear what was pending; all in place.

    The first call for the same layers makes their table; a CUDA graph is captured after that one.
    """
    table = table_of(states)
    longest = max(state.history.shape[1] for state in states)
    with torch.cuda.device_of(table):
        commit_kernel[(len(table),)](
            table, 2.0**rule.margin,
            ALGORITHM=ALGORITHMS[str(rule.algorithm)], POWER_OF_TWO=rule.power_of_two, SLOTS=pow2(longest), num_warps=1,
        )  # fmt: skip


def table_of(states: Sequence[State]) -> Tensor:
    """Addresses of the tensors' first elements, and the window: int64 [tensors, 5], on their device."""
    key = tuple((*(x.data_ptr() for x in state), state.history.shape, state.history.device) for state in states)
    if key in tables:
        tables.move_to_end(key)
        return tables[key]
    numbers = []
    for state in states:
        count, window = state.history.shape
        at = [x.data_ptr() for x in state]
        steps = [4 * window, 4, 4, 4]  # bytes from one tensor of a layer to the next
        numbers += [[*(a + i * step for a, step in zip(at, steps, strict=True)), window] for i in range(count)]
    tables[key] = torch.tensor(numbers, dtype=torch.int64).to(states[0].history.device)
    if len(tables) > KEPT_TABLES:
        tables.popitem(last=False)
    return tables[key]


@jit
def commit_kernel(  # type: ignore[no-untyped-def]
    table_ptr, headroom, ALGORITHM: tl.constexpr, POWER_OF_TWO: tl.constexpr, SLOTS: tl.constexpr
):
    """One program a tensor: its history [window], and one number each of pending, scale and target."""
    entry = table_ptr + tl.program_id(0) * 5
    history_ptr = tl.load(entry).to(tl.pointer_type(tl.float32))
    pending_ptr = tl.load(entry + 1).to(tl.pointer_type(tl.float32))
    scale_ptr = tl.load(entry + 2).to(tl.pointer_type(tl.float32))
    target = tl.load(tl.load(entry + 3).to(tl.pointer_type(tl.float32)))
    window = tl.load(entry + 4).to(tl.int32)
    pending = tl.load(pending_ptr)
    if (pending > 0) & (size_of(pending) < INF_BITS) & (target > 0):
        slot = tl.arange(0, SLOTS)
        older = tl.load(history_ptr + slot - 1, mask=(slot > 0) & (slot < window), other=0.0)
        history = tl.where(slot == 0, pending, older)  # 0 beyond the window
        if ALGORITHM == 0:
            amax = tl.max(history)
        elif ALGORITHM == 1:
            amax = pending  # slot by slot, as everywhere: the sum is the same to the bit
            for i in range(1, window):
                amax += tl.load(history_ptr + i - 1)
            amax = tl.div_rn(amax, tl.sum((history > 0).to(tl.int32)).to(tl.float32))
        else:
            amax = pending
        tl.debug_barrier()  # all of the old history is read before the new one is written over it
        tl.store(history_ptr + slot, history, mask=slot < window)
        tl.store(scale_ptr, scale_from_amax(amax, target, headroom, POWER_OF_TWO))
    tl.store(pending_ptr, 0.0)
