// The page: buttons, progress and the drawing. The work is in ../src, compiled to pkg/.

import init, { Device } from "./pkg/browser.js";

const MODEL = "model/SmolLM2-135M-Instruct.Q4_1.gguf";
// How many ways a sequence is continued in.
const WAYS = 3;

const find = (id) => document.getElementById(id);
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;

let device = null;
// A model on the device, and its sequences.
let decoder = null;
// Set once nothing can go on: the device is lost, or the program has stopped.
let isOver = false;
// Aborts what the button Cancel ends.
let cancel = null;

// --- Messages -----------------------------------------------------------------------------------------------------

/** Shows a message. With `again`, the only way on is to start again. */
function tell(text, again = false) {
  const box = find("message");
  box.firstElementChild.textContent = text;
  box.hidden = text === "";
  find("again").hidden = !again;
}

/** Ends the page's work. The first reason is the one that is shown. */
function end(text) {
  if (isOver) return;
  isOver = true;
  setPhase("over");
  tell(text, true);
}

/** Shows why something failed. */
function fail(error) {
  if (isOver) return;
  if (error instanceof WebAssembly.RuntimeError) {
    end(`The program has stopped unexpectedly (${error.message}). What it held is lost.`);
  } else {
    tell(error?.message ?? String(error));
  }
}

function setPhase(phase) {
  document.body.dataset.phase = phase;
  const isReady = phase === "ready" || phase === "over";
  find("start").hidden = isReady;
  find("prompts").hidden = phase !== "ready";
  document.querySelector("main").hidden = !isReady;
  const isLoading = phase === "loading";
  find("progress").hidden = !isLoading;
  find("cancel").hidden = !isLoading;
  for (const id of ["load", "file", "format", "longest"]) find(id).disabled = phase !== "idle";
}

// --- From nothing to a model that can be asked --------------------------------------------------------------------

async function openGpu() {
  if (!navigator.gpu) {
    const why = isSecureContext ? "" : " It gives it only to pages from https:// and localhost.";
    end(`This browser has no WebGPU, which this page needs.${why} Chrome and Edge have it from version 113, Safari from 26, Firefox from 141 on some systems.`);
    return;
  }
  await init({ module_or_path: new URL("pkg/browser_bg.wasm", import.meta.url) });
  try {
    device = await Device.open(
      (reason) => end(`The browser has taken the GPU away${reason ? ` (${reason})` : ""}: its driver may have been reset, or another page may need it. The cache is lost with it.`),
      (error) => tell(`The GPU reports an error: ${error}`),
    );
  } catch (error) {
    end(`The browser has WebGPU but gives this page no GPU: ${error.message}. It may be switched off, or the graphics driver too old; chrome://gpu and about:support say more.`);
    return;
  }
  showAdapter(JSON.parse(device.adapter()), (await navigator.gpu.requestAdapter())?.info);
  setPhase("idle");
}

function showAdapter({ name, driver, limits }, info) {
  const words = [name, info?.vendor, info?.architecture, info?.description, driver];
  const unique = [...new Set(words.filter(Boolean))].join(", ") || "an adapter without a name";
  const shown = Object.entries(limits).map(([key, value]) => `${key} ${value >= 1 << 20 ? `${value / (1 << 20)} MiB` : value}`);
  find("adapter").textContent = `GPU: ${unique}. Limits: ${shown.join(", ")}.`;
}

/** Shows how far a stage is, and since when. */
function progress(stage, done, total, text) {
  const row = document.querySelector(`[data-stage=${stage}]`);
  row.querySelector("progress").value = total ? done / total : 0;
  row.querySelector("output").textContent = text ?? `${megabytes(done)} of ${megabytes(total)}`;
}

async function download(signal) {
  const response = await fetch(MODEL, { signal });
  if (!response.ok) throw new Error(`The model cannot be downloaded: the server answers ${response.status} for ${MODEL}.`);
  const total = Number(response.headers.get("content-length"));
  let [bytes, at] = [new Uint8Array(total), 0];
  const reader = response.body.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    if (at + value.length > bytes.length) {
      const more = new Uint8Array(2 * (at + value.length));
      more.set(bytes);
      bytes = more;
    }
    bytes.set(value, at);
    at += value.length;
    progress("download", at, Math.max(total, at));
  }
  return bytes.subarray(0, at);
}

/** Gets a model, loads it and compiles, with every stage visible. */
async function start(file) {
  cancel = new AbortController();
  const { signal } = cancel;
  tell("");
  setPhase("loading");
  try {
    const began = performance.now();
    const seconds = (since) => `${((performance.now() - since) / 1000).toFixed(1)} s`;
    const bytes = file ? new Uint8Array(await file.arrayBuffer()) : await download(signal);
    progress("download", 1, 1, `${megabytes(bytes.length)} in ${seconds(began)}`);
    let since = performance.now();
    const [name, format, longest] = [file?.name ?? "the model", find("format").value, Number(find("longest").value)];
    decoder = await device.load(name, bytes, format, longest, (done, total) => {
      signal.throwIfAborted();
      progress("load", done, total);
    });
    progress("load", 1, 1, `in ${seconds(since)}`);
    since = performance.now();
    const clock = setInterval(() => {
      document.querySelector("[data-stage=compile] output").textContent = `${compiled} ${seconds(since)}`;
    }, 200);
    let compiled = "";
    try {
      await decoder.compile((done, total) => {
        signal.throwIfAborted();
        compiled = `${done} of ${total},`;
        progress("compile", done, total, `${compiled} ${seconds(since)}`);
      });
    } finally {
      clearInterval(clock);
    }
    document.body.dataset.times = JSON.stringify({ compile: performance.now() - since, all: performance.now() - began });
    find("chat-label").hidden = !decoder.canChat();
    setPhase("ready");
    show();
  } catch (error) {
    if (isOver) return;
    decoder?.free();
    decoder = null;
    setPhase("idle");
    if (signal.aborted) tell("Cancelled. Nothing is kept.");
    else fail(error);
  }
}

// --- Decoding -----------------------------------------------------------------------------------------------------

// What to do before the next step.
const actions = [];
let isRunning = false;

/** Does something between two steps, and completes when it is done. */
function act(work) {
  return new Promise((resolve) => {
    actions.push(async () => {
      try {
        resolve(await work());
      } catch (error) {
        fail(error);
        resolve(null);
      }
    });
    run();
  });
}

/** Runs steps until no sequence goes on. */
async function run() {
  if (isRunning || isOver) return;
  isRunning = true;
  try {
    for (;;) {
      while (actions.length && !isOver) await actions.shift()();
      if (isOver || !show().is_busy) break;
      watchFrames();
      const since = performance.now();
      const tokens = await decoder.step();
      showRate(tokens, performance.now() - since);
      // A piece of a prompt chooses no token; the browser draws before the next one.
      if (tokens === 0) await new Promise((resolve) => setTimeout(resolve));
    }
  } catch (error) {
    if (error instanceof WebAssembly.RuntimeError) fail(error);
    else {
      // A device that is lost says so soon, and that is the reason then.
      await new Promise((resolve) => setTimeout(resolve, 500));
      end(`A step has failed: ${error.message}. The cache is of no more use.`);
    }
  } finally {
    isRunning = false;
  }
}

// The latest steps: tokens and milliseconds.
const steps = [];

function showRate(tokens, time) {
  if (tokens === 0) return;
  steps.push([tokens, time]);
  if (steps.length > 20) steps.shift();
  const [all, took] = steps.reduce(([a, b], [c, d]) => [a + c, b + d]);
  const rate = (1000 * all) / took;
  find("rate").textContent = `${rate.toFixed(1)} tokens/s, all sequences together.`;
  find("rate").dataset.rate = rate;
}

// The times of frames while sequences are decoded.
const frames = [];
let isWatching = false;

function watchFrames() {
  if (isWatching) return;
  isWatching = true;
  let last = null;
  const frame = (now) => {
    if (last !== null) frames.push(now - last);
    last = now;
    if (isRunning) requestAnimationFrame(frame);
    else isWatching = false;
    if (frames.length && frames.length % 30 === 0) showFrames();
  };
  requestAnimationFrame(frame);
}

function showFrames() {
  const sorted = frames.slice(-2000).sort((a, b) => a - b);
  const at = (share) => sorted[Math.floor(share * (sorted.length - 1))];
  const figures = { frames: sorted.length, median: at(0.5), p95: at(0.95), p99: at(0.99), longest: at(1) };
  find("frames").textContent = `Frames of this page: ${figures.median.toFixed(0)} ms, the longest ${figures.longest.toFixed(0)} ms.`;
  find("frames").dataset.figures = JSON.stringify(figures);
}

// --- The drawing --------------------------------------------------------------------------------------------------

const STATUS = {
  waits: "waits for its turn",
  prefills: "reads its prompt",
  decodes: "goes on",
  stopped: "stopped",
  ended: "ended by the model",
  full: "as long as the cache allows",
};

const colour = (number) => `hsl(${(number * 137.5 + 70) % 360} 65% 55%)`;

/** Draws what the cache holds, and returns it. */
function show() {
  const state = JSON.parse(decoder.state());
  // Which sequences share each page.
  const sharers = new Map();
  for (const { number, pages } of state.sequences) {
    for (const number_ of pages) {
      if (!sharers.has(number_)) sharers.set(number_, []);
      sharers.get(number_).push(number);
    }
  }
  const list = find("sequences");
  const cards = new Map([...list.children].map((card) => [Number(card.dataset.number), card]));
  for (const sequence of state.sequences) {
    let card = cards.get(sequence.number);
    if (!card) list.append((card = newCard(sequence)));
    cards.delete(sequence.number);
    showCard(card, sequence, state, sharers);
  }
  for (const card of cards.values()) card.remove();
  showPool(state, sharers);
  return state;
}

function element(name, attributes = {}, ...children) {
  const svg = ["svg", "g", "rect", "title"].includes(name);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(key, value);
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

function newCard({ number }) {
  const wanted = () => find("wanted").valueAsNumber || 1;
  const button = (name, text, title, click) => element("button", { type: "button", "data-do": name, title, click }, text);
  return element(
    "article",
    { "data-number": number, style: `--own: ${colour(number)}` },
    element("p", {}, element("span", { class: "prompt" }), element("span", { class: "text" })),
    element("svg", { role: "img", "aria-label": "Its pages, and its length against the longest" }),
    element(
      "footer",
      {},
      element("span", { class: "status" }),
      button("stop", "Stop", "Keeps its tokens in the cache", () => act(() => decoder.stop(number))),
      button("resume", "Go on", "For as many tokens as the form says", () => act(() => decoder.resume(number, wanted()))),
      button("fork", `Continue ${WAYS} ways`, "With the best next token and, in forks that share its pages, the next best ones", () => act(() => decoder.fork(number, WAYS, wanted()))),
      button("save", "Save", "As a file: its K and V, and its text", () => act(() => save(number))),
      button("remove", "Remove", "Frees its pages, if no other sequence shares them", () => act(() => decoder.remove(number))),
    ),
  );
}

function showCard(card, sequence, state, sharers) {
  const { number, parent, status, prompt, text, length, pages } = sequence;
  Object.assign(card.dataset, { status, length, ids: sequence.ids.join(" "), promptIds: sequence.prompt_ids.join(" "), pages: pages.join(" ") });
  const put = (selector, value) => {
    const target = card.querySelector(selector);
    if (target.textContent !== value) target.textContent = value;
  };
  put(".prompt", prompt);
  put(".text", text);
  const fork = parent === null ? "" : `, a fork of ${parent}`;
  put(".status", `${number}${fork}: ${STATUS[status]}. ${length} of ${state.max_tokens} tokens in ${pages.length} pages`);
  const goesOn = ["waits", "prefills", "decodes"].includes(status);
  card.querySelector("[data-do=stop]").hidden = !goesOn;
  card.querySelector("[data-do=resume]").hidden = goesOn || status === "full" || status === "ended";
  card.querySelector("[data-do=fork]").disabled = ["waits", "prefills", "full"].includes(status) || length === 0;
  card.querySelector("[data-do=save]").disabled = length === 0;
  const svg = card.querySelector("svg");
  const drawn = pages.map((page, at) => {
    const tokens = Math.min(state.page_tokens, length - at * state.page_tokens);
    return pageMark(page, sharers.get(page), 18 * at, 0, tokens / state.page_tokens);
  });
  // The longest sequence is as wide as the page.
  const width = (18 * state.max_tokens) / state.page_tokens;
  svg.setAttribute("viewBox", `0 0 ${width} 22`);
  svg.replaceChildren(
    ...drawn,
    element("rect", { class: "frame", x: 0.5, y: 18.5, width: width - 1, height: 3 }),
    element("rect", { class: "length", x: 0.5, y: 18.5, width: (width - 1) * (length / state.max_tokens), height: 3 }),
  );
}

/** A page: a band in the colour of each sequence that shares it, as full as `filled` says. */
function pageMark(page, numbers = [], x, y, filled = 1) {
  const [side, band] = [15, 15 / Math.max(numbers.length, 1)];
  const bands = numbers.map((number, at) =>
    element("rect", { x: x + 0.5, y: y + 0.5 + at * band, width: side * filled, height: band, fill: colour(number) }));
  const words = numbers.length ? `sequence${numbers.length > 1 ? "s" : ""} ${numbers.join(", ")}` : "free";
  return element(
    "g",
    { class: "page", "data-page": page, "data-sequences": numbers.join(" ") },
    element("rect", { class: "frame", x: x + 0.5, y: y + 0.5, width: side, height: side }),
    ...bands,
    element("title", {}, `page ${page}: ${words}`),
  );
}

function showPool(state, sharers) {
  const count = state.pages_used + state.pages_free;
  const svg = find("pool");
  const columns = state.max_tokens / state.page_tokens;
  const rows = Math.max(1, Math.ceil(count / columns));
  svg.setAttribute("viewBox", `0 0 ${18 * columns} ${18 * rows}`);
  const pages = Array.from({ length: count }, (_, page) =>
    pageMark(page, sharers.get(page), 18 * (page % columns), 18 * Math.floor(page / columns)));
  svg.replaceChildren(...pages);
  const alone = state.sequences.reduce((sum, { pages }) => sum + pages.length, 0);
  const figures = find("figures");
  figures.textContent =
    `${state.pages_used} of ${count} pages in use, ${state.pages_shared} of them shared: ${megabytes(state.pages_used * state.page_bytes)} of K and V in ${state.layers} layers` +
    (alone > state.pages_used ? `, ${megabytes(alone * state.page_bytes)} without sharing` : "") +
    `. ${megabytes(state.bytes_allocated)} are allocated. A page holds ${state.page_tokens} tokens.`;
  Object.assign(figures.dataset, { used: state.pages_used, shared: state.pages_shared, free: state.pages_free, bytes: state.bytes_allocated });
}

// --- Files --------------------------------------------------------------------------------------------------------

async function save(number) {
  const bytes = await decoder.save(number);
  const url = URL.createObjectURL(new Blob([bytes]));
  element("a", { href: url, download: `sequence-${number}.safetensors` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

// --- What the buttons do ------------------------------------------------------------------------------------------

find("load").addEventListener("click", () => start(null));
find("file").addEventListener("change", (event) => {
  const file = event.target.files[0];
  event.target.value = "";
  if (file) start(file);
});
find("cancel").addEventListener("click", () => cancel?.abort());
find("again").addEventListener("click", () => location.reload());
find("prompts").addEventListener("submit", (event) => {
  event.preventDefault();
  tell("");
  const lines = find("prompt").value.split("\n").filter((line) => line.trim());
  if (lines.length === 0) tell("Type a prompt first.");
  for (const line of lines) act(() => decoder.add(line, find("chat").checked, find("wanted").valueAsNumber || 1));
});
find("saved").addEventListener("change", async (event) => {
  const file = event.target.files[0];
  event.target.value = "";
  if (!file) return;
  tell("");
  const bytes = new Uint8Array(await file.arrayBuffer());
  act(() => decoder.restore(bytes));
});

// For tests and the curious.
window.closeGpu = () => device?.close();

await openGpu().catch((error) => end(`The page's program does not start: ${error.message}`));
