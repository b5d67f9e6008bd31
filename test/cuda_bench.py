"""The bench of CUDA kernels, second half: runs what test/cudaBench.ts wrote, beside torch, in one process and by turns.

    python3 test/cuda_bench.py FOLDER --out RESULTS [--only REGEX] [--rounds 21] [--seed N] [--compile]

Each kernel is first checked: fresh random inputs, poisoned outputs, ||out - ref|| / ||ref|| against torch in f32 (f64 for f32
kernels). Then every round times ours and each of torch's by CUDA events, in turn, each after the L2 cache was overwritten and
behind a kernel that waits until all is queued; short ones several times in a row, each time on other buffers. Medians. At the
end the outputs must still have the bits of the first run. Cases run in a process of their own group: a fault or a hang ends that
process, and the next goes on behind the case. Needs torch, cuda.bindings and a GPU of the architecture in cases.json.
"""

import argparse
import ctypes
import datetime
import json
import os
import re
import select
import statistics
import subprocess
import sys
import time
from pathlib import Path

from cuda.bindings import driver as cu

sys.dont_write_bytecode = True
from cuda_bench_torch import DROP_KEY, Cases, poison, torch  # noqa: E402

CASE_SECONDS = 150
FLUSH_BYTES = 256 << 20


# -- the driver


def check(result):
    if result[0] != cu.CUresult.CUDA_SUCCESS:
        raise RuntimeError(str(result[0]))
    return result[1] if len(result) == 2 else result[1:]


MAP_TYPES = {"bf16": "BFLOAT16", "f16": "FLOAT16", "f32": "FLOAT32", "i32": "INT32"}


def tensor_map(arg, tensor):
    """As the runtime encodes it: innermost dim first, strides in bytes."""
    return check(
        cu.cuTensorMapEncodeTiled(
            getattr(cu.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{MAP_TYPES[arg['dtype']]}"),
            len(arg["sizes"]),
            tensor.data_ptr(),
            [cu.cuuint64_t(v) for v in arg["sizes"]],
            [cu.cuuint64_t(v) for v in arg["strides"]],
            [cu.cuuint32_t(v) for v in arg["box"]],
            [cu.cuuint32_t(1)] * len(arg["sizes"]),
            cu.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            getattr(cu.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{arg['swizzle'].upper()}"),
            cu.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            cu.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )


def load(folder, case):
    """Each launch's function, by its entry; modules stay loaded as long as the process."""
    functions = {}
    modules = {}
    for launch in case["launches"]:
        if launch["cubin"] not in modules:
            modules[launch["cubin"]] = check(cu.cuModuleLoadData((folder / launch["cubin"]).read_bytes()))
        function = check(cu.cuModuleGetFunction(modules[launch["cubin"]], launch["entry"].encode()))
        if launch["shared"]:
            most = cu.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            check(cu.cuFuncSetAttribute(function, most, launch["shared"]))
        functions[launch["entry"]] = function
    return functions


def prepared(case, functions, buffers):
    """A call that queues all launches of a case on these buffers. What the pointers lead to lives as long as the call."""
    launches = []
    for launch in case["launches"]:
        values = []
        for arg in launch["args"]:
            if isinstance(arg, dict):
                values.append(tensor_map(arg, buffers[arg["tensor"]]))
            elif arg.startswith("start("):
                values.append(ctypes.c_int(0))
            elif arg.startswith("attr("):
                values.append(ctypes.c_uint(DROP_KEY[int(arg[-2])]))
            else:
                name, _, offset = arg.partition("+")
                values.append(ctypes.c_void_p(buffers[name].data_ptr() + int(offset or 0)))
        places = [int(v.getPtr()) if hasattr(v, "getPtr") else ctypes.addressof(v) for v in values]
        pointers = (ctypes.c_void_p * len(places))(*places)
        launches.append((functions[launch["entry"]], launch["grid"], launch["threads"], launch["shared"], pointers, values))

    def call():
        for function, grid, threads, shared, pointers, _ in launches:
            check(cu.cuLaunchKernel(function, *grid, threads, 1, 1, shared, 0, ctypes.addressof(pointers), 0))

    return call


# -- time


class Clock:
    def __init__(self, rounds):
        self.rounds = rounds
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def median(self, works):
        """Milliseconds of one call of each work, in each round; a work is a list of calls that do the same to other buffers."""
        waits = {}
        for name, calls in works.items():
            for _ in range(2):
                for call in calls:
                    call()
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for call in calls:
                call()
            queued = time.perf_counter() - begin
            torch.cuda.synchronize()
            # cycles at about 2 GHz: longer than the host takes to queue the calls
            waits[name] = int(min(2e8, 2e9 * (1.5 * queued + 5e-5)))
        times = {name: [] for name in works}
        names = list(works)
        for turn in range(self.rounds):
            events = []
            for i in range(len(names)):
                name = names[(turn + i) % len(names)]
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(waits[name])
                self.flush.zero_()
                begin.record()
                for call in works[name]:
                    call()
                end.record()
                events.append((name, begin, end))
            torch.cuda.synchronize()
            for name, begin, end in events:
                times[name].append(begin.elapsed_time(end) / len(works[name]))
        return times


def spread(times):
    ordered = sorted(times)
    return {"ms": statistics.median(ordered), "low": ordered[0], "high": ordered[-1], "times": times}


# -- one case


def error(have, want):
    """||have - want|| / ||want||; of integers the share that differs."""
    have, want = have.reshape(-1), want.reshape(-1)
    if not want.dtype.is_floating_point:
        return (have != want).double().mean().item()
    off = size = 0.0
    for at in range(0, want.numel(), 1 << 27):
        w = want[at : at + (1 << 27)]
        w = w if w.dtype == torch.float64 else w.float()
        off += torch.linalg.vector_norm(have[at : at + (1 << 27)].to(w.dtype) - w, dtype=torch.float64).item() ** 2
        size += torch.linalg.vector_norm(w, dtype=torch.float64).item() ** 2
    return (off**0.5) / (size**0.5) if size else off**0.5


def bits(tensor):
    return tensor.reshape(-1).view(torch.uint8)


def copies_of(case):
    """Sets of buffers: short kernels run several times between two events, so that the events weigh little."""
    seconds = max(case["bytes"] / 4e12, case["flops"] / 6e14)
    return 1 if seconds > 1e-4 else min(12, int(3e-4 / max(seconds, 1e-6)) + 1)


def run_case(folder, case, cases, clock):
    if "error" in case:
        raise RuntimeError(case["error"])
    functions = load(folder, case)
    sets = [cases.fill(case) for _ in range(copies_of(case))]
    scratch = torch.empty(max(case["scratch"], 256), dtype=torch.uint8, device="cuda").fill_(255)
    outputs = [b["name"] for b in case["buffers"] if b["role"] != "in"]
    kept = {b["name"] for b in case["buffers"] if b["role"] == "kept"}
    want, first = cases.reference(case, sets[0]), sets[0]
    before = {name: first[name].clone() for name in kept}
    peers = [cases.peers(case, b) for b in sets]
    calls = [prepared(case, functions, {**b, "scratch": scratch}) for b in sets]
    for b in sets:
        for name in outputs:
            if name not in kept:
                poison(b[name])
    calls[0]()
    torch.cuda.synchronize()
    # what is updated is judged by its change
    errors = {
        name: error(first[name].to(w.dtype) - before[name], w - before[name]) if name in kept else error(first[name], w)
        for name, w in want.items()
    }
    errors = {name: None if e != e else e for name, e in errors.items()}  # JSON has no NaN
    del want, before
    left = [] if kept else [first[name].clone() for name in outputs]
    works = {"ours": calls}
    failures = {}
    for name in peers[0]:
        mine = [p[name] for p in peers]
        try:
            mine[0]()
            torch.cuda.synchronize()
            works[name] = mine
        except Exception as e:  # a backend that this torch or this GPU lacks
            failures[name] = str(e).strip().split("\n")[0][:200]
    torch.cuda.synchronize()
    times = clock.median(works)
    same = all(torch.equal(bits(first[name]), bits(was)) for name, was in zip(outputs, left)) if left else None
    return {
        **{key: case[key] for key in ("name", "kind", "dtype", "flops", "bytes")},
        "ours": spread(times.pop("ours")),
        "peers": [{"name": name, **spread(t)} for name, t in times.items()] + [{"name": n, "error": e} for n, e in failures.items()],
        "errors": errors,
        "same_bits": same,
        "sets": len(sets),
    }


def ceilings(clock):
    """What this GPU moves and multiplies today: a copy of 4 GiB, and a product of 8192 x 8192 x 8192 in bf16."""
    source = torch.empty(1 << 31, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    moved = spread(clock.median({"copy": [lambda: target.copy_(source)]})["copy"])
    del source, target
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    c = torch.empty_like(a)
    product = spread(clock.median({"matmul": [lambda: torch.matmul(a, b.t(), out=c)]})["matmul"])
    return {"copy": {"bytes": 4 << 31, **moved}, "matmul": {"flops": 2 * 8192**3, **product}}


def work(folder, chosen, options):
    """Runs these cases; says on stdout, a line of JSON each, which one begins and what came of it."""
    say = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def tell(**what):
        say.write(json.dumps(what) + "\n")
        say.flush()

    torch.zeros(1, device="cuda")
    torch.backends.cuda.matmul.allow_tf32 = False
    tell(machine={"gpu": torch.cuda.get_device_name(0), "torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()})
    clock = Clock(options.rounds)
    for case in chosen:
        tell(begins=case["name"])
        try:
            if case["name"] == CEILINGS:
                tell(ceilings=ceilings(clock))
            else:
                torch.manual_seed(options.seed + case["index"])
                tell(result=run_case(folder, case, Cases(options.compile), clock))
        except Exception as e:
            tell(failed={"name": case["name"], "error": f"{type(e).__name__}: {str(e).strip()[:600]}"})
            try:
                torch.cuda.synchronize()
            except Exception:
                os._exit(3)
        torch.cuda.empty_cache()
    os._exit(0)


# -- all cases


CEILINGS = "ceilings"


def run_all(options, cases):
    """Hands the cases to a process; where that ends, to another, behind the case it ended in."""
    report = {"machine": {}, "ceilings": None, "results": [], "failed": []}
    queue = [CEILINGS] + [c["name"] for c in cases]
    log = open(options.out / "worker.log", "w")
    while queue:
        command = [sys.executable, __file__, str(options.folder), "--out", str(options.out), "--rounds", str(options.rounds)]
        command += ["--seed", str(options.seed), *(["--compile"] if options.compile else []), "--cases", json.dumps(queue)]
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
        left = len(queue)
        current, ended = None, None
        for line in lines_of(worker):
            if line is None:
                ended = f"nothing heard for {CASE_SECONDS} s"
                worker.kill()
                break
            said = json.loads(line)
            if "machine" in said:
                report["machine"] = said["machine"]
            elif "begins" in said:
                current = said["begins"]
                queue.remove(current)
            else:
                current = None
                if "ceilings" in said:
                    report["ceilings"] = said["ceilings"]
                elif "result" in said:
                    report["results"].append(said["result"])
                else:
                    report["failed"].append(said["failed"])
                (options.out / "results.json").write_text(json.dumps(report, indent=1))
        code = worker.wait()
        if current is not None:
            report["failed"].append({"name": current, "error": ended or f"the process ended with {code}: see worker.log"})
        elif not report["machine"]:
            log.flush()
            sys.exit(f"torch does not begin here:\n{(options.out / 'worker.log').read_text()[-2000:]}")
        if len(queue) == left:
            report["failed"] += [{"name": name, "error": f"the process ended with {code} before it began"} for name in queue]
            break
    return report


def lines_of(worker):
    """Lines as they come; None once nothing came for too long."""
    rest = b""
    while True:
        ready, _, _ = select.select([worker.stdout], [], [], CASE_SECONDS)
        if not ready:
            yield None
            return
        piece = os.read(worker.stdout.fileno(), 1 << 16)
        if not piece:
            return
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines


def smi():
    query = "name,driver_version,clocks.sm,power.draw"
    try:
        return subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True).stdout.strip().split("\n")[0]
    except OSError:
        return "nvidia-smi is missing"


def table(report):
    """One line per case, and one more for every further peer. Speed: ours over the peer's. Floor: the copy's and the product's rate."""
    rates = report["ceilings"] or {}
    copy = rates["copy"]["bytes"] / rates["copy"]["ms"] * 1e3 if rates else None
    product = rates["matmul"]["flops"] / rates["matmul"]["ms"] * 1e3 if rates else None
    lines = ["| case | ours ms | rate | % floor | peer | peer ms | speed | rel err |", "|---|---|---|---|---|---|---|---|"]
    if rates:
        lines.append(f"| copy 4 GiB | | | | copy_, {copy / 1e9:.0f} GB/s | {rates['copy']['ms']:.4g} | | |")
        lines.append(f"| 8192x8192x8192 A·Bᵀ | | | | matmul, {product / 1e12:.0f} TFLOP/s | {rates['matmul']['ms']:.4g} | | |")
    for r in report["results"]:
        ms = r["ours"]["ms"]
        rate = f"{r['flops'] / ms / 1e9:.0f} TFLOP/s" if r["flops"] else f"{r['bytes'] / ms / 1e6:.0f} GB/s"
        known = rates and (not r["flops"] or r["dtype"] == "bf16")
        floor = f"{max(r['bytes'] / copy, r['flops'] / product) * 1e5 / ms:.0f}" if known else "–"
        worst = max(float("inf") if e is None else e for e in r["errors"].values())  # NaN: not all is written
        judged = f"{worst:.1e}" + ("" if worst < limit(r) else " WRONG") + (" MOVES" if r["same_bits"] is False else "")
        first = f"| {r['name']} | {ms:.4g} | {rate} | {floor} |"
        for peer in sorted(r["peers"], key=lambda p: p.get("ms", float("inf"))) or [None]:
            if peer is None:
                compared = " | | |"
            elif "error" in peer:
                compared = f" {peer['name']}: {peer['error'][:60]} | | |"
            else:
                compared = f" {peer['name']} | {peer['ms']:.4g} | {peer['ms'] / ms:.2f} |"
            lines.append(f"{first}{compared} {judged} |")
            first, judged = "| | | | |", ""
    return lines


def limit(result):
    """Operands in bf16 leave between 1e-3 and 1e-2; f32 far less than 1e-3."""
    return 1e-3 if result["dtype"] == "f32" and result["kind"] != "cast" else 2e-2


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3), "little"))
    parser.add_argument("--compile", action="store_true", help="torch.compile too, where torch takes several kernels")
    parser.add_argument("--cases", help=argparse.SUPPRESS)
    options = parser.parse_args()
    written = json.loads((options.folder / "cases.json").read_text())
    cases = [{**c, "index": i} for i, c in enumerate(written["cases"])]
    if options.cases is not None:
        by_name = {CEILINGS: {"name": CEILINGS}, **{c["name"]: c for c in cases}}
        work(options.folder, [by_name[name] for name in json.loads(options.cases)], options)
    options.out.mkdir(parents=True, exist_ok=True)
    before = smi()
    report = run_all(options, [c for c in cases if re.search(options.only, c["name"])])
    machine = report["machine"]
    report["command"] = " ".join(["python3", *sys.argv])
    header = [
        f"{datetime.date.today()}; {machine['gpu']}; torch {machine['torch']}, CUDA {machine['cuda']}, cuDNN {machine['cudnn']}",
        f"GPU, driver, clock and power before: {before}; after: {smi()}",
        f"`{report['command']}` (seed {options.seed}); {options.rounds} rounds by turns, medians, L2 overwritten before each, random normal data",
        "",
    ]
    failed = [f"- {f['name']}: {f['error']}" for f in report["failed"]]
    text = "\n".join([*header, *table(report), *(["", "Failed:", *failed] if failed else [])]) + "\n"
    report["header"] = header
    (options.out / "results.json").write_text(json.dumps(report, indent=1))
    (options.out / "results.md").write_text(text)
    sys.stdout.write(text)
    sys.exit(1 if failed or "WRONG" in text or "MOVES" in text else 0)


if __name__ == "__main__":
    main()
