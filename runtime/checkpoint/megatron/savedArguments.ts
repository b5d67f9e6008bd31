/** The arguments that a Megatron checkpoint was trained with. */
import { existsSync } from "node:fs";
import { join } from "node:path";
import { Trouble } from "../../../schemas/trouble.ts";
import { openInput } from "../../data/inputFile.ts";
import type { Distcp } from "./distcp.ts";
import { PickledObject, type PickleValue } from "./pickle.ts";
import { readObject } from "./torchFile.ts";

/** Returns the fields of the saved arguments. Older checkpoints have them in common.pt. Throws a Trouble if there are none. */
export function argumentsIn(dist: Distcp): ReadonlyMap<PickleValue, PickleValue> {
  const common = commonState(dist);
  const args = common instanceof Map ? common.get("args") : undefined;
  if (!(args instanceof PickledObject))
    throw new Trouble(`${dist.folder} holds no arguments of a training`, "give the config.json of the model with --config");
  return args.fields;
}

function commonState(dist: Distcp): PickleValue | undefined {
  const path = join(dist.folder, "common.pt");
  if (!existsSync(path)) {
    const list = dist.object("common_state/shard_0_1");
    return Array.isArray(list) ? list[0] : undefined;
  }
  const file = openInput(path, "the common state of a checkpoint", "copy the checkpoint again");
  try {
    return readObject({ where: path, bytes: file.bytes, read: (into, at) => file.read(into, at) });
  } finally {
    file.close();
  }
}
