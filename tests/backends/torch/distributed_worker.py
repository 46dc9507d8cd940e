"""One process of a distributed run: `python distributed_worker.py CASE RANK WORLD FOLDER [option=value ...]`.

Trains a small model on the same batch in every process, so that the averaged gradient is each one's own and
the trajectory must be that of one process, bit for bit. Rank 0 leaves the weights in FOLDER/out.pt.
"""

from __future__ import annotations

import contextlib
import copy
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from recadam_core import Sigmoid
from recadam_torch import Anchors, RecAdam, anchor, param_groups
from recadam_torch.starts import Start

SETTINGS = {"lr": 1e-2, "gamma": 10.0, "annealing": Sigmoid(k=0.3, t0=15)}


def pretrained(seed=0):
    """Sizes that two processes cannot share evenly."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def batch(t):
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(t))


def train(model, optimizer, steps, backward=torch.Tensor.backward):
    dtype = next(model.parameters()).dtype
    for t in steps:
        optimizer.zero_grad()
        backward(model(batch(t).to(dtype)).square().mean())
        optimizer.step()


def make(model, option):
    """From the file, or as the model is."""
    if "pulled" in option:  # another optimizer, with the pull around it
        optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-2)
        if "started" in option:  # as a trainer's callback does it
            settings = {"pull": 0.3, "annealing": SETTINGS["annealing"], "importance": None}
            start = Start(model, optimizer, Path(option["started"]), (), settings)
            first = not dist.is_initialized() or dist.get_rank() == 0
            optimizer.handle = start.again(5) if "start" in option else start.first(True, writes=first)
            return optimizer
        anchors = Anchors.of(model, option["anchors"]) if "anchors" in option else None
        optimizer.handle = anchor(optimizer, anchors, pull=0.3, annealing=SETTINGS["annealing"])
        return optimizer
    if "anchors" in option:
        anchors = Anchors.of(model, option["anchors"], place=option.get("place", "device"))
        return RecAdam(param_groups(model, anchors), **SETTINGS)
    return RecAdam(model.named_parameters(), **SETTINGS, save_anchors="save" in option)


def single(rank, folder, option):
    model = pretrained()
    return model, make(model, option)


def ddp(rank, folder, option):
    model = nn.parallel.DistributedDataParallel(pretrained())
    return model, make(model, option)


def ddp_after(rank, folder, option):
    """The optimizer is made first, of weights that each process has drawn for itself; DDP sends rank 0's."""
    model = pretrained(seed=rank)
    optimizer = make(model, option)
    return nn.parallel.DistributedDataParallel(model), optimizer


def accelerated_ddp(rank, folder, option):
    """As `ddp_after`, and accelerate loads the optimizer's own state into it meanwhile."""
    from accelerate import Accelerator

    model = pretrained(seed=rank)
    model, optimizer = Accelerator(cpu=True).prepare(model, make(model, option))
    optimizer.recadam = optimizer.optimizer
    return model, optimizer


def fsdp2(rank, folder, option):
    model = sharded(pretrained())
    return model, make(model, option)


def fsdp2_loaded(rank, folder, option):
    """The pretrained weights are loaded after the optimizer was made, and are other ones in rank 0 alone."""
    model = pretrained()
    with torch.no_grad():
        for p in model.parameters():
            p[0] += 1
    optimizer = make(sharded(model), option)
    set_model_state_dict(model, pretrained().state_dict(), options=StateDictOptions(full_state_dict=True))
    return model, optimizer


def sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (model[0], model[2], model):
        fully_shard(module, mesh=mesh)
    return model


def accelerated(rank, folder, option):
    """The optimizer is made before the model is sharded, and its parameters are replaced."""
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=10, cpu_ram_efficient_loading=False
    )
    accelerator = Accelerator(cpu=True)
    # accelerate shards on accelerators only; its code for that runs here, too.
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    model = pretrained()
    model, optimizer = accelerator.prepare(model, make(model, option))
    optimizer.recadam = optimizer.optimizer
    return model, optimizer


def zero(rank, folder, option):
    """DeepSpeed makes one flat tensor of each group and gives each process a part."""
    os.environ.update(DS_ACCELERATOR="cpu", TORCH_EXTENSIONS_DIR=option["extensions"])
    import deepspeed

    model = pretrained()
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": {"stage": int(option["stage"])},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": "bf16" in option},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=make(model, option), config=config)
    engine.recadam = engine.optimizer.optimizer
    return engine, engine


def redundancy(rank, folder):
    """Torch's ZeroRedundancyOptimizer: each process steps some parameters, one saves the states of all."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def start():
        model = nn.parallel.DistributedDataParallel(pretrained())
        return model, ZeroRedundancyOptimizer(model.parameters(), RecAdam, **SETTINGS)

    model, optimizer = start()
    train(model, optimizer, range(5))
    optimizer.consolidate_state_dict()
    if rank == 0:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "saved.pt")
    dist.barrier()
    train(model, optimizer, range(5, 12))
    saved = torch.load(folder / "saved.pt", weights_only=True)
    other, resumed = start()
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(other, resumed, range(5, 12))
    return {"straight": full(model), "resumed": full(other), "stepped": len(resumed.optim.state)}


def broadcast(rank, folder):
    """A checkpoint that one process has, and all load; one parameter is frozen."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)

    def start():
        model, optimizer = fsdp2(rank, folder, {})
        model[0].bias.requires_grad_(False)
        return model, optimizer

    model, optimizer = start()
    train(model, optimizer, range(5))
    whole = StateDictOptions(full_state_dict=True)
    weights = get_model_state_dict(model, options=whole)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=whole))
    train(model, optimizer, range(5, 12))
    other, resumed = start()
    set_model_state_dict(other, weights if rank == 0 else {}, options=options)
    set_optimizer_state_dict(other, resumed, state if rank == 0 else {}, options=options)
    train(other, resumed, range(5, 12))
    return {"straight": full(model), "resumed": full(other)}


def full(model):
    return {
        name.removeprefix("module."): p.full_tensor() if hasattr(p, "full_tensor") else p.detach().clone()
        for name, p in model.named_parameters()
    }


def main(case, rank, world, folder, **option):
    rank, world, folder = int(rank), int(world), Path(folder)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world)
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=option.get("port", "29500"))
    if case != "single":
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    if case in ("redundancy", "broadcast"):
        torch.save(globals()[case](rank, folder), folder / f"out{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
        return
    model, optimizer = globals()[case](rank, folder, option)
    inner = getattr(optimizer, "recadam", optimizer)
    start, stop = (int(option.get(key, value)) for key, value in (("start", 0), ("stop", 12)))
    options = StateDictOptions(flatten_optimizer_state_dict="flat" in option)
    if "load" in option:
        state = {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, inner, options=options),
        }
        dcp.load(state, checkpoint_id=option["load"])
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, inner, state["optimizer"], options=options)
    if "zero_load" in option:
        model.load_checkpoint(option["zero_load"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(
            model, optimizer, range(start, stop), model.backward if case == "zero" else torch.Tensor.backward
        )
    if "zero_checkpoint" in option:
        model.save_checkpoint(option["zero_checkpoint"])
    if "checkpoint" in option:
        state = {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, inner, options=options),
        }
        dcp.save(copy.copy(state), checkpoint_id=option["checkpoint"])
    if "pulled" in option:
        handle = inner.handle
        figures = {"weights": full(model), "distance": handle.drift().distance, "anchors": {}, "share": 0.0}
        figures["anchors"] = {i: to_local(s["anchor"]).numel() for i, s in enumerate(handle._states.values())}
        halfway = {} if case == "zero" else handle.interpolate(0.5)
        with contextlib.nullcontext() if case == "zero" else handle.at_anchors():
            figures["reference"] = full(model)
        figures["after"] = full(model)
        figures["between"] = {n.removeprefix("module."): to_whole(x) for n, x in halfway.items()}
        figures["warned"] = [str(w.message) for w in caught if str(w.message).startswith("anchor")]
        finish(figures, folder, rank)
        return
    parts = {}
    for p, entry in inner.state.items():
        star = entry.get("anchor")
        if star is not None:
            parts[inner._left.names[p].removeprefix("module.")] = to_local(star).numel()
    weights, drift = full(model), inner.drift()
    halfway = {} if case == "zero" else inner.interpolate(0.5)
    between = {n: to_whole(x) for n, x in halfway.items()}
    found = {"weights": weights, "anchors": parts, "distance": drift.distance, "share": drift.pull_share}
    found["warned"] = [str(w.message) for w in caught if str(w.message).startswith("RecAdam")]
    found["between"] = {name.removeprefix("module."): x for name, x in between.items()}
    finish(found, folder, rank)


def to_local(x):
    return x.to_local() if hasattr(x, "to_local") else x


def to_whole(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def finish(found, folder, rank):
    torch.save(found, folder / f"out{rank}.pt")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:5], **dict(word.split("=", 1) for word in sys.argv[5:]))
    # All is written. Threads of gloo that are still there may abort the interpreter's own way out.
    sys.stdout.flush()
    os._exit(0)
