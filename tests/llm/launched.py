"""A run as torchrun starts it, sharded on CPUs: accelerate shards on GPUs only, so it is told that these are."""

from __future__ import annotations

import sys
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from fp8kernels.training.llm import prepare, train

real = AcceleratorState.__init__


def begin(self: Any, *args: Any, fsdp_plugin: Any = None, **rest: Any) -> None:
    real(self, *args, fsdp_plugin=fsdp_plugin, **rest)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.FSDP
        fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin


if __name__ == "__main__":
    AcceleratorState.__init__ = begin
    prepare.shards = lambda arguments: True
    torch.set_num_threads(1)
    config, out, resume = sys.argv[1:]
    train(config, out, resume=resume == "resume")
    torch.distributed.destroy_process_group()
