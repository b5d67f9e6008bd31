"""Parts of text_device.sh: the corpus, the tokenizer, the jobs, and the table of results.

corpus FOLDER MIB        code.jsonl and prose.jsonl from texts that lie on this machine, shuffled; and the last ones in the order of folders
tokenizer FOLDER IDS     tokenizer.json, a byte-level BPE, trained on a sixth of the documents
jobs FOLDER OUT STEPS EVERY DEVICE IDS SIZE   the jobs; SIZE is large or small
report FOLDER OUT        reads the files of all runs and prints the table; the event files with TensorBoard's own reader
"""

import hashlib
import json
import os
import random
import re
import statistics
import sys
import sysconfig

ROOTS = [
    sysconfig.get_paths()["purelib"],
    *["/usr/lib/python3", "/usr/include", "/usr/local/include", "/usr/local/cuda/include", "/usr/share", "/usr/lib", "/usr/local/lib", "/opt"],
]
CODE = {".py", ".pyi", ".h", ".hpp", ".hxx", ".hh", ".c", ".cc", ".cpp", ".cu", ".cuh", ".js", ".ts", ".pl", ".pm", ".sh", ".cmake", ".inc", ".rs", ".go"}
PROSE = {".md", ".rst", ".txt", ".text"}


def documents(most: int):
    """Yields (kind, text) of each file once, in the order of folders: up to `most` bytes of code, and a quarter of that of prose."""
    seen, names, left = set(), set(), {"code": most, "prose": most // 4}
    for root in ROOTS:
        for folder, folders, files in os.walk(root):
            folders.sort()
            for name in sorted(files):
                path = os.path.join(folder, name)
                end = os.path.splitext(name)[1].lower()
                is_prose = end in PROSE or folder.startswith("/usr/share/doc")
                if not is_prose and end not in CODE:
                    continue
                kind = "prose" if is_prose else "code"
                real = os.path.realpath(path)
                if left[kind] <= 0 or real in names:
                    continue
                names.add(real)
                try:
                    size = os.path.getsize(real)
                    if not 200 <= size <= 1_000_000:
                        continue
                    with open(real, "rb") as file:
                        content = file.read()
                    text = content.decode("utf-8")
                except (OSError, UnicodeDecodeError):
                    continue
                digest = hashlib.sha1(content).digest()
                if "\0" in text or digest in seen:
                    continue
                seen.add(digest)
                left[kind] -= size
                yield kind, text
            if max(left.values()) <= 0:
                return


def corpus(at: str, most: str) -> None:
    """Two corpora by kind of text, each shuffled: parts of a split then have one distribution. And the last 2 % in the order of folders."""
    kinds: dict[str, list[str]] = {"code": [], "prose": []}
    for kind, text in documents(int(float(most) * 2**20)):
        kinds[kind].append(json.dumps({"text": text}) + "\n")
    for kind, lines in kinds.items():
        with open(f"{at}/{kind}-by-folder.jsonl", "w", encoding="utf-8") as file:
            file.writelines(lines[-max(1, len(lines) // 50) :])
        random.Random(15).shuffle(lines)
        with open(f"{at}/{kind}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(lines)
        print(f"{kind}: {len(lines)} documents, {sum(map(len, lines)) / 2**20:.0f} MiB")


def tokenizer(at: str, ids: str) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=int(ids), special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )

    def sixth():
        for kind in ("code", "prose"):
            with open(f"{at}/{kind}.jsonl", encoding="utf-8") as file:
                for i, line in enumerate(file):
                    if i % 6 == 0:
                        yield json.loads(line)["text"]

    bpe.train_from_iterator(sixth(), trainer)
    bpe.save(f"{at}/tokenizer.json")
    print(f"tokenizer: {bpe.get_vocab_size()} ids")


SIZES = {
    "large": "{layers: 12, hidden: 768, ffn: 2048, heads: 12, vocab: VOCAB, seq: 1024}",
    "small": "{layers: 2, hidden: 32, ffn: 64, heads: 2, vocab: VOCAB, seq: 32}",
}


def jobs(at: str, steps: str, every: str, device: str, ids: str, size: str) -> None:
    """with: evaluations; without: none; norm: with the norm of the weights too. training, by-folder: the same model, evaluated on other data."""
    vocab = str(-(-int(ids) // 128) * 128)
    sources = "[{path: code, weight: 3}, {path: prose, weight: 1}]"
    by_folder = "[{path: code-by-folder, weight: 3}, {path: prose-by-folder, weight: 1}]"
    evaluation = f"evaluation: {{every: {every}, steps: 60, at_end: true}}"
    split = "split: [90, 5, 5]"
    for name, extra, data in [
        ("with", evaluation, split),
        ("without", "", split),
        ("norm", f"{evaluation}\n  metrics: {{parameter_norm: true}}", split),
        ("training", evaluation, f"validation: {sources}"),
        ("by-folder", evaluation, f"validation: {by_folder}"),
    ]:
        with open(f"{at}/{name}.yaml", "w", encoding="utf-8") as file:
            file.write(
                f"name: text\nmodel: {SIZES[size].replace('VOCAB', vocab)}\nparallel: {{world: 1}}\n"
                f"train:\n  micro_batch: 16\n  global_batch: 16\n  steps: {steps}\n"
                f"  precision: {'bf16' if size == 'large' else 'fp32'}\n  {extra}\n"
                f"  optimizer: {{type: adamw, lr: 6.0e-4, schedule: cosine, warmup_steps: {int(steps) // 20}, decay_steps: {steps}, min_lr: 6.0e-5, weight_decay: 0.1}}\n"
                f"data: {{sources: {sources}, {data}, documents: {{}}}}\ncluster: {{device: {device}}}\n"
            )


def lines(path: str) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def report(at: str, out: str) -> None:
    loss_of = {}
    for name in ("validation", "test", "training", "by-folder"):
        path = f"{at}/eval-{name}.json"
        if os.path.exists(path) and os.path.getsize(path) > 0:
            with open(path, encoding="utf-8") as file:
                found = json.load(file)
            key = "test" if name == "test" else "validation"
            loss_of[name] = found[key]
    scalars = [x for x in lines(f"{at}/log/metrics.jsonl") if "lm loss" in x]
    last = scalars[-125:]
    print(f"mean training loss of the last {len(last)} steps: {statistics.mean(x['lm loss'] for x in last):.4f}")
    print("loss at the end, of       loss    perplexity  by source")
    for name, result in loss_of.items():
        each = ", ".join(f"{s['source']} {s['loss']:.4f}" for s in result["sources"])
        print(f"  {name:<20} {result['loss']:9.4f} {result['perplexity']:11.2f}  {each}")

    print("run          steps  median step [ms]  tokens/s of steps  process [s]  last loss")
    medians: dict[str, list[float]] = {"with": [], "without": [], "norm": []}
    for name in sorted(os.listdir(at)):
        found = re.fullmatch(r"(with|without|norm)-(\d)\.jsonl", name)
        if not found:
            continue
        steps = [x for x in lines(f"{at}/{name}") if "loss" in x]
        steps = steps[min(20, len(steps) // 2) :]  # the first steps are slower
        with open(f"{at}/{name}.wall", encoding="utf-8") as file:
            wall = file.read().strip()
        seconds = statistics.median(x["seconds"] for x in steps)
        medians[found[1]].append(seconds)
        speed = sum(x["tokens"] for x in steps) / sum(x["seconds"] for x in steps)
        print(f"  {name[:-6]:<10} {len(steps):>5}  {1000 * seconds:16.3f}  {speed:17,.0f}  {wall:>11}  {steps[-1]['loss']!r}")
        apart = [[1000 * x["seconds"] for x in steps if ("parameter_norm" in x) == logged] for logged in (True, False)]
        if all(apart):
            print(f"{'':<13}median of steps with the norm {statistics.median(apart[0]):.3f} ms, without {statistics.median(apart[1]):.3f} ms")
    for name, goal in [("with", "at most 1.01"), ("norm", "1.01 at most, with a line of the log every 10 steps")]:
        if medians[name] and medians["without"]:
            print(f"median {name} / median without: {statistics.mean(medians[name]) / statistics.mean(medians['without']):.4f} (goal: {goal})")

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(f"{out}/log", size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    tags = events.Tags()
    print(f"TensorBoard reads {len(tags['scalars'])} scalars, {len(tags['histograms'])} histograms:")
    for tag in tags["scalars"]:
        all_of = events.Scalars(tag)
        print(f"  {tag:<40} {len(all_of):>5} values, step {all_of[0].step} {all_of[0].value:<12.6g} step {all_of[-1].step} {all_of[-1].value:.6g}")
    expected = {x["step"]: x["lm loss"] for x in scalars}
    read = {s.step: s.value for s in events.Scalars("lm loss")}
    worst = max(abs(read[step] - loss) / loss for step, loss in expected.items())
    print(f"lm loss in the event file and in metrics.jsonl: {len(read)} steps, largest relative difference {worst:.1e} (floats of 32 bits)")


if __name__ == "__main__":
    {"corpus": corpus, "tokenizer": tokenizer, "jobs": jobs, "report": report}[sys.argv[1]](*sys.argv[2:])
