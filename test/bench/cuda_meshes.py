"""Ranks on a GPU host, second half: runs what test/bench/cudaMeshesBench.ts wrote, with the packed rankc alone: no Node, no npm, no network.

    python3 test/bench/cuda_meshes.py FOLDER --out RESULTS [--steps 1000] [--long 10000] [--rankc "node dist/cli/rankc.cjs"]

Every plan trains so many steps: its first losses must be those of transformers within 2e-4, and one GPU's. Then one rank of two is
killed, and one is stopped, as if its host hung: the run must end within 30 s and say which. A snapshot of one mesh is gone on from with
another. A long run saves checkpoints: its memory must not grow, its last steps must be as fast as its first, and a run that is resumed
from one of them must have the same losses, bit for bit. The connection of rank 1 to rank 0 is closed: both must end within 30 s. Writes
RESULTS/host.md; exits 1 where one of these does not hold. --rankc: an installed command line in place of the packed one.
"""

import argparse
import datetime
import json
import os
import shutil
import shlex
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

WITHIN = 2e-4
SECONDS = 30
RANKC = []


def command(folder, run, steps, metrics, start=None):
    start = start or ["--init-from", str(folder / "model.safetensors")]
    plan = "plan" if run["ranks"] == 1 and not (folder / run["plan"]).exists() else f"../{run['plan']}"
    return [*(RANKC or [str(folder / "rankc/rankc")]), "run", plan, "--backend", "cuda", "--steps", str(steps), "--metrics", str(metrics),
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


def memory_of(launcher):
    """MiB of host memory of both ranks, and of both GPUs."""
    host = 0
    for rank in (0, 1):
        process = rank_of(launcher, rank)
        if process:
            status = (Path("/proc") / str(process) / "status").read_text()
            host += next((int(line.split()[1]) for line in status.split("\n") if line.startswith("VmRSS")), 0) // 1024
    used = subprocess.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"], capture_output=True, text=True).stdout.split()
    return host, sum(int(x) for x in used)


def long_run(folder, run, steps):
    """Trains `steps` steps with ten checkpoints. Memory in the first and in the last tenth, the speed of both, and how the resumed run differs."""
    metrics, saved = folder / "long.jsonl", folder / "long"
    metrics.unlink(missing_ok=True)
    shutil.rmtree(saved, ignore_errors=True)
    every = steps // 10
    saving = ["--save", str(saved), "--save-every", str(every), "--keep", "2"]
    begun = time.monotonic()
    launcher = subprocess.Popen([*command(folder, run, steps, metrics), *saving], cwd=folder / "rankc", env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    said = []
    reader = threading.Thread(target=lambda: said.extend(launcher.stderr))
    reader.start()
    memory = {}
    while launcher.poll() is None:
        done = len(lines(metrics))
        for name, at in (("first", every + every // 2), ("last", steps - every // 2)):
            if done >= at and name not in memory:
                memory[name] = memory_of(launcher.pid)
        time.sleep(0.2)
    reader.join()
    seconds = time.monotonic() - begun
    rows = lines(metrics)
    again = folder / "long-again.jsonl"
    again.unlink(missing_ok=True)
    older = sorted(saved.glob("step-*"), key=lambda p: int(p.name.split("-")[1])) if saved.exists() else []
    resumed = []
    if launcher.returncode == 0 and len(older) == 2:
        subprocess.run(command(folder, run, steps, again, ["--resume", str(older[0])]), cwd=folder / "rankc", env=environment(), capture_output=True, timeout=240)
        resumed = [r["loss"] for r in lines(again)]
    losses = [r["loss"] for r in rows]
    speed = [statistics.median(r["seconds"] for r in part) * 1e3 if part else float("nan") for part in (rows[every:2 * every], rows[-every:])]
    return {"code": launcher.returncode, "steps": len(rows), "seconds": seconds, "memory": memory, "ms": speed, "resumed": len(resumed),
            "same": bool(resumed) and resumed == losses[-len(resumed):], "checkpoints": [p.name for p in older], "last_loss": losses[-1:], "said": said[-8:]}


class Proxy:
    """Forwards the connections of a port to another one, until it is closed."""

    def __init__(self, target):
        self.target, self.sockets = target, []
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                near, _ = self.server.accept()
                far = self.connect()
            except OSError:
                return
            self.sockets += [near, far]
            for a, b in ((near, far), (far, near)):
                threading.Thread(target=self.forward, args=(a, b), daemon=True).start()

    def connect(self):
        """Rank 0 may not listen yet."""
        until = time.monotonic() + 60
        while True:
            try:
                return socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.2)

    def forward(self, a, b):
        try:
            while data := a.recv(1 << 16):
                b.sendall(data)
        except OSError:
            pass

    def close(self):
        """Closes the port and resets its connections."""
        self.server.close()
        for end in self.sockets:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            end.close()


def close_port(folder, run):
    """Starts both ranks as another launcher does, rank 1 through a proxy that closes at step 50. Seconds until both are over, and what was printed."""
    metrics = folder / "port.jsonl"
    metrics.unlink(missing_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = []
    proxy = None
    try:
        for rank in (0, 1):
            if rank == 1:
                proxy = Proxy(port)
            place = {"RANKC_TOKEN": "of this check", "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": proxy.port if proxy else port}
            ranks.append(subprocess.Popen(command(folder, run, 10**6, metrics), cwd=folder / "rankc", env={**environment(), **{k: str(v) for k, v in place.items()}},
                                          stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True))
        begun = time.monotonic()
        while len(lines(metrics)) < 50:
            if any(r.poll() is not None for r in ranks) or time.monotonic() - begun > 120:
                for r in ranks:
                    r.kill()
                raise RuntimeError(f"it did not come to step 50: {[(r.returncode, r.communicate()[1][-600:]) for r in ranks]}")
            time.sleep(0.1)
        proxy.close()
        begun = time.monotonic()
        said = [r.communicate(timeout=90)[1] for r in ranks]
        return {"seconds": time.monotonic() - begun, "code": max(abs(r.returncode) for r in ranks),
                "said": [f"[{i}] {l}" for i, text in enumerate(said) for l in [l for l in text.split("\n") if l and "  loss " not in l][-4:]]}
    except Exception as error:
        return {"seconds": float("inf"), "code": None, "said": [repr(error)[:2000]]}
    finally:
        for r in ranks:
            r.kill()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--long", type=int, default=10000)
    parser.add_argument("--only-port", action="store_true", help="only close the connection of two ranks")
    parser.add_argument("--rankc", default="")
    options = parser.parse_args()
    folder = options.folder.resolve()
    RANKC.extend(str(Path(word).resolve()) if Path(word).exists() else word for word in shlex.split(options.rankc))
    if RANKC:
        (folder / "rankc").mkdir(exist_ok=True)
    else:
        with tarfile.open(folder / "rankc.tar.xz") as archive:
            archive.extractall(folder / "rankc", filter="data")
    host = json.loads((folder / "host.json").read_text())
    gpus = subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"], capture_output=True, text=True).stdout.strip().split("\n")
    there = [run for run in host["runs"] if run["ranks"] <= len(gpus)]
    if options.only_port:
        print(json.dumps(close_port(folder, next(run for run in there if run["ranks"] == 2)), indent=1))
        return
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
    if two:
        got = results["closed"] = close_port(folder, two)
        if not got["seconds"] < SECONDS or got["code"] == 0:
            bad.append("the connection to rank 0 was closed: a rank went on")
        faults += ["", f"The connection of rank 1 to rank 0 closed: both were over after {got['seconds']:.1f} s:", "", "```text", *got["said"], "```"]
        print("\n".join(faults[-len(got["said"]) - 4:]), flush=True)
    expert = by_name.get("expert 2")
    if expert and options.long:
        got = results["long"] = long_run(folder, expert, options.long)
        growth = [b - a for a, b in zip(got["memory"]["first"], got["memory"]["last"])] if len(got["memory"]) == 2 else [float("inf")]
        if got["code"] != 0 or got["steps"] != options.long or not got["same"] or growth[-1] != 0 or growth[0] > 64 or got["ms"][1] > 1.05 * got["ms"][0]:
            bad.append("the long run:\n\n```text\n" + "".join(got["said"]) + "\n```")
        faults += ["", f"expert 2, {got['steps']} of {options.long} steps in {got['seconds']:.1f} s, ten checkpoints, the newest two kept ({', '.join(got['checkpoints'])}): "
                   f"{got['ms'][0]:.2f} ms a step in the second tenth, {got['ms'][1]:.2f} in the last; host memory of both ranks and memory of both GPUs, MiB: {got['memory'].get('first')} then {got['memory'].get('last')}; "
                   f"{got['resumed']} steps resumed from {got['checkpoints'][:1]}: losses {'equal bit for bit' if got['same'] else 'differ'}."]
        print(faults[-1], flush=True)
    command_line = " ".join(["python3", *sys.argv])
    text = "\n".join([
        "# Ranks on a GPU host", "",
        f"{datetime.date.today()}; {len(gpus)} x {gpus[0]}. `npx tsx test/bench/cudaMeshesBench.ts`, then `{command_line}`: {host['model']} in fp32 with the packed rankc.", "",
        *table, *faults, *(["", "Not as it should be:", "", *bad] if bad else []), ""])
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "host.md").write_text(text)
    (options.out / "host.json").write_text(json.dumps(results))
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
