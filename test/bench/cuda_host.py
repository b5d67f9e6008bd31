"""Ranks on a GPU host, second half: runs what test/bench/cudaHostBench.ts wrote, with the packed rankc alone: no Node, no npm, no network.

    python3 test/bench/cuda_host.py FOLDER --out RESULTS [--steps 1000]

Every plan trains so many steps: its first losses must be those of transformers within 2e-4, and one GPU's. Then one rank of two is
killed, and one is stopped, as if its host hung: the run must end within 30 s and say which. A snapshot of one mesh is gone on from with
another. Writes RESULTS/host.md; exits 1 where
one of these does not hold.
"""

import argparse
import datetime
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import time
from pathlib import Path

WITHIN = 2e-4
SECONDS = 30


def command(folder, run, steps, metrics, start=None):
    start = start or ["--init-from", str(folder / "model.safetensors")]
    plan = "plan" if run["ranks"] == 1 and not (folder / run["plan"]).exists() else f"../{run['plan']}"
    return [str(folder / "rankc/rankc"), "run", plan, "--backend", "cuda", "--steps", str(steps), "--metrics", str(metrics),
            *start, "--data-dir", str(folder)]


def environment():
    """What a host has, without the folders of other programs."""
    return {**{k: v for k, v in os.environ.items() if not k.startswith("npm_")}, "NCCL_NVLS_ENABLE": "0", "RANKC_TIMEOUT": "120"}


def lines(metrics):
    """A line that is being written is not there yet."""
    return [json.loads(line) for line in metrics.read_text().split("\n")[:-1]] if metrics.exists() else []


def train(folder, run, steps, start=None):
    metrics = folder / f"{run['plan']}.jsonl"
    metrics.unlink(missing_ok=True)
    begun = time.monotonic()
    try:
        done = subprocess.run(command(folder, run, steps, metrics, start), cwd=folder / "rankc", env=environment(), capture_output=True, text=True, timeout=240)
        code, said = done.returncode, done.stderr
    except subprocess.TimeoutExpired as late:
        code, said = "none: it did not end within 240 s", (late.stderr or b"").decode()
    rows = lines(metrics)
    return {"code": code, "said": said[-2000:], "seconds": time.monotonic() - begun, "losses": [r["loss"] for r in rows],
            "ms": statistics.median(r["seconds"] for r in rows[10:]) * 1e3 if len(rows) > 10 else float("nan")}


def go_on(folder, before, after, alone):
    """Ten steps of one plan, a snapshot, ten more of another plan from it: how far these are from one GPU's, and the seconds of both runs."""
    saved = folder / "saved"
    shutil.rmtree(saved, ignore_errors=True)
    first = train(folder, before, 10, ["--init-from", str(folder / "model.safetensors"), "--save", str(saved)])
    then = train(folder, after, 20, ["--resume", str(saved)])
    complete = first["code"] == 0 and then["code"] == 0 and len(then["losses"]) == 10
    far = max(abs(x - y) for x, y in zip(then["losses"], alone[10:20])) if complete else float("inf")
    return far, first["seconds"] + then["seconds"], first["said"] + then["said"]


def rank_of(launcher, rank):
    """The process of a rank: a child of the launcher, told so by its environment."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            told = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == launcher and f"RANK={rank}".encode() in told:
            return int(entry.name)
    return None


def lose(folder, run, how):
    """Sends a signal to rank 1 in the middle of a run. Seconds until all is over, the exit code, and what was said."""
    metrics = folder / "lost.jsonl"
    metrics.unlink(missing_ok=True)
    launcher = subprocess.Popen(command(folder, run, 10**6, metrics), cwd=folder / "rankc", env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        begun = time.monotonic()
        while len(lines(metrics)) < 50:
            if launcher.poll() is not None or time.monotonic() - begun > 120:
                raise RuntimeError(f"it did not come to step 50: {launcher.poll()}")
            time.sleep(0.1)
        lost = rank_of(launcher.pid, 1)
        os.kill(lost, how)
        begun = time.monotonic()
        _, said = launcher.communicate(timeout=90)
        return {"seconds": time.monotonic() - begun, "code": launcher.returncode, "said": [l for l in said.split("\n") if l and "  loss " not in l][-8:]}
    except Exception as error:
        return {"seconds": float("inf"), "code": None, "said": [repr(error)[:300]]}
    finally:
        launcher.kill()
        for rank in (0, 1):
            left = rank_of(launcher.pid, rank)
            if left:
                os.kill(left, signal.SIGKILL)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    folder = options.folder.resolve()
    with tarfile.open(folder / "rankc.tar.xz") as archive:
        archive.extractall(folder / "rankc", filter="data")
    host = json.loads((folder / "host.json").read_text())
    gpus = subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"], capture_output=True, text=True).stdout.strip().split("\n")
    there = [run for run in host["runs"] if run["ranks"] <= len(gpus)]
    results = {}
    bad = []
    alone = None
    table = ["| mesh | ranks | steps done | far from transformers, 20 losses | far from one GPU | ms a step | in all |", "|---|---|---|---|---|---|---|"]
    for run in there:
        got = results[run["name"]] = train(folder, run, options.steps)
        alone = alone or got["losses"]
        first = range(len(host["losses"]))
        complete = got["code"] == 0 and len(got["losses"]) == options.steps
        far = [max((abs(got["losses"][i] - want[i]) for i in first), default=float("inf")) if complete else float("inf") for want in (host["losses"], alone)]
        if not complete or not max(far) < WITHIN:
            bad.append(f"{run['name']}: exit {got['code']}\n\n```text\n{got['said']}\n```")
        table.append(f"| {run['name']} | {run['ranks']} | {len(got['losses'])} | {far[0]:.1e} | {far[1]:.1e} | {got['ms']:.2f} | {got['seconds']:.1f} s |")
        print(table[-1], flush=True)
    faults = []
    by_name = {run["name"]: run for run in there}
    for before, after in (("data 2, distributed optimizer", "one GPU"), ("one GPU", "pipeline 2")):
        if before not in by_name or after not in by_name or not alone:
            continue
        far, seconds, said = go_on(folder, by_name[before], by_name[after], alone)
        faults += ["", f"A snapshot of {before} after 10 steps, gone on from with {after} to 20: {far:.1e} far from one GPU's losses; {seconds:.1f} s in all."]
        print(faults[-1], flush=True)
        if not far < WITHIN:
            bad.append(f"a snapshot of {before} with {after}:\n\n```text\n{said}\n```")
    two = next((run for run in there if run["ranks"] == 2), None)
    for name, how in (("killed (SIGKILL)", signal.SIGKILL), ("stopped (SIGSTOP)", signal.SIGSTOP)) if two else ():
        got = results[name] = lose(folder, two, how)
        if not got["seconds"] < SECONDS or got["code"] == 0:
            bad.append(f"a rank {name}: the others went on")
        faults += ["", f"Rank 1 {name}: all was over after {got['seconds']:.1f} s, exit {got['code']}:", "", "```text", *got["said"], "```"]
        print("\n".join(faults[-len(got["said"]) - 4:]), flush=True)
    command_line = " ".join(["python3", *sys.argv])
    text = "\n".join([
        "# Ranks on a GPU host", "",
        f"{datetime.date.today()}; {len(gpus)} x {gpus[0]}. `npx tsx test/bench/cudaHostBench.ts`, then `{command_line}`: {host['model']} in fp32 with the packed rankc.", "",
        *table, *faults, *(["", "Not as it should be:", "", *bad] if bad else []), ""])
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "host.md").write_text(text)
    (options.out / "host.json").write_text(json.dumps(results))
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
