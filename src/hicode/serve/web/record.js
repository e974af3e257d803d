// Recording with the camera: guided, and stored on the server second by second.

import { $, attempt, post, request } from "./page.js";

const LISTEN_S = 15, TALK_S = 60, LEAST_FPS = 20;
const KINDS = [
  ["video/mp4;codecs=avc1.42E01F,opus", "mp4"], ["video/mp4", "mp4"],
  ["video/webm;codecs=vp9,opus", "webm"], ["video/webm;codecs=vp8,opus", "webm"],
];
const TEXT = [
  "I read this aloud, at my own pace, and look at the camera between the lines.",
  "Early buses bring thick fog and very few people to the harbour.",
  "My father thought about five or six good reasons to leave.",
  "Where would you go if the weather were warm this weekend?",
  "She sells fresh fish, cheese, jam and pepper from a small blue shop.",
  "We usually choose the shorter road, though others measure it twice.",
  "Oh yes, I remember: the meeting was moved to Thursday afternoon!",
  "Both boys bought a map, and Paul put it above the back door.",
  "Is there anything in the world more pleasant than a quiet morning?",
  "I have to smile when I think of how nervous we all were.",
  "Every evening the old clock chimes, and nobody counts the hours.",
  "You may shake your head, look around, and be surprised now and then.",
  "That is all for today. Thank you for listening.",
];

let studio = null; // the open camera: { stream, timer }

export async function openStudio() {
  if (!navigator.mediaDevices) throw new Error("This page may not use the camera. Open it as localhost or by https.");
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({
      video: { width: { ideal: 1280 }, height: { ideal: 720 }, frameRate: { ideal: 30 } },
      audio: { echoCancellation: false, noiseSuppression: false },
    });
  } catch (error) {
    const none = error.name === "NotFoundError";
    throw new Error(none ? "No camera or no microphone was found. Connect one, or upload a video." : "Camera and microphone may not be used. Allow them in the browser.");
  }
  $("studio").hidden = false;
  $("preview").srcObject = stream;
  studio = { stream, timer: setInterval(look, 1000) };
  $("prompt").textContent = "Sit as for a call. When the line above says good, start.";
}

export function closeStudio() {
  clearInterval(studio?.timer);
  studio?.stream.getTracks().forEach((track) => track.stop());
  studio = null;
  $("preview").srcObject = null;
  $("studio").hidden = true;
}

/** Ask the server what is wrong with the picture. */
async function look() {
  const preview = $("preview");
  if (!preview.videoWidth || studio.looking) return;
  studio.looking = true;
  try {
    const scale = Math.min(1, 640 / preview.videoWidth);
    const canvas = new OffscreenCanvas(Math.round(scale * preview.videoWidth), Math.round(scale * preview.videoHeight));
    canvas.getContext("2d").drawImage(preview, 0, 0, canvas.width, canvas.height);
    const body = await canvas.convertToBlob({ type: "image/jpeg", quality: 0.85 });
    const { advice, good } = await request("/api/look", { method: "POST", body });
    $("advice").textContent = advice;
    $("advice").classList.toggle("good", good);
  } catch (error) {
    $("advice").textContent = error.message;
  }
  if (studio) studio.looking = false;
}

/** Record and store; resolves with the job, which waits to be learned. */
export async function record(name, show) {
  const found = KINDS.find(([kind]) => window.MediaRecorder?.isTypeSupported(kind));
  if (!found) throw new Error("This browser cannot record video. Use a current one, or upload a video.");
  const { stream } = studio;
  let job = await post("/api/jobs", { name, filename: `camera.${found[1]}`, size: null });
  const recorder = new MediaRecorder(stream, { mimeType: found[0], videoBitsPerSecond: 8e6 });
  const pieces = [];
  let stored = Promise.resolve(), failed = null;
  recorder.addEventListener("dataavailable", ({ data }) => {
    if (data.size) pieces.push(data);
    stored = stored.then(async () => {
      while (pieces.length && !failed) {
        job = await put(job, pieces[0]);
        pieces.shift();
        show(job);
      }
    }).catch((error) => { failed = error; });
  });
  const frames = countFrames();
  const stopped = new Promise((done) => recorder.addEventListener("stop", done));
  recorder.start(1000);
  $("start-recording").disabled = true;
  await prompted(recorder, () => failed);
  if (recorder.state !== "inactive") recorder.stop();
  await stopped;
  await stored;
  $("start-recording").disabled = false;
  if (failed) throw failed;
  const fps = frames();
  job = await post(`/api/jobs/${encodeURIComponent(name)}/finish`, {});
  if (fps < LEAST_FPS) throw new Error(`Only ${fps.toFixed(0)} frames a second came from the camera. Close other programs, make more light, and record again.`);
  return job;
}

async function put(job, piece) {
  for (let tries = 0; ; tries++) {
    try {
      return await request(`/api/jobs/${encodeURIComponent(job.name)}/video?offset=${job.done}`, { method: "PUT", body: piece });
    } catch (error) {
      if (!(error instanceof TypeError) || tries > 5) throw error;
      await new Promise((done) => setTimeout(done, 1000 * (tries + 1)));
    }
  }
}

/** What to do now, until the time is over, the user stops, or storing fails. */
async function prompted(recorder, failed) {
  let stop = false;
  const onStop = () => { stop = true; };
  $("stop-recording").hidden = false;
  $("stop-recording").addEventListener("click", onStop);
  const begun = performance.now();
  for (;;) {
    const s = (performance.now() - begun) / 1000;
    if (stop || failed() || s > LISTEN_S + TALK_S || recorder.state === "inactive") break;
    const left = Math.ceil(s < LISTEN_S ? LISTEN_S - s : LISTEN_S + TALK_S - s);
    const line = TEXT[Math.min(TEXT.length - 1, Math.floor(((s - LISTEN_S) / TALK_S) * TEXT.length))];
    $("prompt").textContent = s < LISTEN_S ? "Listen: lips closed, look at the camera, blink as you like." : line;
    $("left").textContent = `${left} s`;
    await new Promise((done) => setTimeout(done, 200));
  }
  $("left").textContent = "";
  $("stop-recording").removeEventListener("click", onStop);
  $("stop-recording").hidden = true;
}

function countFrames() {
  const preview = $("preview"), begun = performance.now();
  let count = 0, on = true;
  const step = () => { count++; if (on) preview.requestVideoFrameCallback(step); };
  preview.requestVideoFrameCallback?.(step);
  return () => { on = false; return preview.requestVideoFrameCallback ? count / ((performance.now() - begun) / 1000) : 25; };
}

export function setUpStudio(recorded) {
  $("open-studio").addEventListener("click", () => attempt(openStudio));
  $("close-studio").addEventListener("click", closeStudio);
  $("start-recording").addEventListener("click", () => attempt(recorded));
  addEventListener("pagehide", () => studio && closeStudio());
}
