"""A block is the patch of elements that share one scale."""

from __future__ import annotations

import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """The extent of one patch in elements; None is the whole extent of the tensor.

    A tensor of any rank is seen as [M, K]: leading dimensions flattened, the last one kept. Its scales are always
    2-D, one per patch: [M / rows, K / cols].
    """

    name: str
    rows: int | None
    cols: int | None

    def grid(self, rows: int, cols: int) -> tuple[int, int]:
        """How many patches stand in [rows, cols] in each direction.

        raises   ValueError if the block does not divide the shape
        """
        for extent, size in ((rows, self.rows), (cols, self.cols)):
            if size is not None and extent % size:
                raise ValueError(
                    f"block {self.name!r} does not divide a tensor seen as [{rows}, {cols}]: {extent} is not a "
                    f"multiple of {size}; pad the tensor, or take block='row' or block='tensor'"
                )
        return 1 if self.rows is None else rows // self.rows, 1 if self.cols is None else cols // self.cols

    def patch(self, rows: int, cols: int) -> tuple[int, int]:
        """The extent of one patch of a [rows, cols] tensor, in elements."""
        return self.rows or rows, self.cols or cols

    def transposed(self) -> Block:
        """The block of the transposed tensor."""
        name = self.name if self.rows == self.cols else f"{self.name}.T"
        return Block(name, self.cols, self.rows)


TENSOR = Block("tensor", None, None)
ROW = Block("row", 1, None)
BLOCK_1X128 = Block("1x128", 1, 128)
BLOCK_128X128 = Block("128x128", 128, 128)
BLOCKS = {block.name: block for block in (TENSOR, ROW, BLOCK_1X128, BLOCK_128X128)}


def get_block(block: Block | str) -> Block:
    """The block of that name; a Block is returned as it is.

    raises   ValueError naming the near matches
    """
    if isinstance(block, Block):
        return block
    if block in BLOCKS:
        return BLOCKS[block]
    near = difflib.get_close_matches(str(block), BLOCKS, n=2, cutoff=0.4)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise ValueError(f"unknown block {block!r}: known are {', '.join(map(repr, BLOCKS))}{hint}")
