import { ImportTrouble } from "../../src/convert/problems.ts";

/** What an import refuses, as `subject: why; fix`; nothing if it succeeds. */
export function problemsOf(act: () => unknown): readonly string[] {
  try {
    act();
  } catch (error) {
    if (error instanceof ImportTrouble) return error.problems.map(({ subject, why, fix }) => `${subject}: ${why}; ${fix}`);
    throw error;
  }
  return [];
}
