// The page: its two views.

import { setUpLearn, showJobs } from "./learn.js";
import { $, attempt } from "./page.js";
import { setUpTalk, showGallery } from "./talk.js";

const views = { talk: showGallery, learn: showJobs };

function go(view) {
  for (const name of Object.keys(views)) {
    $(name).hidden = name !== view;
    if (name === view) $(`to-${name}`).setAttribute("aria-current", "page");
    else $(`to-${name}`).removeAttribute("aria-current");
  }
  location.hash = view;
  attempt(views[view]);
}

for (const name of Object.keys(views)) $(`to-${name}`).addEventListener("click", () => go(name));
$("first").addEventListener("click", () => go("learn"));
for (const name of ["sound-label", "file-label"]) {
  $(name).addEventListener("keydown", (event) => [" ", "Enter"].includes(event.key) && $(name).click());
}
setUpTalk();
setUpLearn();
go(location.hash === "#learn" ? "learn" : "talk");
