/** Reads the page's data and shows it. */

import "./style.css";
import { h } from "./dom";
import type { LiveData } from "./form";
import { live } from "./live";
import { view, type ViewData } from "./viewer";

const VERSION = 1;
const app = document.getElementById("app")!;
const data = JSON.parse(document.getElementById("data")!.textContent!) as { version: number };
if (data.version !== VERSION) app.replaceChildren(h("p", { class: "note" }, "This page's data is of another version than its script."));
else if (app.dataset.kind === "live") live(app, data as LiveData);
else view(app, data as ViewData);
app.dataset.ready = "";
