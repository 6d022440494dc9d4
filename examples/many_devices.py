"""Train under FSDP2 on several processes, save, and go on with another number of them (gloo, on the CPU).

    torchrun --standalone --nproc-per-node 4 examples/many_devices.py --folder saved --steps 10
    torchrun --standalone --nproc-per-node 2 examples/many_devices.py --folder saved --steps 20

The losses are those of one process, to rounding. A save has a folder of its own, so that one that is cut short is left
aside: without its file ``.metadata`` it is not complete.
"""

import argparse
import gc
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import precond_ref_torch
from precond_ref.problems import load_digits

BATCH = 48
"""Images of a step, on all ranks together."""


def train(folder: Path, steps: int) -> None:
    """Go on from the last complete save in ``folder``, and save after ``steps`` steps."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    images, labels = map(torch.as_tensor, load_digits())
    inputs, labels = images.reshape(len(images), -1).double() / 16, labels.long()

    torch.manual_seed(0)  # the same start on every rank
    model = nn.Sequential(nn.Linear(64, 30), nn.Tanh(), nn.Linear(30, 10)).double()
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
    optimizer = precond_ref_torch.ASGO(precond_ref_torch.param_groups_for(model), lr=1e-2)  # after fully_shard

    begin = max((int(file.parent.name) for file in folder.glob("*/.metadata")), default=0)
    if begin:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / str(begin))
        set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)

    for step in range(begin, steps):
        rows = slice(step * BATCH + rank, (step + 1) * BATCH, ranks)  # this rank's share
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs[rows]), labels[rows])
        loss.backward()
        optimizer.step()
        mean = loss.detach() / ranks
        dist.all_reduce(mean)
        if rank == 0 and step % 5 == 4:
            print(f"step {step + 1}, {ranks} ranks: loss {float(mean):.9f}")

    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / str(steps))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of the saves")
    parser.add_argument("--steps", type=int, default=10, help="number of the last step")
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    train(arguments.folder, arguments.steps)
    gc.collect()  # the model goes before its process group
    dist.destroy_process_group()
