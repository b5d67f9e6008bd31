/** Findings as a log in SARIF 2.1.0 (OASIS), the format of code scanning. */
import { sha256 } from "../plan/seal.ts";
import { version } from "../version.ts";
import type { Finding } from "./diagnostic.ts";
import { codes as explained } from "./explain.ts";
import { type FindingSpan, findingJson, type Region, type Texts } from "./findingJson.ts";

/** Returns a log with one run. Paths of files are relative to the current folder, as code scanning needs them. */
export function sarifLog(findings: readonly Finding[], texts: Texts): object {
  const codes = [...new Set(findings.map(({ code }) => code))].sort();
  const ruleOf = (code: string) => {
    const { title, why, level } = findings.find((f) => f.code === code) as Finding;
    return {
      id: code,
      shortDescription: { text: title },
      fullDescription: { text: why },
      help: { text: explained.includes(code) ? `${why} \`rankc explain ${code}\` shows an example.` : why },
      defaultConfiguration: { level },
    };
  };
  return {
    $schema: "https://json.schemastore.org/sarif-2.1.0.json",
    version: "2.1.0",
    runs: [
      {
        tool: { driver: { name: "rankc", semanticVersion: version, rules: codes.map(ruleOf) } },
        columnKind: "utf16CodeUnits",
        results: findings.map((finding) => resultOf(finding, codes, texts)),
      },
    ],
  };
}

function resultOf(finding: Finding, codes: readonly string[], texts: Texts): object {
  const { code, level, title, path, found, fix, spans, suggestion } = findingJson(finding, texts);
  const [primary] = spans.filter((span) => span.is_primary);
  const others = spans.filter((span) => !span.is_primary);
  const inSet = spans.flatMap((span) => ("set" in span ? [`; --set ${span.set}`] : []));
  return {
    ruleId: code,
    ruleIndex: codes.indexOf(code),
    level,
    message: { text: `${title}: ${found}${inSet.join("")}. Fix: ${fix}` },
    locations:
      primary && "file" in primary
        ? [{ physicalLocation: placeOf(primary), ...(path && { logicalLocations: [{ fullyQualifiedName: path }] }) }]
        : [],
    relatedLocations: others.flatMap((span, id) => ("file" in span ? [{ id, physicalLocation: placeOf(span), ...labelOf(span) }] : [])),
    // the same finding keeps its fingerprint when lines move
    partialFingerprints: { "codeAndKey/v1": sha256([code, path, primary && "file" in primary ? primary.file : ""].join("\n")) },
    ...(suggestion?.edits && {
      fixes: [
        {
          description: { text: fix },
          artifactChanges: suggestion.edits.map((edit) => ({
            artifactLocation: placeOf(edit).artifactLocation,
            replacements: [{ deletedRegion: regionOf(edit), insertedContent: { text: edit.text } }],
          })),
        },
      ],
    }),
  };
}

const labelOf = ({ label }: FindingSpan): object => (label === undefined ? {} : { message: { text: label } });

const placeOf = (region: Region) => ({
  artifactLocation: { uri: uriOf(region.file), ...(region.file.startsWith("/") ? {} : { uriBaseId: "%SRCROOT%" }) },
  region: regionOf(region),
});

const regionOf = ({ line, column, end_line, end_column }: Region) => ({
  ...{ startLine: line, startColumn: column, endLine: end_line, endColumn: end_column },
});

/** Returns a file's path as a URI reference. */
const uriOf = (file: string): string =>
  `${file.startsWith("/") ? "file://" : ""}${file.split(/[\\/]/).map(encodeURIComponent).join("/")}`.replace(/^(\.\/)+/, "");
