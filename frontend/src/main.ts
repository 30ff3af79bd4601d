/** Reads the page's data and shows it. */

import "./style.css";
import { h } from "./dom";
import { view, type ViewData } from "./viewer";

const VERSION = 1;
const app = document.getElementById("app")!;
const data = JSON.parse(document.getElementById("data")!.textContent!) as { version: number };
if (data.version !== VERSION) app.replaceChildren(h("p", { class: "note" }, "This page's data is of another version than its script."));
else view(app, data as ViewData);
app.dataset.ready = "";
