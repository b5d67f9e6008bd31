/** The page of `rankc view`: reads the plans that the file holds, and shows them. */
import { render } from "preact";
import { App } from "./app.tsx";
import { readViewData } from "./packed.ts";
import { PlanModel } from "./planModel.ts";
import { followFragment, plans, viewDiff } from "./state.ts";

const home = document.getElementById("page");
if (!home) throw new Error("rankc: the page has no #page");

try {
  const data = await readViewData();
  plans.value = data.plans.map((view, index) => new PlanModel(view, index));
  viewDiff.value = data.diff;
  document.title = `${data.plans.map(({ inspection }) => inspection.name).join(" / ")}: rankc view`;
  followFragment();
  home.replaceChildren();
  render(<App />, home);
  performance.mark("rankc-ready");
} catch (error) {
  const message = document.createElement("p");
  message.setAttribute("role", "alert");
  message.className = "loading";
  message.textContent = `The plan in this page cannot be shown: ${error instanceof Error ? error.message : String(error)}`;
  home.replaceChildren(message);
  throw error;
}
