"""FSDP2 on two processes: parameters, moments and anchors are sharded alike, and checkpoints too.

torchrun --nproc-per-node 2 examples/fsdp2.py --steps 48
"""

from __future__ import annotations

import argparse
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from reviews import accuracy, load
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

from recadam_core import Sigmoid
from recadam_torch import Anchors, RecAdam, param_groups


def main() -> None:
    """Train, save and load a checkpoint on the way, and print the test accuracy."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=48)
    steps = parser.parse_args().steps

    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank = dist.get_rank()
    pretrained, model, train, test = load()
    mesh = dist.init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (dist.get_world_size(),))
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)

    # After sharding: each process reads its own rows of the file, and none holds the whole.
    anchors = Anchors.of(model, pretrained, new=["classifier.*", "bert.pooler.*"], strict=True)
    optimizer = RecAdam(
        param_groups(model, anchors), lr=1e-4, gamma=2000.0, annealing=Sigmoid(k=0.1, t0=steps / 2)
    )
    held = sum(state["anchor"].to_local().numel() for state in optimizer.state.values() if "anchor" in state)
    print(f"process {rank} holds {held:,} of the anchors' numbers", flush=True)

    sampler = DistributedSampler(train, seed=0)
    loader = DataLoader(train, batch_size=8, sampler=sampler)
    step = 0
    with tempfile.TemporaryDirectory() as mine:
        folder = [mine]
        dist.broadcast_object_list(folder)
        while step < steps:
            sampler.set_epoch(step)
            for batch in loader:
                optimizer.zero_grad()
                model(**batch).loss.backward()
                optimizer.step()
                step += 1
                if step == steps // 2:
                    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
                    dcp.save(state, checkpoint_id=f"{folder[0]}/half")
                    dcp.load(state, checkpoint_id=f"{folder[0]}/half")
                    set_optimizer_state_dict(model, optimizer, state["optimizer"])
                if step == steps:
                    break
        distance = optimizer.drift().distance
        weights = {name: x.full_tensor() for name, x in get_model_state_dict(model).items()}
        if rank == 0:
            _, whole, _, _ = load()
            whole.load_state_dict(weights)
            print(f"distance to the pretrained weights: {distance:.3f}")
            print(f"test accuracy: {accuracy(whole, test):.3f}")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
