/** The reader of launch scripts: what bash would pass to a command, without running anything. Each script ends in a command `launch`. */
// biome-ignore-all lint/suspicious/noTemplateCurlyInString: these are expansions of bash
import { describe, expect, test } from "vitest";
import type { ScriptRead } from "../../src/convert/megatron/bash/calls.ts";
import { readScript } from "../../src/convert/megatron/bash/script.ts";
import { shownText } from "../../src/convert/megatron/bash/text.ts";

interface Given {
  readonly words?: readonly string[];
  readonly set?: Readonly<Record<string, string>>;
  readonly files?: Readonly<Record<string, string>>;
}

const read = (script: string, { words = [], set = {}, files = {} }: Given = {}): ScriptRead =>
  readScript(script, { file: "run.sh", words, pinned: new Map(Object.entries(set)), readScript: (path) => files[path] });

/** The words of `launch`. */
function launched(script: string, given: Given = {}): readonly string[] {
  const command = read(script, given).commands.find(({ words }) => shownText(words[0] ?? []) === "launch");
  if (!command) throw new Error("the script does not reach launch");
  return command.words.slice(1).map(shownText);
}

const holeIn = (script: string, given: Given = {}) =>
  read(script, given)
    .commands.flatMap(({ words }) => words.flat())
    .find((part) => typeof part !== "string");

describe("variables", () => {
  test.each([
    ["A=1; launch $A ${A}x", ["1", "1x"]],
    ["launch ${A:-8} ${B:-${C:-9}}", ["8", "9"]],
    ["A=; launch x${A:-1} x${A-1}", ["x1", "x"]],
    [": ${A:=3}; launch $A", ["3"]],
    ["A=2; launch ${A:+yes} z${B:+no}", ["yes", "z"]],
    ["A='a b'; launch $A \"$A\"", ["a", "b", "a b"]],
    ["A=run.tar.gz; launch ${A%.*} ${A%%.*} ${A#*.} ${A##*.} ${A/tar/zip} ${#A}", ["run.tar", "run", "tar.gz", "gz", "run.zip.gz", "10"]],
    ["A=MiXed; launch ${A^^} ${A,,} ${A:1:2}", ["MIXED", "mixed", "iX"]],
    ["A=B; B=4; launch ${!A}", ["4"]],
    ["A=1 launch $A", ["$A"]],
    ["export A=1 B=2; launch $A $B", ["1", "2"]],
    ["launch [0]*3+[1]*58 '([0]*1)'", ["[0]*3+[1]*58", "([0]*1)"]],
    ["launch --a \\\n  --b # comment", ["--a", "--b"]],
  ])("%s", (script, expected) => {
    expect(launched(script)).toEqual(expected);
  });
});

describe("arrays", () => {
  test.each([
    ['A=(\n  --x 1 # why\n  "--y 2"\n); launch ${A[@]}', ["--x", "1", "--y", "2"]],
    ['A=("--y 2"); launch "${A[@]}"', ["--y 2"]],
    ['A=(a); A+=(b c); launch "${A[@]}" ${#A[@]} ${A[1]}', ["a", "b", "c", "3", "b"]],
    ['A=(a); A=("${A[@]}" --more); launch ${A[*]}', ["a", "--more"]],
    ["A=(a b c); launch ${A[@]:1}", ["b", "c"]],
    ["A=(); launch x ${A[@]}", ["x"]],
  ])("%s", (script, expected) => {
    expect(launched(script)).toEqual(expected);
  });
});

describe("arithmetic", () => {
  test.each([
    ["G=8; N=4; launch $(($G*$N)) $((G * N / 3)) $(( (N > 1) ? 1 : 0 ))", ["32", "10", "1"]],
    ["A=7; ((A++)); ((A += 2)); launch $A $((A % 4))", ["10", "2"]],
    ["launch $((2**10)) $((010)) $((0x10))", ["1024", "8", "16"]],
    ["let=1; launch $(expr 3 + 4) $(seq 1 3)", ["7", "1", "2", "3"]],
  ])("%s", (script, expected) => {
    expect(launched(script)).toEqual(expected);
  });

  test("an unset operand is a hole that names the variable", () => {
    expect(holeIn("launch $((NNODES * 8))")).toMatchObject({ variable: "NNODES", line: 1, why: "NNODES is not set" });
  });
});

describe("conditions", () => {
  test.each([
    ['[ -n "${KEY}" ]', false],
    ["[ -z ${KEY} ]", true],
    ["[[ -n $KEY ]]", false],
    ["[ 2 -gt 1 ]", true],
    ["[[ ab == a* && ! x == y ]]", true],
    ["[[ run-12 =~ ^run-[0-9]+$ ]]", true],
    ["[ a = b -o c = c ]", true],
    ['[ "$#" -eq 0 ]', true],
    ["(( 3 > 4 ))", false],
    ["true && false", false],
    ["! false", true],
  ])("%s", (condition, holds) => {
    expect(launched(`if ${condition}; then A=yes; else A=no; fi; launch $A`)).toEqual([holds ? "yes" : "no"]);
  });

  test("both branches of an undecidable condition are read; values that differ become holes", () => {
    const script = "A=1; if [ -f data.bin ]; then A=2; B=3; else B=3; fi; launch $B $A";
    expect(launched(script)).toEqual(["3", "$A"]);
    expect(holeIn(script)).toMatchObject({ variable: "A", why: "A depends on a condition that only a shell can decide" });
    expect(launched(script, { set: { A: "5" } })).toEqual(["3", "5"]);
  });

  test("case and elif choose by pattern", () => {
    const script = "case $1 in small|tiny) A=1 ;; *B) A=2 ;; *) A=3 ;; esac; launch $A";
    expect(["tiny", "7B", "else"].map((word) => launched(script, { words: [word] }))).toEqual([["1"], ["2"], ["3"]]);
    const chain = 'if [ "$1" = a ]; then A=1; elif [[ $1 == b ]]; then A=2; else A=3; fi; launch $A';
    expect(["a", "b", "c"].map((word) => launched(chain, { words: [word] }))).toEqual([["1"], ["2"], ["3"]]);
  });
});

describe("loops, functions and other scripts", () => {
  test.each([
    ['for i in 1 2 3; do A+="$i,"; done; launch $A', ["1,2,3,"]],
    ['A=; for ((i = 0; i < 3; i++)); do A="${A}[$i]"; done; launch $A', ["[0][1][2]"]],
    ["for i in {1..4}; do if [ $i -eq 3 ]; then break; fi; A=$i; done; launch $A", ["2"]],
    ["N=0; while [ $N -lt 5 ]; do N=$((N + 1)); done; launch $N", ["5"]],
    ['f() { local X=$1; launch "$X" $2; }; f a b', ["a", "b"]],
    ["set -- x y; shift; launch $1 $#", ["y", "1"]],
    ["C=\"launch --a 'b c'\"; eval $C", ["--a", "b c"]],
    ['bash -c "launch $((1 + 1))"', ["2"]],
    ["srun -N 2 bash -c 'launch --x'", ["--x"]],
    ["A=1; sbatch <<EOF\nsrun bash -c 'launch $A \\$B'\nEOF", ["1", "$B"]],
    ["mkdir -p x || { echo no; exit 1; }; launch on", ["on"]],
    ["launch a 2>&1 | tee log", ["a"]],
  ])("%s", (script, expected) => {
    expect(launched(script)).toEqual(expected);
  });

  test("a script that another one reads has its variables, and its words", () => {
    const files = { "sizes.sh": "LAYERS=27", "inner.sh": "launch $LAYERS $1" };
    expect(launched(". sizes.sh; launch $LAYERS", { files })).toEqual(["27"]);
    expect(launched("LAYERS=3 bash inner.sh --x", { files })).toEqual(["3", "--x"]);
    expect(read("source gone.sh; launch").unread).toEqual(["gone.sh (run.sh:1)"]);
  });

  test("no command runs: the output of other commands is a hole", () => {
    expect(holeIn("launch $(touch /tmp/rankc-was-here)")).toMatchObject({ line: 1, why: expect.stringContaining("commands are not run") });
    expect(launched("PORT=$(shuf -n 1); launch $PORT", { set: { PORT: "6000" } })).toEqual(["6000"]);
  });

  test("a loop without end and a script that calls itself end in an error", () => {
    expect(() => read("while true; do :; done")).toThrow(/more than \d+ steps|does not end/);
    expect(() => read('eval "$X"', { set: { X: 'eval "$X"' } })).toThrow("more than");
  });

  test("a text that is not bash is an error with its line", () => {
    expect(() => read("A=1\nif [ x; then\n")).toThrow(/run\.sh:\d: not bash/);
  });
});

test("#SBATCH lines give the variables of the scheduler", () => {
  const head = "#!/bin/bash\n#SBATCH --nodes=4\n#SBATCH --ntasks-per-node 8\n#SBATCH --gres=gpu:8\n";
  expect(launched(`${head}launch $SLURM_NNODES $SLURM_NTASKS $SLURM_GPUS_ON_NODE`)).toEqual(["4", "32", "8"]);
});

describe("changes of variables without an assignment", () => {
  test.each([
    ["A=1; unset A; launch $A x", ["$A", "x"]],
    ["A=(a b c); unset 'A[2]'; launch ${A[@]}", ["a", "b"]],
    ["A=1; let A=2 'B = A * 8'; launch $A $B", ["2", "16"]],
    ["A=1; printf -v A '%s-%s' x y; launch $A", ["x-y"]],
    ["A=1; f() { local A=9; B=3; }; f; launch $A $B", ["1", "3"]],
    ["A=1; f() { declare A=9; declare -g B=3; export C=4; }; f; launch $A $B $C", ["1", "3", "4"]],
    ["f() ( A=2; launch $1 $A ); A=1; f x", ["x", "2"]],
  ])("%s", (script, expected) => {
    expect(launched(script)).toEqual(expected);
  });

  test.each([
    ["IFS=' ' read -r -a A <<< 'x y'; launch \"${A[@]}\"", "A is read from an input"],
    ['mapfile -t A < list; launch "${A[@]}"', "A is read from an input"],
    ["readarray A < list; launch $A", "A is read from an input"],
    ["declare -A A=([x]=1); launch ${A[x]}", "A is an array with names as indices, which rankc does not follow"],
    ["declare -A A; A[x]=1; launch ${A[x]}", "A is an array with names as indices, which rankc does not follow"],
  ])("an unknown value is a hole: %s", (script, why) => {
    expect(holeIn(script)).toMatchObject({ variable: "A", why });
    expect(launched(script, { set: { A: "--seed" } })).toEqual(["--seed"]);
  });

  test("--set gives the items of an array as words", () => {
    expect(launched('mapfile A < list; launch "${A[@]}"', { set: { A: "--seed 3" } })).toEqual(["--seed", "3"]);
    expect(launched('launch "$A"', { set: { A: "--seed 3" } })).toEqual(["--seed 3"]);
  });

  test("references are refused", () => {
    expect(() => read("f() {\n local -n R=$1; R=1; }; f A; launch $A")).toThrow(/run\.sh:2: local -n/);
  });
});

describe("loops and conditions", () => {
  test.each([
    ["W=0; for i in 1 2 3; do for j in 1 2; do W=$((W+1)); if [ $W = 3 ]; then break 2; fi; done; done; launch $W", ["3"]],
    ["W=0; for i in 1 2 3; do for j in 1 2; do W=$((W+1)); continue 2; done; done; launch $W", ["3"]],
    ["case big in big) A=1 ;& small) B=2 ;; *) C=3 ;; esac; launch $A $B ${C-none}", ["1", "2", "none"]],
    ["case big in b*) A=1 ;;& x) B=2 ;; *g) C=3 ;; esac; launch $A ${B-none} $C", ["1", "none", "3"]],
    ["A=1; if [ -f x ]; then unset A; else unset A; fi; launch ${A-none}", ["none"]],
    ["[[ a == a ]] && A=1; [[ a == b ]] || B=2; launch $A $B", ["1", "2"]],
    ["cd /x && launch 1", ["1"]],
    ["mkdir x || A=1; [[ -d x ]] || exit 1; launch 2", ["2"]],
    ["mkdir x || { A=1; exit 1; }; launch ${A-none}", ["none"]],
    ["for i in 1 2 3; do [ -f y ] && break; A=4; done; B=5; launch $B", ["5"]],
    ["A=4; for i in 1 2; do [ -f y$i ] && break; A=4; done; launch $A", ["4"]],
    ["A=4; while true; do [ -f y ] && break; sleep 1; done; launch $A", ["4"]],
    ["for i in 1 2; do if [ -f y ]; then A=3; break; else A=3; break; fi; A=4; done; launch $A", ["3"]],
    ["for i in 1 2; do [ -f y ] && continue; B=5; done; launch 1", ["1"]],
  ])("%s", (script, expected) => {
    expect(launched(script)).toEqual(expected);
  });

  test.each([
    ["A=1; if [[ -f x ]]; then A=2; fi; launch $A"],
    ["A=1; (( $(nproc) > 2 )) && A=2; launch $A"],
    ["A=1; [[ -f x ]] && A=2; launch $A"],
    ["A=1; [ -f x ] || A=2; launch $A"],
    ["A=1; nvidia-smi | grep -q H100 && A=2; launch $A"],
    ["A=1; if nvidia-smi | grep -q H100; then A=2; fi; launch $A"],
    ["A=1; if ! command -v x > /dev/null; then A=2; fi; launch $A"],
    ["A=1; nvidia-smi || { A=2; }; launch $A"],
    ["A=1; for i in 1 2; do [ -f y ] && break; A=$i; done; launch $A"],
    ["A=1; for i in 1 2; do [ -f y ] && continue; A=2; done; launch $A"],
    ["A=1; while true; do [ -f y ] && break; A=$((A+1)); done; launch $A"],
  ])("a variable that depends on the machine is a hole: %s", (script) => {
    expect(holeIn(script)).toMatchObject({ variable: "A", why: "A depends on a condition that only a shell can decide" });
  });
});

test("CRLF line ends and a byte order mark are not part of words", () => {
  expect(launched("\uFEFFA=1\r\nlaunch $A \\\r\n  --b\r\n")).toEqual(["1", "--b"]);
});

test("endless recursion and endlessly growing texts are errors with a fix", () => {
  expect(() => read("f() { f; f; }\nf")).toThrow("functions call each other more than 24 deep");
  expect(() => read("A=a; while true; do A=$A$A; done")).toThrow("A has more than 1048576 characters");
  expect(() => read("A=a; while true; do A+=$A; done")).toThrow("A has more than 1048576 characters");
  expect(() => read("X=1\n".repeat(300_000))).toThrow("run.sh: more than 1048576 characters");
});

test("a variable that an unreadable script may set is a hole that names the script", () => {
  for (const use of ["$A", '"${A[@]}"', "${A[@]}"]) {
    expect(holeIn(`source gone.env\nlaunch ${use}`)).toMatchObject({
      variable: "A",
      why: "A is not set, unless gone.env (run.sh:1) sets it",
    });
    expect(launched(`source gone.env\nlaunch ${use}`, { set: { A: "" } }).join("")).toBe("");
  }
  expect(launched('. gone.env; launch ${A:-1} "${B[@]:-2}" x${C[@]+3}')).toEqual(["1", "2", "x"]);
  expect(launched('launch "${A[@]}"')).toEqual([]);
});
