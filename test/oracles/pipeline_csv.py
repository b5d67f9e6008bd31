"""Runs pipeline schedules that `rankc export pipeline-csv` wrote through torch.distributed.pipelining, on the CPU.

    python3 test/oracles/pipeline_csv.py test/fixtures/pipeline/*.csv

For each file: PyTorch's validation of the schedule, its simulation with sends and receives (which finds deadlocks), and one real step: a
process for each row (gloo), a small module for each virtual stage, and gradients that equal those of all stages in sequence. Prints one line a
file and exits with 1 if one fails.
"""
import csv
import os
import re
import socket
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining import schedules as S

WIDTH = 8


def shape_of(path):
    """Returns the rows, the virtual stages and the microbatches of a file."""
    cells = [re.fullmatch(r"(\d+)[FIBW](\d+)", c) for row in csv.reader(open(path, newline="")) for c in row if c]
    rows = sum(1 for _ in csv.reader(open(path, newline="")))
    return rows, 1 + max(int(m[1]) for m in cells), 1 + max(int(m[2]) for m in cells)


def modules(stages):
    made = []
    for stage in range(stages):
        torch.manual_seed(stage)
        made.append(torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh()).double())
    return made


def batch(microbatches):
    torch.manual_seed(1000)
    return torch.randn(2 * microbatches, WIDTH, dtype=torch.double), torch.randn(2 * microbatches, WIDTH, dtype=torch.double)


def loss_of(y, target):
    return torch.nn.functional.mse_loss(y, target, reduction="sum")


def step(rank, path, rows, stages, microbatches, port, out):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(rows))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=rows)
    all_modules = modules(stages)
    mine = list(range(rank, stages, rows))
    built = [PipelineStage(all_modules[s], s, stages, torch.device("cpu")) for s in mine]
    schedule = S._PipelineScheduleRuntime(built, microbatches, loss_fn=loss_of, scale_grads=False)
    schedule._load_csv(path, format="compute_only")
    x, target = batch(microbatches)
    losses = []
    args = (x,) if 0 in mine else ()
    kwargs = {"target": target, "losses": losses} if stages - 1 in mine else {}
    schedule.step(*args, **kwargs)
    torch.save({s: [p.grad for p in all_modules[s].parameters()] for s in mine}, f"{out}.{rank}")
    dist.barrier()
    dist.destroy_process_group()


def check(path):
    rows, stages, microbatches = shape_of(path)
    actions = {r: [S._Action.from_str(c) for c in row] for r, row in enumerate(csv.reader(open(path, newline="")))}
    rank_of = S._validate_schedule(actions, rows, stages, microbatches)
    assert rank_of == {s: s % rows for s in range(stages)}, rank_of
    with_moves = S._add_send_recv(
        {r: [a for a in row if a is not None] for r, row in actions.items()}, stage_to_rank=lambda s: rank_of[s], num_stages=stages
    )
    simulated = S._simulate_comms_compute(with_moves, lambda s: rank_of[s], stages)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = f"/tmp/pipeline_csv.{os.getpid()}"
    mp.spawn(step, (path, rows, stages, microbatches, port, out), nprocs=rows)
    reference = modules(stages)
    x, target = batch(microbatches)
    y = x
    for m in reference:
        y = m(y)
    loss_of(y, target).backward()
    worst = 0.0
    for rank in range(rows):
        for s, grads in torch.load(f"{out}.{rank}").items():
            for own, p in zip(grads, reference[s].parameters()):
                worst = max(worst, ((own - p.grad).abs().max() / p.grad.abs().max()).item())
        os.remove(f"{out}.{rank}")
    assert worst < 1e-9, worst
    steps = max(len(row) for row in simulated.values())
    return f"{rows} ranks, {stages} stages, {microbatches} microbatches, {steps} simulated steps; largest relative error of gradients {worst:.1e}"


if __name__ == "__main__":
    print(f"torch {torch.__version__}")
    failed = False
    for path in sys.argv[1:]:
        try:
            print(f"ok      {path}: {check(path)}", flush=True)
        except Exception as error:  # a report of each file
            failed = True
            print(f"FAILED  {path}: {type(error).__name__}: {error}", flush=True)
    sys.exit(1 if failed else 0)
