// The view "Learn": upload with consent, jobs with their progress.

import { $, ask, attempt, button, element, post, problem, request } from "./page.js";
import { closeStudio, record, setUpStudio } from "./record.js";

const CHUNK = 8e6;
let video = null;
let recording = ""; // name of the job that this page records
const followed = new Map(); // name of a job: its EventSource

function choose(file) {
  if (!file) return;
  video = file;
  $("chosen").textContent = `${file.name}, ${(file.size / 1e6).toFixed(1)} MB`;
  if (!$("name").value) $("name").value = file.name.replace(/\.[^.]*$/, "").replace(/[^\p{L}\p{N}_ .'()+-]/gu, " ").trim().slice(0, 64);
}

const place = (name, action) => `/api/jobs/${encodeURIComponent(name)}/${action}`;

async function upload() {
  if (!video) throw new Error("No video is chosen. Drop one, or choose a file.");
  const name = $("name").value.trim(), consent = $("consent").value;
  if (video.size > 1e9) throw new Error("The video has more than 1 GB. Trim it, or use hicode prepare.");
  let job = await post("/api/jobs", { name, filename: video.name, size: video.size });
  show(job);
  for (let failed = 0; job.status === "uploading";) {
    try {
      const body = video.slice(job.done, job.done + CHUNK);
      job = await request(`${place(name, "video")}?offset=${job.done}`, { method: "PUT", body });
      show(job);
      failed = 0;
    } catch (error) {
      if (!(error instanceof TypeError) || ++failed > 5) throw error;
      await new Promise((done) => setTimeout(done, 1000 * failed));
    }
  }
  await post(place(name, "start"), { consent });
  follow(name);
  video = null;
  $("upload").reset();
  $("chosen").textContent = "The video is uploaded.";
}

async function recorded() {
  if (!$("upload").reportValidity()) return;
  const name = $("name").value.trim(), consent = $("consent").value;
  recording = name;
  try {
    await record(name, show);
  } finally {
    recording = "";
    await showJobs();
  }
  closeStudio();
  await post(place(name, "start"), { consent });
  follow(name);
  $("upload").reset();
}

function follow(name) {
  if (followed.has(name)) return;
  const events = new EventSource(place(name, "events"));
  followed.set(name, events);
  events.addEventListener("message", (event) => {
    const job = JSON.parse(event.data);
    show(job);
    if (job.status !== "running") {
      events.close();
      followed.delete(name);
    }
  });
}

function show(job) {
  const id = `job-${job.name}`;
  const item = element("li", "", { id });
  item.append(element("strong", job.name), ` ${words(job)}`);
  if (["running", "uploading"].includes(job.status)) {
    const bar = element("progress", "", { "aria-label": `Progress of ${job.name}` });
    if (job.total) Object.assign(bar, { max: job.total, value: job.done });
    item.append(bar);
  }
  if (job.message) item.append(element("p", job.message));
  if (job.report.length) item.append(report(job.report));
  const row = element("div", "", { class: "row" });
  if (job.status === "running") row.append(button("Cancel", () => post(place(job.name, "cancel"), {}).then(show)));
  if (job.status === "uploading" && !job.total && job.done && job.name !== recording) row.append(button("Use what is there", () => post(place(job.name, "finish"), {}).then(show)));
  if (["ready", "paused", "failed"].includes(job.status)) row.append(button(job.consent ? "Resume" : "Learn", () => resume(job)));
  if (job.status !== "running" && job.name !== recording) row.append(button("Remove", () => remove(job.name)));
  item.append(row);
  const old = document.getElementById(id);
  if (old) old.replaceWith(item);
  else $("jobs").append(item);
}

function words(job) {
  if (job.status === "running") return `${job.stage}${job.total ? `, ${Math.round((100 * job.done) / job.total)} %` : ""}${job.left_s === null ? "" : `, ${job.left_s} s left in this stage`}`;
  const names = { uploading: job.total ? "is being uploaded" : `is being recorded: ${(job.done / 1e6).toFixed(1)} MB`, ready: "is ready to be learned", paused: "is paused", failed: "has failed", done: "is done: see Talk" };
  return names[job.status];
}

function report(items) {
  const details = element("details");
  const table = element("table");
  for (const { name, value, advice } of items) {
    const row = element("tr");
    row.append(element("td", name), element("td", value), element("td", advice));
    table.append(row);
  }
  const advice = items.filter((item) => item.advice).length;
  details.append(element("summary", `Capture report: ${advice ? `${advice} ${advice === 1 ? "thing" : "things"} would help` : "all is well"}`), table);
  return details;
}

async function resume(job) {
  const consent = job.consent || (await ask("Who is in the video, and did they agree?", ""));
  if (!consent) return;
  show(await post(place(job.name, "start"), { consent }));
  follow(job.name);
}

async function remove(name) {
  if (!(await ask(`Remove the job ${name} with its video? An avatar that is done stays.`))) return;
  await post(place(name, "delete"), {});
  document.getElementById(`job-${name}`)?.remove();
}

export async function showJobs() {
  const jobs = await request("/api/jobs");
  $("jobs").replaceChildren();
  for (const job of jobs) {
    show(job);
    if (job.status === "running") follow(job.name);
  }
}

export function setUpLearn() {
  $("file").addEventListener("change", () => choose($("file").files[0]));
  $("drop").addEventListener("dragover", (event) => { event.preventDefault(); $("drop").classList.add("over"); });
  $("drop").addEventListener("dragleave", () => $("drop").classList.remove("over"));
  $("drop").addEventListener("drop", (event) => {
    event.preventDefault();
    $("drop").classList.remove("over");
    choose(event.dataTransfer.files[0]);
  });
  $("upload").addEventListener("submit", (event) => {
    event.preventDefault();
    attempt(upload);
  });
  setUpStudio(recorded);
  problem("");
}
