/** The table of turns of a pair: each with the exchange that it begins, which runs under the next turn. */
import { plural } from "../units.ts";
import { turnsOf } from "./pairTurns.ts";
import type { StageRuns } from "./stageRuns.ts";
import { plan, selectInstruction } from "./state.ts";
import { TableHead } from "./widgets.tsx";

/** The most turns that are listed. */
const ROWS = 60;

/** The table of turns. */
export function PairTurns({
  of: { stage, runs, first },
}: {
  readonly of: { readonly stage: number; readonly runs: StageRuns; readonly first: number };
}) {
  const turns = turnsOf(plan.value, stage, runs, first);
  if (turns.length === 0) return null;
  return (
    <>
      <h3>Turns of the pair</h3>
      <p class="quiet">Instructions of both runs alternate; an exchange that a turn begins runs under the turn after it.</p>
      <div class="table-room short">
        <table class="turns">
          <TableHead names={["run", "begins", "instructions"]} />
          <tbody>
            {turns.slice(0, ROWS).map(({ run, instructions }) => {
              const exchange = instructions.findLast(({ view }) => view.stream !== undefined);
              const [begin] = instructions;
              return (
                <tr key={`${run} ${begin?.n}`}>
                  <td>{runs.tag(run)}</td>
                  <td>
                    {exchange && (
                      <button type="button" class="link" onClick={() => selectInstruction(exchange)}>
                        {exchange.view.does}
                      </button>
                    )}
                  </td>
                  <td>
                    {begin && (
                      <button type="button" class="link" onClick={() => selectInstruction(begin)}>
                        {plural(instructions.length, "instruction")} from {begin.id}
                      </button>
                    )}
                  </td>
                </tr>
              );
            })}
          </tbody>
        </table>
      </div>
      {turns.length > ROWS && (
        <p class="note">
          The first {ROWS} of {turns.length}.
        </p>
      )}
    </>
  );
}
