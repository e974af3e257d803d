// The view "Talk": gallery, conversation, captions, download.

import { Call } from "./call.js";
import { $, ask, attempt, button, element, post, problem, request } from "./page.js";

let call = null;
let polling = 0;

export async function showGallery() {
  const avatars = await request("/api/avatars");
  $("gallery").replaceChildren(...avatars.map(card));
  $("none").hidden = avatars.length > 0;
}

function card(avatar) {
  const item = element("li", "", { class: "card" });
  const open = button("", () => begin(avatar.name));
  open.setAttribute("aria-label", `Talk with ${avatar.name}`);
  if (avatar.problem) open.disabled = true;
  else open.append(element("img", "", { src: avatar.thumbnail, alt: "", loading: "lazy" }));
  open.append(element("b", avatar.name));
  const about = avatar.problem || `${avatar.seconds} s of video. Consent: ${avatar.consent}`;
  const row = element("div", "", { class: "row" });
  row.append(button("Rename", () => rename(avatar.name)), button("Delete", () => remove(avatar.name)));
  item.append(open, element("p", about, { class: "hint" }), row);
  return item;
}

const place = (name) => `/api/avatars/${encodeURIComponent(name)}`;

async function rename(name) {
  const to = await ask(`New name of ${name}:`, name);
  if (to === null || to === name) return;
  await post(place(name), { name: to }, "PATCH");
  await showGallery();
}

async function remove(name) {
  if (!(await ask(`Delete ${name}? The avatar cannot be brought back.`))) return;
  await request(place(name), { method: "DELETE" });
  await showGallery();
}

async function begin(name) {
  call?.end();
  $("stage").hidden = false;
  $("gallery").hidden = true;
  $("waiting").hidden = false;
  $("download").hidden = true;
  $("captions").replaceChildren();
  $("talk-title").textContent = `Talk with ${name}`;
  scrollTo({ top: 0 });
  const onPicture = () => { $("waiting").hidden = true; $("text").focus(); };
  const mine = (call = new Call($("video"), $("canvas"), { onMessage: receive, onPicture, onEnd: ended }));
  try {
    await mine.begin(name);
  } catch (error) {
    mine.end();
    throw error;
  }
}

function ended(message) {
  $("stage").hidden = true;
  $("gallery").hidden = false;
  $("talk-title").textContent = "Talk with an avatar";
  $("hands-free").checked = false;
  clearInterval(polling);
  $("figures").open = false;
  call = null;
  if (message) problem(message);
}

function receive(message) {
  if (message.type === "interrupted") call.mute(true);
  if (message.type === "state") state(message.state);
  if (message.type === "ready") ready(message);
  if (message.type === "error") problem(message.message);
  if (message.type === "caption") caption(message);
  if (message.type === "stats") stats(message);
  if (message.type === "clip") {
    $("download").href = `/api/sessions/${call.session}/clip`;
    $("download").setAttribute("download", "avatar.mp4");
    $("download").hidden = false;
  }
}

function ready({ chat, languages, language }) {
  $("echo").hidden = !($("ask-row").hidden = !chat);
  $("language-row").hidden = languages.length < 2;
  $("language").replaceChildren(...languages.map(([code, name]) => element("option", name, { value: code })));
  $("language").value = language;
}

function state(name) {
  $("state").textContent = name;
  if (name === "speaking") call.mute(false);
}

function caption({ who, text }) {
  const line = element("li", "", { class: who });
  line.append(element("strong", who === "you" ? "You: " : "Avatar: "), text);
  $("captions").append(line);
  while ($("captions").children.length > 50) $("captions").firstChild.remove();
  line.scrollIntoView({ block: "nearest" });
}

function stats(message) {
  const rows = {
    "Text to first spoken frame sent": message.first_frame_ms === null ? "not yet" : `${message.first_frame_ms} ms`,
    "Frames the renderer makes a second": message.renderer_fps,
    "Pictures repeated": `${message.repeated} of ${message.ticks}`,
  };
  $("stats").replaceChildren(...Object.entries(rows).flatMap(([name, value]) => [element("dt", name), element("dd", `${value}`)]));
}

async function sendSound(file) {
  if (file.size > 20e6) throw new Error("The sound file has more than 20 MB. Cut it, or make it smaller.");
  const { seconds } = await request(`/api/sessions/${call.session}/sound`, { method: "POST", body: file });
  caption({ who: "avatar", text: `${file.name}, ${seconds} s` });
}

function hold(down) {
  if (!call || (down && $("push").getAttribute("aria-pressed") === "true")) return;
  $("push").setAttribute("aria-pressed", `${down}`);
  attempt(async () => {
    if (down) await call.listen();
    call.send({ type: "talk", down });
  });
}

export function setUpTalk() {
  $("say").addEventListener("submit", (event) => {
    event.preventDefault();
    attempt(() => {
      const ask = !$("ask-row").hidden && $("ask-it").checked;
      call.send({ type: "say", text: $("text").value, ask });
      $("text").value = "";
    });
  });
  $("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      $("say").requestSubmit();
    }
  });
  $("language").addEventListener("change", () => attempt(() => call.send({ type: "language", language: $("language").value })));
  $("interrupt").addEventListener("click", () => attempt(() => call.send({ type: "interrupt" })));
  addEventListener("keydown", (event) => {
    if (event.key === "Escape" && call && !$("ask").open) attempt(() => call.send({ type: "interrupt" }));
  });
  $("sound").addEventListener("change", () => {
    const [file] = $("sound").files;
    if (file && call) attempt(() => sendSound(file));
    $("sound").value = "";
  });
  $("picture").addEventListener("dragover", (event) => event.preventDefault());
  $("picture").addEventListener("drop", (event) => {
    event.preventDefault();
    const [file] = event.dataTransfer.files;
    if (file && call) attempt(() => sendSound(file));
  });
  const push = $("push");
  push.addEventListener("pointerdown", (event) => { push.setPointerCapture(event.pointerId); hold(true); });
  for (const name of ["pointerup", "pointercancel"]) push.addEventListener(name, () => hold(false));
  push.addEventListener("keydown", (event) => [" ", "Enter"].includes(event.key) && !event.repeat && hold(true));
  push.addEventListener("keyup", (event) => [" ", "Enter"].includes(event.key) && hold(false));
  $("hands-free").addEventListener("change", () => attempt(async () => {
    try {
      if ($("hands-free").checked) await call.listen();
      call.send({ type: "listen", on: $("hands-free").checked });
    } catch (error) {
      $("hands-free").checked = false;
      throw error;
    }
  }));
  $("leave").addEventListener("click", () => call?.end());
  $("figures").addEventListener("toggle", () => {
    clearInterval(polling);
    if ($("figures").open && call) polling = setInterval(() => call?.ready && call.send({ type: "stats" }), 1000);
  });
  addEventListener("pagehide", () => call?.end());
}
