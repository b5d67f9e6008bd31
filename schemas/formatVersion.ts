/** The version of the plan format, major.minor, apart from the schema of plans, which is slow to load. */
export const FORMAT_VERSION = "6.4";
