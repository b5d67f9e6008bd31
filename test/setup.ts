/** Runs before each test file: in the fast tier random draws begin with one seed, so that every run is the same. */
import fc from "fast-check";
import { isFull } from "./tiers.ts";

if (!isFull) fc.configureGlobal({ seed: 1 });
