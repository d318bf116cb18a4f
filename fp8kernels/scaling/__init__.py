"""Blocks, the rules that make scales, the state of delayed scaling, and QTensor."""

from .block import BLOCK_1X128, BLOCK_128X128, BLOCKS, ROW, TENSOR, Block, get_block
from .delayed import ROLES, is_state, new_state, without_state
from .qtensor import QTensor
from .rules import ALGORITHMS, get_algorithm, scale_from_amax

__all__ = [
    "ALGORITHMS",
    "BLOCKS",
    "BLOCK_1X128",
    "BLOCK_128X128",
    "ROLES",
    "ROW",
    "TENSOR",
    "Block",
    "QTensor",
    "get_algorithm",
    "get_block",
    "is_state",
    "new_state",
    "scale_from_amax",
    "without_state",
]
