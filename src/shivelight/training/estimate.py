"""What a run will cost, before it is started."""

import math
import sys

import torch

from shivelight.training.trainer import Trainer


def estimate(trainer: Trainer) -> dict[str, float]:
    """Time, memory and adapter size of a run, from one trial step of each stage whose effects are thrown away."""
    config = trainer.config
    saved = {name: p.detach().clone() for name, p in trainer.state_tensors().items()}
    optimizer = trainer.optimizer.state_dict()
    device = trainer.accelerator.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds, start = 0.0, 0
    for length in (config.router_steps, config.policy_steps, config.joint_steps):
        if length:
            trainer.step = start
            trainer.train_step()  # warm-up of kernels and caches
            trainer.step = start
            seconds += trainer.train_step()["seconds"] * length
        start += length
    with torch.no_grad():
        for name, tensor in trainer.state_tensors().items():
            tensor.copy_(saved[name])
    trainer.optimizer.load_state_dict(optimizer)
    trainer.optimizer.state.clear()
    trainer.step = 0
    size = sum(p.numel() * p.element_size() for p in trainer.named_parameters().values())
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device) / 2**20
    else:
        import resource

        # Linux counts in KiB, macOS in bytes.
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)
    return {"hours": seconds / 3600, "peak_memory_mb": memory, "adapter_mb": size / 2**20, "steps": math.floor(start)}
