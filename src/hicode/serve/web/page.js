// What all views share: elements, requests, errors, questions.

export const $ = (id) => document.getElementById(id);

export function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  if (text) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

export function button(text, action) {
  const made = element("button", text, { type: "button" });
  made.addEventListener("click", () => attempt(action));
  return made;
}

export function problem(message) {
  $("problem").textContent = message;
  $("problem").hidden = !message;
}

/** Do something; what goes wrong is one sentence on the page. */
export async function attempt(action) {
  problem("");
  try {
    return await action();
  } catch (error) {
    problem(error instanceof TypeError ? "The server does not answer. Is hicode serve still running?" : error.message);
  }
}

export async function request(path, options = {}) {
  const answer = await fetch(path, options);
  const body = answer.headers.get("content-type")?.includes("json") ? await answer.json() : null;
  if (!answer.ok) throw new Error(body?.error ?? `The server refused this (${answer.status}).`);
  return body;
}

export const post = (path, value, method = "POST") =>
  request(path, { method, headers: { "content-type": "application/json" }, body: JSON.stringify(value) });

/** Ask yes or no, or for a text where `initial` is given. Gives true or the text, or null. */
export function ask(question, initial) {
  const dialog = $("ask"), answer = $("answer");
  $("question").textContent = question;
  answer.hidden = initial === undefined;
  answer.value = initial ?? "";
  $("yes").textContent = initial === undefined ? "Yes" : "OK";
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((done) => dialog.addEventListener("close", () => {
    done(dialog.returnValue !== "yes" ? null : initial === undefined ? true : answer.value);
  }, { once: true }));
}
