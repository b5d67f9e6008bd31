/** Names of the axes that consist of sub-axes, apart from the schema of plans, which is slow to load. */
export const gridAxisNames = ["tp", "cp", "dp", "etp", "ep", "edp", "kv", "copies"] as const;
