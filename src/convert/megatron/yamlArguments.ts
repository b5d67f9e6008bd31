/** The YAML lists of the MoE model zoo: `MODEL_ARGS` with `--flag: value`, where `true` is a bare flag and `false` omits it. */
import { isMap, isScalar, LineCounter, parseDocument } from "yaml";
import { Trouble } from "../../../schemas/trouble.ts";
import { argumentSpecs } from "./arguments/spec.ts";
import { type Hole, newWords, type ScriptText } from "./bash/text.ts";

/** Returns the arguments of a list as words. `${X}` has its value from `variables`, or stays unknown. Throws a Trouble for any other text. */
export function readArgumentList(text: string, file: string, variables: ReadonlyMap<string, string>): readonly ScriptText[] {
  const lines = new LineCounter();
  const document = parseDocument(text, { lineCounter: lines, schema: "failsafe" });
  const [error] = document.errors;
  if (error) throw new Trouble(`${file}: not YAML: ${error.message.split("\n")[0]}`, "name a launch script, or a YAML list of arguments");
  const inner = document.get("MODEL_ARGS");
  const list = isMap(inner) ? inner : document.contents;
  const isList = isMap(list) && list.items.some(({ key }) => isScalar(key) && String(key.value).startsWith("--"));
  if (!isList) throw new Trouble(`${file} has no arguments`, "write them as `--flag: value`, below MODEL_ARGS");
  return list.items.flatMap(({ key, value }) => {
    if (!isScalar(key)) return [];
    const line = lines.linePos(key.range?.[0] ?? 0).line;
    const written = isScalar(value) ? String(value.value ?? "") : "";
    const filled = fill(written, line, variables);
    const whole = filled.every((part) => typeof part === "string") ? filled.join("").trim() : undefined;
    if (whole === "false") return [];
    const flag: ScriptText = [String(key.value)];
    // a switch of unknown value is an error only where it has an effect
    const spec = argumentSpecs.get(String(key.value).replace(/^--/, ""));
    if (whole === "true" || whole === "" || (spec?.type === "switch" && spec.fate === "without effect")) return [flag];
    const words = newWords();
    words.split(filled);
    words.end();
    return [flag, ...words.all];
  });
}

/** Fills in `$X` and `${X}`, as envsubst does. */
function fill(text: string, line: number, variables: ReadonlyMap<string, string>): ScriptText {
  const parts: (string | Hole)[] = [];
  let end = 0;
  for (const found of text.matchAll(/\$(?:\{(\w+)\}|([A-Za-z_]\w*))/g)) {
    const [source] = found;
    const variable = found[1] ?? found[2] ?? "";
    parts.push(text.slice(end, found.index));
    end = found.index + source.length;
    parts.push(variables.get(variable) ?? { source, variable, line, why: `${variable} is not set` });
  }
  return [...parts, text.slice(end)].filter((part) => part !== "");
}
