"use strict";
// Asks one adapter, or two side by side, in one conversation each; the adapter may change between two messages.

const form = document.querySelector("form");
const answers = document.querySelector("main > div");
const problem = document.querySelector("#problem");
const talks = { left: [], right: [] };
let stopping = null;

function headers() {
  const key = form.key.value.trim();
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

async function list() {
  const answer = await fetch("/v1/models", { headers: headers() });
  document.querySelector("#secret").hidden = answer.status !== 401 && !form.key.value;
  if (!answer.ok) return;
  const options = (await answer.json()).data.map((model) => {
    const option = document.createElement("option");
    option.value = model.id;
    option.label = model.root || "";
    return option;
  });
  document.querySelector("#models").replaceChildren(...options);
  if (!form.left.value && options.length) form.left.value = options[Math.min(1, options.length - 1)].value;
}

function element(parent, name, text = "") {
  const made = document.createElement(name);
  made.textContent = text;
  parent.append(made);
  return made;
}

// The objects of a stream of events, as they come.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: {")) yield JSON.parse(line.slice(6));
    }
  }
}

async function ask(side, section, message) {
  const model = form[side].value.trim();
  const article = element(section, "article");
  const text = element(article, "pre");
  const note = element(article, "small", model);
  const messages = [...talks[side], { role: "user", content: message }];
  const body = { model, messages, stream: true, temperature: Number(form.temperature.value), max_tokens: Number(form.tokens.value) };
  const started = performance.now();
  let first = 0;
  try {
    const answer = await fetch("/v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(body), signal: stopping.signal,
    });
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    const version = answer.headers.get("x-adapterhub-version");
    for await (const event of events(answer.body)) {
      if (event.error) throw new Error(event.error.message);
      const piece = event.choices?.[0]?.delta?.content;
      if (!piece) continue;
      first ||= performance.now() - started;
      text.textContent += piece;
    }
    note.textContent = `${model} → ${version} · first ${first.toFixed(0)} ms · ${(performance.now() - started).toFixed(0)} ms`;
    talks[side] = [...messages, { role: "assistant", content: text.textContent }];
  } catch (error) {
    note.textContent = `${model}: ${error.name === "AbortError" ? "stopped" : error.message}`;
  }
}

// Where the rollouts of routes stand, for whom may see all of them.
async function listRollouts() {
  const answer = await fetch("/v1/rollouts", { headers: headers() });
  if (!answer.ok) return;
  const { data, shadows } = await answer.json();
  const parts = [...data.filter((rollout) => rollout.steps).map(drawRollout), ...shadows.map(drawShadow)];
  document.querySelector("#rollouts").replaceChildren(...parts);
  document.querySelector("#rollouts").hidden = !parts.length;
}

function drawRollout(rollout) {
  const section = document.createElement("section");
  const steps = [...rollout.steps.map((step) => step.share), 100];
  const current = { done: steps.length, "rolled back": 0 }[rollout.state] ?? rollout.step;
  element(section, "p", `${rollout.route}: ${rollout.state}${rollout.reason ? `: ${rollout.reason}` : ""}`);
  const article = element(section, "article");
  Object.assign(element(article, "progress"), { max: 100, value: rollout.share });
  element(article, "small", steps.map((share, index) => (index + 1 === current ? `[${share} %]` : `${share} %`)).join(" → "));
  element(article, "small", `${rollout.candidate} beside ${rollout.stable}`);
  for (const bound of rollout.bounds) element(article, "small", `${bound.name}, ${bound.limit}: ${bound.text}`);
  for (const note of [rollout.stopped, rollout.cut_off]) if (note) element(article, "small", note);
  return section;
}

function drawShadow(shadow) {
  const section = document.createElement("section");
  element(section, "p", `${shadow.route}: shadow`);
  const agreement = shadow.agreement === null ? "" : `, ${(shadow.agreement * 100).toFixed(1)} % of the text agrees`;
  element(section, "small", `${shadow.copies} copies, ${shadow.same} the same, ${shadow.failed} failed, ${shadow.dropped} dropped${agreement}`);
  return section;
}

function describe(answer) {
  const tokens = `${answer.prompt_tokens}+${answer.answer_tokens} tokens`;
  const time = new Date(answer.time * 1000).toISOString();
  return [answer.version, answer.route, answer.arm, time, tokens].filter(Boolean).join(" · ");
}

const served = document.querySelector("#served");
served.addEventListener("submit", async (event) => {
  event.preventDefault();
  const answer = await fetch(`/v1/served/${encodeURIComponent(served.elements.id.value.trim())}`, { headers: headers() });
  const body = await answer.json();
  document.querySelector("#answer").textContent = answer.ok ? describe(body) : body.error.message;
});

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (stopping) return;
  const message = form.message.value;
  const section = element(answers, "section");
  element(section, "p", message);
  form.message.value = "";
  stopping = new AbortController();
  form.stop.disabled = false;
  await Promise.all(["left", "right"].filter((side) => form[side].value.trim()).map((side) => ask(side, section, message)));
  form.stop.disabled = true;
  stopping = null;
  form.message.focus();
});

form.stop.addEventListener("click", () => stopping?.abort());
setInterval(() => listRollouts().catch(() => {}), 5000);
listRollouts().catch(() => {});
form.key.addEventListener("change", () => list().catch(show));
form.addEventListener("reset", (event) => {
  event.preventDefault();
  talks.left = [];
  talks.right = [];
  answers.replaceChildren();
});

function show(error) {
  problem.textContent = error.message;
}

list().catch(show);
